"""Below 100 %: chunked prefill, drafts, beams and further turns change when tokens arrive, not what is kept."""

import pytest
import torch
from generation_support import kept, small
from tiny_models import prompts, tiny

import kvpress

pytestmark = pytest.mark.usefixtures("store")

GREEDY = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}


def generate(model, contract, **inputs):
    with kvpress.compress(model, contract) as session:
        tokens = model.generate(**inputs)
    return tokens, session


@pytest.mark.parametrize("name", ["snapkv", "h2o", "h2o_debiased", "mii", "adakv", "tova", "kvzip", "mii_blocks"])
def test_chunked_prefill_keeps_the_same(name):
    model, contract = tiny("llama", torch.float64), small(name)
    ids, mask = prompts(2, 64, [0, 11])
    inputs = {"input_ids": ids, "attention_mask": mask, **GREEDY}
    tokens, whole = generate(model, contract, **inputs)
    for chunk in (16, 23):
        chunked_tokens, chunked = generate(model, contract, prefill_chunk_size=chunk, **inputs)
        assert torch.equal(tokens, chunked_tokens)
        assert kept(chunked) == kept(whole)


def test_eviction_between_chunks_bounds_the_cache_during_prefill():
    model = tiny("llama")
    contract = small("snapkv", schedule={"kind": "per_prefill_chunk"}, budget={"kind": "tokens", "value": 20})
    ids, _ = prompts(1, 200)
    stored = []
    with kvpress.compress(model, contract) as session, torch.no_grad():
        cache = session.new_cache()
        cache.begin_prompt(200)
        for start in range(0, 200, 25):
            model(input_ids=ids[:, start : start + 25], past_key_values=cache)
            stored.append(max(cache.compressed_layers[0].storage.store.lengths))
    assert stored == [20] * 8


@pytest.mark.parametrize("family", ["llama", "gpt_oss"])
@pytest.mark.parametrize("name", ["snapkv", "adakv", "mii", "h2o"])
def test_assisted_decoding_equals_greedy_at_the_same_budget(family, name):
    """The first pass of the target reads prompt and draft at once; the draft must already see the cut cache."""
    model, contract = tiny(family, torch.float64), small(name)
    assistant = tiny(family, torch.float64, layers=2)
    ids, _ = prompts(1, 64)
    greedy, a = generate(model, contract, input_ids=ids, **GREEDY)
    assisted, b = generate(model, contract, input_ids=ids, assistant_model=assistant, **GREEDY)
    assert torch.equal(greedy, assisted)
    prompt = 64
    assert [[p for p in head if p < prompt] for layer in kept(a) for head in layer] == [
        [p for p in head if p < prompt] for layer in kept(b) for head in layer
    ]


def test_assisted_decoding_with_eviction_while_decoding():
    model = tiny("llama", torch.float64)
    contract = small("snapkv", schedule={"kind": "every_decode_steps", "n": 4})
    ids, _ = prompts(1, 64)
    settings = {**GREEDY, "max_new_tokens": 40}
    _, session = generate(
        model, contract, input_ids=ids, assistant_model=tiny("llama", torch.float64, layers=1), **settings
    )
    budget = int(0.4 * 64)
    draft = 25  # at most this many drafted tokens may be accepted between two evictions
    assert max(max(layer.storage.store.lengths) for layer in session.cache.compressed_layers) <= budget + 4 + draft


def test_beams_with_eviction_while_decoding():
    """Rows are reordered at each step; a beam that continues itself must give what greedy decoding gives."""
    model = tiny("llama", torch.float64)
    contract = small("h2o", schedule={"kind": "every_decode_steps", "n": 3})
    ids, mask = prompts(2, 64, [0, 9])
    tokens, session = generate(model, contract, input_ids=ids, attention_mask=mask, num_beams=3, **GREEDY)
    assert tokens.shape[1] == 64 + 12
    lengths = session.cache.compressed_layers[0].storage.store.lengths
    assert len(lengths) == 2 * 3 * 2
    assert max(lengths) <= int(0.4 * 64) + 4


