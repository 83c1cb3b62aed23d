"""The file of a projection: bases and rank tables as safetensors, and what they belong to as JSON in its header.

keys.<layer> [H, D, D], values.<layer> [H, Dv, Dv], means.<layer> [H, Dv]     float32
"""

from __future__ import annotations

import hashlib
import struct
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor
from transformers import PreTrainedModel

from kvpress.errors import InputError
from kvpress.files import write_atomically
from kvpress.matryoshka.bases import Bases, Ranks
from kvpress.slots.base import describe

#: under this key the header holds our JSON
HEADER = "kvpress_projection"
#: of the file, and of its JSON: bases of a model of 128 layers with 64 heads of 256 dimensions take 4 GB
MAX_FILE_BYTES, MAX_HEADER_BYTES = 8 << 30, 8 << 20
#: numbers of the weights that tell models apart
SAMPLE = 256
#: how far the matrices may be from orthogonal
MAX_ERROR = 1e-5


class ModelId(BaseModel):
    """Which model the bases were made for. fingerprint: of names and shapes of its weights; sample: some of their numbers; name: for people."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    fingerprint: str
    sample: tuple[float, ...] = Field(max_length=SAMPLE)

    @classmethod
    def of(cls, model: PreTrainedModel, name: str) -> ModelId:
        """The identity of a model."""
        weights = sorted(model.named_parameters(), key=lambda pair: pair[0])
        shapes = "".join(f"{key} {tuple(weight.shape)}\n" for key, weight in weights)
        step = max(1, len(weights) // (SAMPLE // 4))
        drawn = [weight.detach().flatten()[:4].float().cpu() for _, weight in weights[::step]]
        numbers = torch.cat(drawn)[:SAMPLE].tolist()
        return cls(name=name, fingerprint=hashlib.sha256(shapes.encode()).hexdigest(), sample=tuple(numbers))

    def is_of(self, other: ModelId) -> bool:
        """Whether both are one model, in whatever dtype each was loaded."""
        if self.fingerprint != other.fingerprint or len(self.sample) != len(other.sample):
            return False
        pairs = zip(self.sample, other.sample, strict=True)
        return all(abs(a - b) <= 0.01 * max(abs(a), abs(b)) + 1e-6 for a, b in pairs)


class RankTable(BaseModel):
    """Ranks for one budget. share: of the native bytes of keys and values; keys, values: [layer][KV head]."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    share: float = Field(gt=0, le=1)
    method: str
    keys: tuple[tuple[int, ...], ...]
    values: tuple[tuple[int, ...], ...]

    @property
    def ranks(self) -> Ranks:
        return Ranks(self.keys, self.values)


class Header(BaseModel):
    """What the file says of itself. history: how it was made, newest last: start, training, text, search."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    version: int = Field(default=1, ge=1, le=1)
    model: ModelId
    layers: tuple[int, ...]
    tables: tuple[RankTable, ...] = ()
    history: tuple[dict[str, Any], ...] = ()


class Projection(BaseModel):
    """Bases with their header."""

    model_config = ConfigDict(frozen=True, arbitrary_types_allowed=True)

    header: Header
    bases: Bases

    def ranks(self, share: float, searched: bool) -> Ranks:
        """The ranks for a share of the native bytes.

        searched: from the file's table for that share; else the same rank everywhere.

        Raises:
            InputError: there is no such table, or the share is no rank.
        """
        if not searched:
            return Ranks.uniform(self.bases.shapes, share)
        for table in self.header.tables:
            if abs(table.share - share) < 1e-6:
                return table.ranks
        known = ", ".join(f"{table.share:g}" for table in self.header.tables) or "none"
        raise InputError(
            f"the projection has no searched ranks for a share of {share:g} (known: {known}): run `kvpress train ranks`, or use uniform ranks"
        )


def model_fingerprint(model: PreTrainedModel) -> str:
    """sha256 over names, shapes and the first numbers of all weights as they are loaded, in bfloat16."""
    digest = hashlib.sha256()
    for name, weight in sorted(model.named_parameters(), key=lambda pair: pair[0]):
        first = weight.detach().flatten()[:64].float().cpu().to(torch.bfloat16).view(torch.int16)
        digest.update(f"{name} {tuple(weight.shape)}\n".encode() + first.numpy().tobytes())
    return digest.hexdigest()


def save_projection(path: Path, projection: Projection) -> None:
    """Write a projection, at once or not at all.

    Raises:
        InputError: the place cannot be written.
    """
    bases = projection.bases
    tensors: dict[str, Tensor] = {}
    for place, layer in enumerate(bases.layers):
        tensors[f"keys.{layer}"] = _stored(bases.keys[place])
        tensors[f"values.{layer}"] = _stored(bases.values[place])
        if bases.means is not None:
            tensors[f"means.{layer}"] = _stored(bases.means[place])
    write_atomically(path, save(tensors, {HEADER: projection.header.model_dump_json()}))


def load_projection(path: Path | str) -> Projection:
    """Read a projection and check it; whether it fits a model is `check_fits`.

    Raises:
        InputError: no such file, a damaged one, one of another kind, or matrices that are not orthogonal.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"no such projection: '{path}'")
    try:
        if path.stat().st_size > MAX_FILE_BYTES or _header_bytes(path) > MAX_HEADER_BYTES:
            raise InputError(f"'{path}' is no projection, or larger than one can be: it is not read")
        with safe_open(str(path), framework="pt") as file:
            text = (file.metadata() or {}).get(HEADER)
            if text is None:
                raise InputError(f"'{path}' is no projection: make one with `kvpress train projections`")
            header = Header.model_validate_json(text)
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
    except (SafetensorError, OSError, struct.error) as error:
        raise InputError(f"'{path}' is damaged ({_first_line(error)}): copy or train it again") from None
    except ValidationError as error:
        raise InputError(f"'{path}' has a wrong header: {describe(error, Header)}") from None
    return Projection(header=header, bases=_checked(path, header, tensors))


