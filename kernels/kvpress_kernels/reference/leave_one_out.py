"""What each page contributes to the output of a decode step: the plain torch form.

For one query head, with m_B = exp(page_lse_B - lse) the share of page B and v_B its mean value,

    output without B - output = m_B / (1 - m_B) (output - v_B)

Where m_B is nearly 1 both factors are differences of nearly equal numbers, so the output without B is summed from the
other pages instead (`joint_change`).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from kvpress_kernels.pages import n_pages
from kvpress_kernels.reference.joint_change import joint_change
from kvpress_kernels.reference.window_scores import DOMINANT


class LeaveOneOut(NamedTuple):
    """mass: [R, M, G], share of each page in the attention of each query head; with that of a learned sink the shares
    of a row sum to 1. change: [R, M, G], |output without the page - output|. Both 0 beyond a row's pages."""

    mass: Tensor
    change: Tensor


def leave_one_out(
    page_lse: Tensor,
    page_values: Tensor,
    output_wide: Tensor,
    lse: Tensor,
    lengths: Tensor,
    page_size: int,
    *,
    sinks: Tensor | None = None,
) -> LeaveOneOut:
    """Share and output change of every page, from what `ragged_decode` returns with statistics "values".

    page_lse: [R, M, G], page_values: [R, M, G, Dv], output_wide: [R, G, Dv], lse: [R, G], lengths: [R]. sinks:
    [Hkv * G], the learned sinks of that decode step. A page that is all that a query sees changes nothing by
    definition.
    """
    wide = output_wide.dtype
    columns = torch.arange(page_lse.shape[1], device=page_lse.device)
    used = (columns < n_pages(lengths, page_size)[:, None])[:, :, None]  # [R, M, 1]
    mass = torch.where(used, torch.exp(page_lse - lse[:, None]), 0.0)
    distance = (output_wide[:, None] - page_values.to(wide)).norm(dim=-1)
    change = torch.where(used & (mass <= DOMINANT), mass / (1 - mass) * distance, 0.0)
    for column in (mass > DOMINANT).any(2).any(0).nonzero().flatten().tolist():
        removed = (columns == column).expand(page_lse.shape[:2])
        alone = joint_change(page_lse, page_values, output_wide, lse, lengths, page_size, removed, sinks=sinks)
        change[:, column] = torch.where(mass[:, column] > DOMINANT, alone, change[:, column])
    return LeaveOneOut(mass, change)
