"""Evidence of a set of proxy queries: attention mass and output change of every unit, in bounded memory.

For one query u and unit c, with attention A over the stored tokens (and a learned sink, where the model has one):

    a_c = sum_{i in c} A_i        s_c = sum_{i in c} A_i v_i        o = sum_i A_i v_i
    g_c = s_c - a_c o             leaving c out changes the output by -g_c / (1 - a_c)

so NoLev is |g_c|^2 and MII is |g_c|^2 / (1 - a_c)^2 (arXiv 2605.08234 eq. 11 in the form that never divides by a_c).
Every statistic is reduced over the queries as it is made; nothing of size queries x tokens outlives a chunk.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator

import torch
from torch import Tensor

#: elements of the largest intermediate: 4 MiB in float32, which a core's cache holds (three times as fast as 64 MiB over
#: a prompt of 2,000 tokens); a GPU has bandwidth instead, and wants few launches
CHUNK_ELEMENTS = {"cpu": 1 << 20, "cuda": 1 << 24}
#: lower bound of 1 - a_c
MIN_REST = 1e-6
#: above this mass a unit's 1 - a and v - o are differences of nearly equal numbers, and are computed another way
DOMINANT = 0.95


def change(alpha: float) -> str:
    """Name of the statistic |g|^2 / (1 - a)^(2 alpha): alpha 0 is NoLev, alpha 1 is MII."""
    return f"change@{alpha:g}"


def window_scores(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    query_positions: Tensor,
    key_positions: Tensor,
    weights: Tensor,
    *,
    scale: float,
    statistics: Collection[str],
    unit_slots: Tensor | None = None,
    reducer: str = "sum",
    softcap: float | None = None,
    sinks: Tensor | None = None,
    value_basis: Tensor | None = None,
) -> dict[str, Tensor]:
    """Statistics of every unit, reduced over the queries.

    Args:
        query: [S, G, Q, D] proxy queries of S KV heads with G query heads each.
        keys: [S, N, D] stored keys, values: [S, N, Dv]; the S heads hold the same positions.
        query_positions: [Q], key_positions: [N] ascending; a token is visible when its position <= the query's.
        weights: [Q] non-negative r_u; queries of weight 0 are skipped.
        scale: factor of the logits.
        statistics: names among "mass" (sum r a), "mass_squared" (sum r a^2), "coverage" (sum r [a > share of the
            unit under uniform attention over the visible tokens]) and `change(alpha)`. A unit that is all that a
            query sees changes nothing by definition.
        unit_slots: [U, P] int64 index of each unit's tokens, -1 where a unit is short; None: every token is a unit.
        reducer: "sum", or "max" over the queries of weight > 0 (weights are then not multiplied in).
        softcap: logits become softcap * tanh(logits / softcap).
        sinks: [S, G] logits that join the denominator with value 0.
        value_basis: [S, G, Dv, R]; values are multiplied by it, so that norms are those of another space (W_O).

    Returns:
        name -> [S, G, U] in float32 (float64 for float64 input).
    """
    used = weights > 0
    query, query_positions, weights = query[:, :, used], query_positions[used], weights[used]
    dtype = torch.float64 if keys.dtype == torch.float64 else torch.float32
    n_heads, group, n_queries, _ = query.shape
    n_units = keys.shape[1] if unit_slots is None else unit_slots.shape[0]
    weights = weights.to(dtype)
    result = {name: keys.new_zeros(n_heads, group, n_units, dtype=dtype) for name in statistics}
    needs_values = any(name.startswith("change@") for name in statistics)
    room = CHUNK_ELEMENTS.get(keys.device.type, 1 << 24)
    width = group * max(keys.shape[1], 1)
    if needs_values and unit_slots is not None:
        width = max(width, group * n_units * (values.shape[-1] if value_basis is None else value_basis.shape[-1]))
    for heads in _slices(n_heads, max(1, room // width)):
        head_keys = keys[heads].to(dtype)
        head_values = _centred(values[heads], value_basis, heads, dtype) if needs_values else None
        for chunk in _slices(n_queries, max(1, room // (width * (heads.stop - heads.start)))):
            visible = int((key_positions <= query_positions[chunk].max()).sum())
            probs, sink_share = _attention(
                query[heads, :, chunk].to(dtype), head_keys[:, :visible], query_positions[chunk],
                key_positions[:visible], scale, softcap, None if sinks is None else sinks[heads].to(dtype),
            )  # fmt: skip
            seen = key_positions <= query_positions[chunk, None]
            per_query = _unit_statistics(probs, sink_share, seen, head_values, statistics, unit_slots)
            for name, stat in per_query.items():  # [s, G, q, u]
                units = stat.shape[-1]
                if reducer == "max":
                    target = result[name][heads, :, :units]
                    torch.maximum(target, stat.amax(2), out=target)
                else:
                    result[name][heads, :, :units] += weights[chunk] @ stat
    return result


def attention_probs(
    query: Tensor, keys: Tensor, query_positions: Tensor, key_positions: Tensor, scale: float,
    softcap: float | None, sinks: Tensor | None,
) -> Tensor:  # fmt: skip
    """Causal attention of [S, G, Q, D] queries over [S, N, D] keys: [S, G, Q, N]; rows that see nothing are zero."""
    return _attention(query, keys, query_positions, key_positions, scale, softcap, sinks)[0]


def _attention(
    query: Tensor, keys: Tensor, query_positions: Tensor, key_positions: Tensor, scale: float,
    softcap: float | None, sinks: Tensor | None,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """`attention_probs`, and the share [S, G, Q, 1] of a learned sink where there is one."""
    n_heads, group, n_queries, dim = query.shape
    logits = (query.reshape(n_heads, group * n_queries, dim) @ keys.transpose(1, 2)).view(n_heads, group, n_queries, -1)
    logits *= scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    # keys ascend, so only those behind the first query can be hidden from anyone: a window looks at a few columns
    first = int((key_positions <= query_positions.min()).sum()) if n_queries else 0
    hidden = key_positions[None, first:] > query_positions[:, None]  # [Q, N - first]
    logits[..., first:].masked_fill_(hidden, float("-inf"))
    if sinks is not None:
        column = sinks[:, :, None, None].expand(-1, -1, n_queries, 1)
        probs = torch.softmax(torch.cat([logits, column], -1), -1)
        return probs[..., :-1], probs[..., -1:]
    probs = torch.softmax(logits, -1)
    blind = first == 0 and bool(hidden.all(1).any())
    return (probs.nan_to_num_(0.0) if blind else probs), None


def unit_vectors(probs: Tensor, values: Tensor, unit_slots: Tensor | None) -> tuple[Tensor, Tensor]:
    """Mass a_c [S, G, Q, U] and displacement g_c [S, G, Q, U, Dv] of every unit.

    probs: [S, G, Q, N] from `attention_probs`; values: [S, N, Dv]. Sum of g over all units is 0 without sinks.
    """
    output = torch.einsum("sgqn,snd->sgqd", probs, values)
    if unit_slots is None:
        return probs, probs[..., None] * (values[:, None, None] - output[..., None, :])
    gathered = _gather(probs, unit_slots)  # [S, G, Q, U, P]
    unit_values = values[:, unit_slots.clamp(min=0)]  # [S, U, P, Dv]
    mass = gathered.sum(-1)
    return mass, torch.einsum("sgqup,supd->sgqud", gathered, unit_values) - mass[..., None] * output[..., None, :]


def _unit_statistics(
    probs: Tensor,
    sink_share: Tensor | None,
    seen: Tensor,
    values: tuple[Tensor, Tensor] | None,
    statistics: Collection[str],
    unit_slots: Tensor | None,
) -> dict[str, Tensor]:
    """Per-query statistics [s, G, q, u]; probs may cover only the first keys, those that `seen` [q, N] has."""
    if unit_slots is None:
        seen = seen[:, : probs.shape[-1]]
    else:
        probs = torch.nn.functional.pad(probs, (0, seen.shape[1] - probs.shape[-1]))
    mass = probs if unit_slots is None else _gather(probs, unit_slots).sum(-1)
    found: dict[str, Tensor] = {}
    squared_change = dominant = None
    for name in statistics:
        if name == "mass":
            found[name] = mass
        elif name == "mass_squared":
            found[name] = mass.square()
        elif name == "coverage":
            inside = seen if unit_slots is None else _gather(seen, unit_slots).sum(-1)  # [q, u] visible tokens
            share = inside / seen.sum(-1, keepdim=True).clamp(min=1)
            # a unit that is all that a query sees has just its share: rounding must not decide
            found[name] = ((mass > share * (1 + 1e-6)) & (inside > 0)).to(mass.dtype)
        else:
            assert values is not None
            if squared_change is None:
                squared_change, output = _squared_change(probs, sink_share, mass, *values, unit_slots)
                dominant = _dominant(probs, sink_share, mass, *values, output, unit_slots)
            alpha = float(name.removeprefix("change@"))
            rest = (1 - mass).clamp_(min=MIN_REST)
            found[name] = squared_change if alpha == 0 else squared_change / rest.pow_(2 * alpha)
            if dominant is not None:
                at, distance, left = dominant
                found[name][at] = distance * left.pow(2 - 2 * alpha)
    return found


def _squared_change(
    probs: Tensor,
    sink_share: Tensor | None,
    mass: Tensor,
    values: Tensor,
    centre: Tensor,
    unit_slots: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """|g_c|^2 [s, G, q, u] and the centred output [s, G, q, Dv].

    values: [s, G or 1, N, Dv] minus their mean `centre` [s, G or 1, 1, Dv]. Centred values keep
    |v - o|^2 = |v|^2 - 2 v.o + |o|^2 accurate in float32: the large common part cancels first.
    """
    if unit_slots is None:
        values = values[:, :, : probs.shape[-1]]
    output = probs @ values if values.shape[1] > 1 else _fold(probs, values)  # [s, G, q, Dv]
    if sink_share is not None:
        output = output - sink_share * centre  # a learned sink has value 0, not the centre
    if unit_slots is None:
        cross = output @ values.transpose(2, 3) if values.shape[1] > 1 else _fold(output, values.transpose(2, 3))
        distance = cross.mul_(-2).add_(values.square().sum(-1)[:, :, None]).add_(output.square().sum(-1, keepdim=True))
        return distance.clamp_(min=0).mul_(mass).mul_(mass), output
    gathered = _gather(probs, unit_slots).transpose(2, 3)  # [s, G, U, q, P]
    unit_values = values[:, :, unit_slots.clamp(min=0)]  # [s, G or 1, U, P, Dv]
    if unit_values.shape[1] == 1:  # fold the group into the queries instead of copying the values G times
        s, group, units, q, p = gathered.shape
        folded = gathered.permute(0, 2, 1, 3, 4).reshape(s, units, group * q, p) @ unit_values[:, 0]
        sums = folded.view(s, units, group, q, -1).permute(0, 2, 3, 1, 4)
    else:
        sums = (gathered @ unit_values).transpose(2, 3)  # [s, G, q, U, Dv]
    return (sums - mass[..., None] * output[..., None, :]).square().sum(-1), output


def _dominant(
    probs: Tensor,
    sink_share: Tensor | None,
    mass: Tensor,
    values: Tensor,
    centre: Tensor,
    output: Tensor,
    unit_slots: Tensor | None,
) -> tuple[tuple[Tensor, ...], Tensor, Tensor] | None:
    """Units that hold nearly all mass of a query: where they are [m], |g / (1 - a)|^2 [m] and 1 - a [m].

    Both are summed over what is not in the unit, R = 1 - a = sum_rest A_i, so that they keep their digits however
    small R is: g / R = s_c - a (sum_rest A_i v_i) / R. An attention sink is such a unit, and losing it changes most.
    """
    heaviest = mass.amax(-1) if mass.shape[-1] else mass.new_zeros(mass.shape[:-1])
    found = []
    for s, g in (heaviest > DOMINANT).any(-1).nonzero().tolist():
        rows = (heaviest[s, g] > DOMINANT).nonzero().flatten()
        unit = mass[s, g, rows].argmax(-1)
        own = unit[:, None] if unit_slots is None else unit_slots[unit]
        others = probs[s, g, rows].scatter(1, torch.where(own >= 0, own, own[:, :1]), 0.0)
        basis = min(g, values.shape[1] - 1)
        rest = others @ values[s, basis, : others.shape[1]]  # [m, Dv]
        left = others.sum(-1)
        if sink_share is not None:
            rest = rest - sink_share[s, g, rows] * centre[s, basis]
            left = left + sink_share[s, g, rows, 0]
        inside = output[s, g, rows] - rest
        share = heaviest[s, g, rows, None] / left.clamp(min=torch.finfo(left.dtype).tiny)[:, None]
        distance = (inside - share * rest).square().sum(-1) * (left > 0)
        found.append((torch.full_like(rows, s), torch.full_like(rows, g), rows, unit, distance, left))
    if not found:
        return None
    head, group, row, unit, distance, left = (torch.cat(parts) for parts in zip(*found, strict=True))
    return (head, group, row, unit), distance, left


def _fold(left: Tensor, right: Tensor) -> Tensor:
    """[s, G, q, x] @ [s, 1, x, y] as one matmul per KV head."""
    s, group, q, x = left.shape
    return (left.reshape(s, group * q, x) @ right[:, 0]).view(s, group, q, -1)


def _gather(probs: Tensor, unit_slots: Tensor) -> Tensor:
    """probs [..., N] -> [..., U, P], zero where a unit is short."""
    n_units, size = unit_slots.shape
    unbroken = n_units > 0 and int(unit_slots.max()) == probs.shape[-1] - 1 and bool((unit_slots[:-1] >= 0).all())
    if unbroken:  # only the last block may be short: a view does
        view: Tensor = torch.nn.functional.pad(probs, (0, n_units * size - probs.shape[-1])).unflatten(
            -1, (n_units, size)
        )
        return view
    gathered = probs[..., unit_slots.clamp(min=0)]
    return gathered if bool((unit_slots >= 0).all()) else gathered * (unit_slots >= 0)


def _centred(values: Tensor, basis: Tensor | None, heads: slice, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Values (times the basis) minus their mean over tokens, and that mean: [s, G or 1, N, Dv], [s, G or 1, 1, Dv]."""
    wide = values.to(dtype)[:, None]
    if basis is not None:
        wide = wide @ basis[heads].to(dtype)
    centre = wide.mean(2, keepdim=True)
    return wide - centre, centre


def _slices(total: int, step: int) -> Iterator[slice]:
    for start in range(0, total, step):
        yield slice(start, min(start + step, total))