def check_fits(
    projection: Projection,
    model: PreTrainedModel,
    layers: tuple[int, ...],
    shapes: list[tuple[int, int, int]],
    source: str,
) -> None:
    """Raise InputError unless the projection was made for this model. source: how to call the projection."""
    name = projection.header.model.name
    if projection.bases.layers != layers or projection.bases.shapes != shapes:
        raise InputError(
            f"projection '{source}' was made for '{name}', whose layers or heads are not those of this model: train one for it"
        )
    if not projection.header.model.is_of(ModelId.of(model, "")):
        raise InputError(
            f"projection '{source}' was made for '{name}', and this model has other weights: train one for it"
        )


def _checked(path: Path, header: Header, tensors: dict[str, Tensor]) -> Bases:
    wanted = {f"{name}.{layer}" for layer in header.layers for name in ("keys", "values")}
    means = {f"means.{layer}" for layer in header.layers}
    if not header.layers or set(tensors) not in (wanted, wanted | means):
        raise InputError(f"'{path}' does not hold the matrices of the layers that its header names: train it again")

    def of(name: str) -> tuple[Tensor, ...]:
        return tuple(tensors[f"{name}.{layer}"].float() for layer in header.layers)

    bases = Bases(header.layers, of("keys"), of("values"), of("means") if means <= set(tensors) else None)
    for keys, values in zip(bases.keys, bases.values, strict=True):
        square = all(m.dim() == 3 and m.shape[1] == m.shape[2] for m in (keys, values))
        if not square or keys.shape[0] != values.shape[0]:
            raise InputError(f"'{path}' holds matrices that are not one square for each KV head: train it again")
    if bases.means is not None and any(
        mean.shape != values.shape[:2] for mean, values in zip(bases.means, bases.values, strict=True)
    ):
        raise InputError(f"'{path}' holds means of another shape than its values: train it again")
    if bases.means is not None and not all(bool(torch.isfinite(mean).all()) for mean in bases.means):
        raise InputError(f"'{path}' holds means that are no finite numbers: train it again")
    error = bases.orthogonality_error()
    if not error <= MAX_ERROR:  # also where it is no number
        raise InputError(f"'{path}' holds matrices that are not orthogonal (error {error:.1e}): train it again")
    for table in header.tables:
        table.ranks.check(bases.shapes)
        if table.ranks.share(bases.shapes) > table.share + 1e-6:
            raise InputError(
                f"'{path}' holds ranks that take more than their share of {table.share:g}: search them again"
            )
    return bases


def _header_bytes(path: Path) -> int:
    """Length of a safetensors header: the first eight bytes."""
    with path.open("rb") as file:
        return int(struct.unpack("<Q", file.read(8))[0])


def _stored(tensor: Tensor) -> Tensor:
    return tensor.detach().float().cpu().contiguous()


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".:")
