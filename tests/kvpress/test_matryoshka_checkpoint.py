"""The file of a projection: what it holds, and everything that is wrong with other files."""

import json

import pytest
import torch
from matryoshka_support import HEAD_DIM, bases_of, small_model
from safetensors.torch import load_file, save_file

from kvpress.errors import InputError
from kvpress.matryoshka.bases import Bases, Ranks
from kvpress.matryoshka.checkpoint import (
    HEADER,
    Header,
    ModelId,
    Projection,
    RankTable,
    check_fits,
    load_projection,
    model_fingerprint,
    save_projection,
)
from kvpress.matryoshka.passing import compressed_shapes

RANKS = Ranks(((8, 32), (24, 16)), ((16, 8), (32, 24)))


def projection(model=None):
    model = model or small_model(torch.float32)
    table = RankTable(share=0.625, method="greedy", keys=RANKS.keys, values=RANKS.values)
    name = ModelId.of(model, "small")
    header = Header(model=name, layers=(0, 1), tables=(table,), history=({"start": "pca"},))
    return Projection(header=header, bases=bases_of(model))


@pytest.mark.parametrize("with_means", [True, False])
def test_a_projection_comes_back(tmp_path, with_means):
    one = projection()
    if not with_means:
        one = Projection(header=one.header, bases=Bases(one.bases.layers, one.bases.keys, one.bases.values))
    save_projection(tmp_path / "p.safetensors", one)
    found = load_projection(tmp_path / "p.safetensors")
    assert found.header == one.header
    assert (found.bases.means is not None) == with_means
    for name in ("keys", "values", *(["means"] if with_means else [])):
        for a, b in zip(getattr(found.bases, name), getattr(one.bases, name), strict=True):
            assert torch.equal(a, b)
    assert found.ranks(0.625, searched=True) == RANKS
    assert found.ranks(0.5, searched=False) == Ranks.uniform([(2, HEAD_DIM, HEAD_DIM)] * 2, 0.5)
    with pytest.raises(InputError, match=r"no searched ranks for a share of 0.5 \(known: 0.625\)"):
        found.ranks(0.5, searched=True)


def fits(one, model):
    layers, shapes = compressed_shapes(model)
    check_fits(one, model, layers, shapes, "p.safetensors")


def test_a_projection_fits_its_model_in_any_dtype():
    model = small_model(torch.float32)
    fits(projection(model), model)
    fits(projection(model), small_model(torch.bfloat16))
    fits(projection(model), small_model(torch.float16))


def test_a_projection_of_another_model_is_refused():
    with pytest.raises(InputError, match=r"'p.safetensors' was made for 'small', whose layers or heads are not those"):
        fits(projection(), small_model(torch.float32, num_hidden_layers=3))
    other = small_model(torch.float32, rope_theta=5e5)
    assert model_fingerprint(other) == model_fingerprint(small_model(torch.float32))  # same weights, same seed
    with torch.no_grad():
        dict(other.named_parameters())["lm_head.weight"].view(-1)[3] += 0.5
    try:
        with pytest.raises(InputError, match="was made for 'small', and this model has other weights"):
            fits(projection(), other)
    finally:
        small_model.cache_clear()


def written(tmp_path, tensors=None, header=None, metadata=None):
    path = tmp_path / "p.safetensors"
    save_projection(path, projection())
    tensors = {**load_file(path), **(tensors or {})}
    text = json.loads(projection().header.model_dump_json())
    text.update(header or {})
    tensors = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    save_file(tensors, path, metadata if metadata is not None else {HEADER: json.dumps(text)})
    return path


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"tensors": {"keys.1": None}}, "does not hold the matrices of the layers that its header names"),
        ({"tensors": {"more": torch.zeros(1)}}, "does not hold the matrices"),
        ({"tensors": {"keys.1": torch.ones(2, 32, 32)}}, "matrices that are not orthogonal"),
        ({"tensors": {"keys.1": torch.full((2, 32, 32), torch.nan)}}, "matrices that are not orthogonal"),
        ({"tensors": {"keys.1": torch.ones(2, 32, 16)}}, "not one square for each KV head"),
        ({"tensors": {"keys.1": torch.eye(32).repeat(3, 1, 1)}}, "not one square for each KV head"),
        ({"tensors": {"means.1": torch.ones(2, 16)}}, "means of another shape"),
        ({"header": {"version": 2}}, "wrong header: field 'version'"),
        ({"header": {"colour": "red"}}, "wrong header: unknown field 'colour'"),
        ({"header": {"tables": [{"share": 0.5, "method": "x", "keys": [[8, 12]] * 2, "values": [[8, 8]] * 2}]}},
         "rank 12 of the keys in layer 0"),
        ({"header": {"tables": [{"share": 0.25, "method": "x", "keys": [[32, 32]] * 2, "values": [[8, 8]] * 2}]}},
         "ranks that take more than their share of 0.25"),
        ({"tensors": {"means.1": torch.full((2, 32), torch.nan)}}, "means that are no finite numbers"),
        ({"metadata": {}}, "is no projection: make one with `kvpress train projections`"),
        ({"metadata": {HEADER: "{"}}, "wrong header"),
    ],
)  # fmt: skip
def test_wrong_files(tmp_path, change, sentence):
    with pytest.raises(InputError, match=sentence):
        load_projection(written(tmp_path, **change))


@pytest.mark.parametrize("length", [0, 4, 100, 3000])
def test_a_truncated_file(tmp_path, length):
    path = written(tmp_path)
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(InputError, match=r"is damaged|is no projection"):
        load_projection(path)


def test_no_file_and_no_place(tmp_path):
    with pytest.raises(InputError, match="no such projection"):
        load_projection(tmp_path / "none.safetensors")
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot write"):
        save_projection(tmp_path / "file" / "p.safetensors", projection())


def test_a_header_that_claims_gigabytes_is_not_read(tmp_path):
    path = tmp_path / "p.safetensors"
    path.write_bytes((1 << 40).to_bytes(8, "little") + b"{}")
    with pytest.raises(InputError, match="is no projection, or larger than one can be"):
        load_projection(path)
