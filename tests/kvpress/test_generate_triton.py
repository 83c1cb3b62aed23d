"""The whole engine through the kernels, in the interpreter: the tokens and kept sets of the torch backend."""

import pytest
import torch
from generation_support import kept, small
from matryoshka_support import bases_of, small_model
from tiny_models import prompts, tiny

import kvpress
from kvpress.cache import projected
from kvpress.matryoshka.bases import Ranks
from kvpress.matryoshka.checkpoint import Header, ModelId, Projection, RankTable, save_projection

GREEDY = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
TRITON = kvpress.BackendRequest("triton", page_size=16)


def both(model, contract, **inputs):
    found = []
    for backend in ("torch", TRITON):
        with kvpress.compress(model, contract, backend=backend) as session:
            tokens = model.generate(**inputs, **GREEDY)
        found.append((tokens, kept(session)))
    assert session.report().to_dict()["backend"] == "triton"
    return found


@pytest.mark.parametrize("family", ["llama", "gpt_oss", "gemma3"])
def test_full_budget(family):
    ids, mask = prompts(2, 40, [9, 0])
    expected, found = both(tiny(family, layers=2), "full", input_ids=ids, attention_mask=mask)
    assert torch.equal(expected[0], found[0])
    assert expected[1] == found[1]


@pytest.mark.parametrize("name", ["snapkv", "adakv", "mii", "h2o_debiased", "mii_blocks", "criticalkv", "kvzip"])
def test_presets(name):
    ids, mask = prompts(2, 64, [13, 0])
    expected, found = both(tiny("llama", layers=1), small(name), input_ids=ids, attention_mask=mask)
    assert expected[1] == found[1]
    assert torch.equal(expected[0], found[0])


def test_learned_sinks_under_a_value_aware_ranking():
    expected, found = both(tiny("gpt_oss", layers=2), small("mii"), input_ids=prompts(1, 64)[0])
    assert expected[1] == found[1]
    assert torch.equal(expected[0], found[0])


def test_beams():
    ids, mask = prompts(2, 40, [9, 0])
    expected, found = both(tiny("llama", layers=1), small("snapkv"), input_ids=ids, attention_mask=mask, num_beams=2)
    assert torch.equal(expected[0], found[0])


def test_assisted_decoding():
    model = tiny("llama", layers=2)
    inputs = {"input_ids": prompts(1, 40)[0], "assistant_model": tiny("llama", layers=1)}
    expected, found = both(model, small("snapkv"), **inputs)
    assert torch.equal(expected[0], found[0])


def test_chunked_prefill_with_eviction_between_chunks():
    contract = small("snapkv", schedule={"kind": "per_prefill_chunk"})
    expected, found = both(tiny("llama", layers=1), contract, input_ids=prompts(1, 64)[0], prefill_chunk_size=24)
    assert expected[1] == found[1]
    assert torch.equal(expected[0], found[0])


def test_eviction_while_decoding():
    contract = small("h2o", schedule={"kind": "every_decode_steps", "n": 2})
    expected, found = both(tiny("llama", layers=1), contract, input_ids=prompts(1, 64)[0])
    assert expected[1] == found[1]
    assert torch.equal(expected[0], found[0])


def test_second_turn():
    model, results = tiny("llama", layers=1), []
    ids, more = prompts(1, 40)[0], prompts(1, 9, seed=1)[0]
    for backend in ("torch", TRITON):
        with kvpress.CompressedCache(model, small("snapkv"), backend=backend) as cache:
            first = model.generate(input_ids=ids, past_key_values=cache, **GREEDY)
            turn = torch.cat([first, more], 1)
            results.append(model.generate(input_ids=turn, past_key_values=cache, **GREEDY))
    assert torch.equal(*results)


def test_full_budget_in_int8():
    ids, mask = prompts(2, 40, [9, 0])
    contract = kvpress.Contract.load("full").swap(representation="int8")
    expected, found = both(tiny("gpt_oss", layers=2), contract, input_ids=ids, attention_mask=mask)
    assert torch.equal(expected[0], found[0])


def test_a_preset_in_int8():
    ids, mask = prompts(2, 64, [13, 0])
    contract = small("adakv").swap(representation="int8")
    expected, found = both(tiny("llama", layers=1), contract, input_ids=ids, attention_mask=mask)
    assert expected[1] == found[1]
    assert torch.equal(expected[0], found[0])


def test_eviction_while_decoding_in_int8():
    contract = small("h2o", schedule={"kind": "every_decode_steps", "n": 2}).swap(representation="int8")
    expected, found = both(tiny("llama", layers=1), contract, input_ids=prompts(1, 64)[0])
    assert expected[1] == found[1]
    assert torch.equal(expected[0], found[0])


@pytest.mark.parametrize(("ranks", "int8"), [("uniform", False), ("searched", False), ("searched", True)])
def test_projections(tmp_path, monkeypatch, ranks, int8):
    """One launch for heads of all ranks, against a torch store for each rank."""
    launched, real = [], projected.op
    monkeypatch.setattr(projected, "op", lambda *names: launched.append(names) or real(*names))
    model = small_model(torch.float32)
    table = Ranks(((8, 32), (24, 24)), ((16, 8), (32, 24)))
    searched = table.share([(2, 32, 32)] * 2)
    share = searched if ranks == "searched" else 0.5
    tables = (RankTable(share=searched, method="by hand", keys=table.keys, values=table.values),)
    identity = ModelId.of(model, "small")
    header = Header(model=identity, layers=(0, 1), tables=tables)
    save_projection(tmp_path / "p.safetensors", Projection(header=header, bases=bases_of(model)))
    stored = {
        "kind": "orthogonal",
        "file": str(tmp_path / "p.safetensors"),
        "share": share,
        "ranks": ranks,
        "int8": int8,
    }
    contract = small("snapkv").swap(representation=stored)
    ids, mask = prompts(2, 64, [13, 0])
    expected, found = both(model, contract, input_ids=ids, attention_mask=mask)
    assert expected[1] == found[1]
    assert torch.equal(expected[0], found[0])
    # two layers; the prompt gives the first of four tokens
    assert launched.count(("project_append", "triton")) == launched.count(("lowrank_decode", "triton")) == 2 * 3