def test_second_turn_is_compressed_too():
    """The new part of the prompt is read over the cut cache, then both are cut to the budget of the whole."""
    model, contract = tiny("llama", torch.float64), small("snapkv")
    ids, _ = prompts(1, 64)
    with kvpress.CompressedCache(model, contract) as cache:
        first = model.generate(input_ids=ids, past_key_values=cache, **GREEDY)
        turn = torch.cat([first, prompts(1, 40, seed=4)[0]], 1)
        second = model.generate(input_ids=turn, past_key_values=cache, **GREEDY)
        assert cache.get_seq_length() == second.shape[1] - 1
        budget = int(0.4 * turn.shape[1])
        for layer in cache.compressed_layers:
            assert layer.storage.store.lengths == [budget + 11] * 2
            positions = layer.storage.store.segment(0)[2]
            assert bool((positions[1:] > positions[:-1]).all())


def test_second_turn_with_only_the_new_ids():
    """generate accepts the new ids alone when the mask covers everything; the prompt still ends where it ends."""
    model, contract = tiny("llama", torch.float64), small("snapkv")
    ids, more = prompts(1, 64)[0], prompts(1, 40, seed=4)[0]

    def run(only_new):
        with kvpress.CompressedCache(model, contract) as cache:
            first = model.generate(input_ids=ids, past_key_values=cache, **GREEDY)
            # the last generated token was never fed, so it belongs to the new ids
            turn = torch.cat([first, more], 1)
            new = turn[:, cache.get_seq_length() :] if only_new else turn
            out = model.generate(input_ids=new, attention_mask=torch.ones_like(turn), past_key_values=cache, **GREEDY)
            return out[:, -12:], cache.prompt_length

    a, b = run(True), run(False)
    assert torch.equal(a[0], b[0])
    assert a[1] == b[1] == 64 + 12 + 40


def test_delayed_eviction_reads_decode_queries():
    """With first_decode_steps the kept set depends on the answer, not only on the prompt."""
    model = tiny("llama", torch.float64)
    contract = small(
        "snapkv",
        query_law={"kind": "first_decode_steps", "n": 4},
        schedule={"kind": "after_decode_steps", "n": 4},
        protection={"kind": "none"},
        access={"kind": "aggregate"},
    )
    ids, _ = prompts(1, 64)
    sets = []
    for forced in (5, 150):
        with torch.no_grad(), kvpress.CompressedCache(model, contract) as cache:
            model(input_ids=ids, past_key_values=cache)
            for _ in range(5):
                model(input_ids=torch.tensor([[forced]]), past_key_values=cache)
            sets.append([p.tolist() for layer in cache.compressed_layers for _, _, p in layer.storage.store.segments()])
            assert all(len(head) == int(0.4 * 64) + 1 for head in sets[-1])
    assert sets[0] != sets[1]


def test_oracle_reads_the_reference():
    model, contract = tiny("llama", torch.float64), small("oracle_mass", protection={"kind": "none"})
    ids, _ = prompts(1, 64)
    sets = []
    for seed in (1, 2):
        with kvpress.compress(model, contract, reference=prompts(1, 6, seed=seed)[0]) as session:
            model.generate(input_ids=ids, **{**GREEDY, "max_new_tokens": 1})
        sets.append(kept(session))
        assert session.cache.get_seq_length() == 64, "the probe leaves no token behind"
    assert sets[0] != sets[1]


def test_a_streamer_sees_every_token():
    seen = []

    class Streamer:
        def put(self, value):
            seen.append(value.flatten().tolist())

        def end(self):
            seen.append("end")

    model = tiny("llama")
    tokens, _ = generate(model, small("snapkv"), input_ids=prompts(1, 64)[0], streamer=Streamer(), **GREEDY)
    assert [t for part in seen[1:-1] for t in part] == tokens[0, 64:].tolist()
    assert seen[-1] == "end"


