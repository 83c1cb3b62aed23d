"""What a cache kept, per layer and head, in tokens, bytes and seconds."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kvpress.backend import Backend
from kvpress.selection import Decision, Problem

if TYPE_CHECKING:
    from kvpress.cache import CompressedCache
    from kvpress.cache.layer import CompressedLayer
    from kvpress.graphs import GraphRecord


@dataclass(frozen=True)
class Report:
    """A snapshot; `to_dict` is JSON-able, `str` a table for people."""

    data: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        return self.data

    def __str__(self) -> str:
        d = self.data
        lines = [
            f"contract {d['contract']} ({d['contract_id'][:12]}), backend {d['backend']} ({d['backend_reason']}), "
            f"{d['store']} store" + (f" with pages of {d['page_size']} tokens" if d["page_size"] else ""),
            f"kept {d['kept_tokens']:.1f} of {d['seen_tokens']:.1f} tokens per KV head and row, "
            f"{d['cache_bytes'] / 2**20:.2f} of {d['full_bytes'] / 2**20:.2f} MiB ({d['byte_share']:.1%}; index "
            f"{d['index_bytes'] / 2**20:.2f}, slack {d['slack_bytes'] / 2**20:.2f})",
            f"peak: {d['peak']}"
            + (f"; {d['turns_kept_in_full']} later prompts kept in full" if d["turns_kept_in_full"] else ""),
            "seconds: "
            + ", ".join(f"{k} {v:.3f}" for k, v in d["seconds"].items())
            + f" ({d['decode_steps']} decode steps, {d['decode']})",
            f"{'layer':>5}  {'kept per head':<19} {'MiB':>8} {'of':>8} {'eta_proj':>8} {'change':>6} {'eps_lat':>7} {'mass':>5} {'ties':>4}",
        ]
        for layer in d["layers"]:
            if not layer["compressed"]:
                lines.append(f"{layer['layer']:>5}  sliding window, kept by transformers")
                continue
            kept = _shorten([str(head["kept_tokens"]) for head in layer["heads"]], 19)
            before = sum(head["bytes_before"] for head in layer["heads"]) / 2**20
            after = sum(head["bytes_after"] for head in layer["heads"]) / 2**20
            lines.append(
                f"{layer['layer']:>5}  {kept:<19} {after:>8.3f} {before:>8.3f} {_number(layer['eta_proj'], '.3f'):>8} "
                f"{_number(layer['output_change'], '.3f'):>6} {_number(layer['eps_lat'], 'd'):>7} {_number(layer['kept_mass'], '.3f'):>5} {_number(layer['ties'], 'd'):>4}"
            )
        return "\n".join(lines)


def decision_record(decision: Decision, problem: Problem) -> dict[str, Any]:
    """What is remembered of one decision (one row of one layer) for the report."""
    return {
        "budget": problem.budget,
        "eta_proj": decision.eta_proj,
        "output_change": decision.output_change,
        "eps_lat": sum(decision.eps_lat),
        "kept_mass": decision.kept_mass,
        "ties": decision.ties,
    }


def make_report(cache: CompressedCache) -> Report:
    """Report of a cache as it is now.

    `full_bytes` is what transformers' DynamicCache would hold for the tokens seen so far, padding included.
    """
    plan, layers = cache.plan, cache.compressed_layers
    ready = [layer for layer in layers if layer.is_initialized]
    compressed = {layer.index: layer for layer in ready}
    rows = [_layer_rows(plan.decisions, layer) for layer in ready]
    heads = [head for row in rows for head in row["heads"]]
    others = cache.other_nbytes
    full = (
        sum(
            layer.storage.packing.native_bytes * layer.storage.n_heads * layer.storage.n_rows * layer.seen
            for layer in ready
        )
        + others
    )
    stores = [layer.storage.store for layer in ready if layer.storage.store is not None]
    index = sum(store.index_bytes for store in stores)
    slack = sum(store.slack_bytes for store in stores) + sum(pool.idle_bytes for pool in plan.pools.values())
    seen = [n for layer in ready for n in _seen(layer)]
    by_layer = {row["layer"]: row for row in rows}
    return Report(
        {
            "contract": cache.contract.name,
            "contract_id": cache.contract.id,
            **_backend(plan.backends),
            "decode": _decode(plan.graphs),
            "cache_bytes": cache.nbytes,
            "full_bytes": full,
            "byte_share": cache.nbytes / full if full else 0.0,
            "index_bytes": index,
            "slack_bytes": slack,
            "kept_tokens": sum(head["kept_tokens"] for head in heads) / max(len(heads), 1),
            "seen_tokens": sum(seen) / max(len(seen), 1),
            "prompt_tokens": plan.prompt_length or 0,
            "peak": "all layers in full (the decision needs every layer)"
            if plan.held_all_layers
            else "one layer in full beside the compressed rest",
            "turns_kept_in_full": plan.turns_in_full,
            "seconds": plan.clock.to_dict(),
            "decode_steps": plan.clock.decode_steps,
            "layers": [
                by_layer.get(i, {"layer": i, "compressed": i in compressed, "heads": []})
                for i in range(len(cache.layers))
            ],
        }
    )


def _backend(backends: set[Backend]) -> dict[str, Any]:
    """Who served the layers and where their tokens lie; several, joined by "+", where the devices of a model differ."""
    used = sorted(backends, key=lambda backend: (backend.name, backend.store))

    def joined(names: Iterable[str]) -> str:
        return "+".join(dict.fromkeys(names)) or "none yet"

    return {
        "backend": joined(backend.name for backend in used),
        "backend_reason": joined(backend.reason for backend in used),
        "store": joined(backend.store for backend in used),
        "page_size": next((backend.page_size for backend in used if backend.store == "paged"), None),
    }


def _decode(graphs: GraphRecord | None) -> str:
    """How decode steps ran: eagerly, or replayed as CUDA graphs as far as that was possible, and why not further."""
    if graphs is None:
        return "eager"
    told = [f"{n} steps eager: {reason}" for reason, n in graphs.eager.items()]
    if graphs.replayed:
        told.insert(0, f"CUDA graph, {graphs.replayed} steps replayed, captured {graphs.captured} times")
    return "; ".join(told) or "no step yet"


def _layer_rows(decisions: dict[tuple[int, int], dict[str, Any]], layer: CompressedLayer) -> dict[str, Any]:
    """One layer: its heads in all rows, and the decisions' measures (means over rows; counts are summed)."""
    lengths = layer.storage.store.lengths if layer.storage.store is not None else []
    heads, packing = [], layer.storage.packing
    for index, kept in enumerate(lengths):
        row, head = divmod(index, layer.storage.n_heads)
        seen = _seen(layer)[row]
        heads.append(
            {
                "row": row,
                "head": head,
                "kept_tokens": kept,
                "bytes_before": seen * packing.native_bytes,
                "bytes_after": kept * packing.head_bytes[head],
            }
        )
    found = [decisions[key] for row in range(layer.storage.n_rows) if (key := (layer.index, row)) in decisions]

    def mean(name: str) -> float | None:
        values = [record[name] for record in found if record[name] is not None]
        return sum(values) / len(values) if values else None

    return {
        "layer": layer.index,
        "compressed": True,
        "heads": heads,
        "eta_proj": mean("eta_proj"),
        "output_change": mean("output_change"),
        "kept_mass": mean("kept_mass"),
        "eps_lat": sum(record["eps_lat"] for record in found) if found else None,
        "ties": sum(record["ties"] for record in found) if found else None,
        "budget": [record["budget"] for record in found],
    }


def _seen(layer: CompressedLayer) -> list[int]:
    """Real tokens seen, per row."""
    return [layer.storage.real_tokens(row, layer.seen) for row in range(layer.storage.n_rows)]


def _shorten(words: list[str], width: int) -> str:
    text = " ".join(words)
    return text if len(text) <= width else text[: width - 3].rsplit(" ", 1)[0] + " ..."


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)
