"""What an arm costs beside its score: bytes, seconds and generated length, means over the tasks of a family."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

from kvpress_eval.records import Mode
from kvpress_eval.report.rows import Cost, Row


@dataclass(frozen=True)
class CostRow:
    """cost: means over tasks of the means over samples; no speed of decoding if any task was decoded in shared batches."""

    family: str
    length: int | None
    mode: Mode
    arm: str
    cost: Cost


def cost_rows(rows: Sequence[Row]) -> list[CostRow]:
    groups: dict[tuple[str, int | None, Mode, str], list[Cost]] = {}
    for row in rows:
        groups.setdefault((row.family, row.length, row.mode, row.arm), []).append(row.cost)
    return [CostRow(*key, _mean(costs)) for key, costs in groups.items()]


def _mean(costs: Sequence[Cost]) -> Cost:
    speeds = [cost.decode_tokens_per_second for cost in costs if cost.decode_tokens_per_second is not None]
    means = {
        field.name: sum(getattr(cost, field.name) for cost in costs) / len(costs)
        for field in fields(Cost)
        if field.name not in ("decode_tokens_per_second", "decode_rows")
    }
    return Cost(
        **means,
        decode_tokens_per_second=sum(speeds) / len(speeds) if len(speeds) == len(costs) else None,
        decode_rows=max(cost.decode_rows for cost in costs),
    )