def test_several_questions_from_one_frozen_context():
    """Freeze after the context; each question and its answer are appended in full and cropped off again."""
    model, contract = tiny("llama", torch.float64), small("kvzip")
    context, mask = prompts(2, 64, [0, 11])
    answers, sizes = {}, set()
    with torch.no_grad(), kvpress.CompressedCache(model, contract) as cache:
        model(input_ids=context, attention_mask=mask, past_key_values=cache)
        cache.freeze()
        before = [p.tolist() for _, _, p in cache.compressed_layers[0].storage.store.segments()]
        for seed in (1, 2, 1):
            ids = torch.cat([context, prompts(2, 7, seed=seed)[0]], 1)
            full_mask = torch.cat([mask, torch.ones(2, 7, dtype=mask.dtype)], 1)
            out = model.generate(input_ids=ids, attention_mask=full_mask, past_key_values=cache, **GREEDY)
            sizes.add(tuple(cache.compressed_layers[0].storage.store.lengths))
            if seed in answers:
                assert torch.equal(answers[seed], out)
            answers[seed] = out
            cache.crop(64 - cache.get_seq_length())
            assert before == [p.tolist() for _, _, p in cache.compressed_layers[0].storage.store.segments()]
    assert len(sizes) == 1
    assert [n + 7 + 11 for n in map(len, before)] == list(sizes.pop())


def test_queries_do_not_pile_up_after_a_delayed_eviction():
    """Once the only eviction of a turn is over, its queries are let go and no new ones are kept."""
    model = tiny("llama")
    contract = small(
        "snapkv",
        query_law={"kind": "first_decode_steps", "n": 4},
        schedule={"kind": "after_decode_steps", "n": 4},
    )
    with kvpress.compress(model, contract) as session:
        model.generate(input_ids=prompts(1, 64)[0], **{**GREEDY, "max_new_tokens": 30})
    for layer in session.cache.compressed_layers:
        assert layer.evidence.nbytes == 0


@pytest.mark.parametrize("name", ["snapkv", "h2o"])
def test_eviction_between_chunks_carries_the_evidence_on(name):
    """A budget that never binds before the last chunk gives the set of a prefill in one piece."""
    model = tiny("llama", torch.float64)
    budget = {"kind": "tokens", "value": 44}
    law = {"kind": "tail", "window": 24} if name == "snapkv" else {"kind": "all"}
    ids, _ = prompts(1, 56)
    sets = []
    for schedule, chunk in (("end_of_prefill", None), ("per_prefill_chunk", 12)):
        contract = small(name, budget=budget, query_law=law, schedule={"kind": schedule})
        options = {} if chunk is None else {"prefill_chunk_size": chunk}
        with kvpress.compress(model, contract) as session:
            model.generate(input_ids=ids, **{**GREEDY, "max_new_tokens": 1}, **options)
        sets.append(session.cache.report().to_dict()["layers"][0])
        sets[-1]["kept"] = kept(session)[0]
    # the cut at 48 tokens drops four of them before the last queries have spoken; the rest must agree
    common = [len(set(a) & set(b)) for a, b in zip(sets[0]["kept"], sets[1]["kept"], strict=True)]
    assert min(common) >= 40


def test_eta_proj_is_measured_with_an_accepted_query():
    """After a rejected draft the newest query is the last accepted one."""
    model = tiny("llama")
    contract = small("snapkv", schedule={"kind": "every_decode_steps", "n": 50})
    with torch.no_grad(), kvpress.CompressedCache(model, contract) as cache:
        model(input_ids=prompts(1, 64)[0], past_key_values=cache)
        model(input_ids=prompts(1, 5)[0], past_key_values=cache)
        cache.crop(-3)
        for layer in cache.compressed_layers:
            assert int(layer.evidence.last[1][-1]) == 65 == layer.seen - 1
            assert all(int(columns.max()) <= 65 for _, columns in layer.evidence.queries)
