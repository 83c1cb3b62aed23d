"""Orthogonal matrices that gradient descent can move: a fixed start times the Cayley map of free numbers.

    U = start @ C,  C = (I - A/2)^-1 (I + A/2),  A = X - X^T          (arXiv 2410.14731; with Q = A/2 it is (I + Q)(I - Q)^-1)

The published code inverts the map to start from a given basis, which loses precision where that has an eigenvalue near -1.
Here the start is a factor of its own and X begins at zero: the given basis is met exactly and C stays near the identity.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from kvpress.matryoshka.bases import Bases


def cayley(free: Tensor) -> Tensor:
    """Orthogonal matrices [..., d, d] with determinant +1, in the dtype of `free`; computed in float64.

    free: [..., d, d] any numbers, of which the part below the diagonal counts; zeros give the identity.
    """
    lower = free.double().tril(-1)
    half = (lower - lower.transpose(-1, -2)) / 2
    eye = torch.eye(free.shape[-1], dtype=half.dtype, device=half.device)
    found: Tensor = torch.linalg.solve(eye - half, eye + half).to(free.dtype)
    return found


def special(basis: Tensor) -> Tensor:
    """The basis [..., d, d] with the last column turned where the determinant is negative: no subspace changes."""
    signs = torch.ones(basis.shape[:-1], dtype=basis.dtype, device=basis.device)
    signs[..., -1] = torch.linalg.det(basis.double()).sign().to(basis.dtype)
    return basis * signs[..., None, :]


class TrainableBases(nn.Module):
    """Bases whose matrices stay orthogonal whatever an optimiser does to the parameters.

    start: where they begin; its matrices are met exactly. train_means: also learn the value means (zeros where there are none).
    """

    def __init__(self, start: Bases, train_means: bool = True) -> None:
        super().__init__()
        self.layers = start.layers
        for name, matrices in (("keys", start.keys), ("values", start.values)):
            for index, matrix in enumerate(matrices):
                self.register_buffer(f"{name}_start_{index}", special(matrix.float()))
        self.keys = _free(start.keys)
        self.values = _free(start.values)
        means = start.means or [torch.zeros_like(matrix[..., 0]) for matrix in start.values]
        self.means = nn.ParameterList(nn.Parameter(mean.float().clone(), requires_grad=train_means) for mean in means)
        self.has_means = train_means or start.means is not None

    def forward(self) -> Bases:
        """The bases in float32, connected to the parameters."""
        return Bases(
            self.layers,
            self._matrices("keys"),
            self._matrices("values"),
            tuple(self.means) if self.has_means else None,
        )

    def _matrices(self, name: str) -> tuple[Tensor, ...]:
        return tuple(
            (getattr(self, f"{name}_start_{index}").double() @ cayley(free.double())).float()
            for index, free in enumerate(getattr(self, name))
        )


def _free(matrices: Sequence[Tensor]) -> nn.ParameterList:
    return nn.ParameterList(torch.zeros_like(matrix, dtype=torch.float32) for matrix in matrices)
