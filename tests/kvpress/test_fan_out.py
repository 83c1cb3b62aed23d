"""One prefill for several contracts: every arm keeps and says what it would alone, and a joint batch decodes them all."""

import copy
import time

import pytest
import torch
from generation_support import small
from tiny_models import CONFIGS, VOCABULARY, tiny

import kvpress
from kvpress.cache import CompressedCache, FanOut, join
from kvpress.errors import ContractError, KvpressError
from kvpress.evidence import UnitFeatures

ARMS = (
    "full",
    "snapkv",
    "h2o",
    "adakv",
    "kvzip",
    "mii",
    "criticalkv",
    "laprox",
    "oracle_mass",
    "streaming_llm",
    "random",
)
N_NEW = 8


def prompt(n=60, seed=0):
    return torch.randint(3, VOCABULARY, (1, n), generator=torch.Generator().manual_seed(seed))


REFERENCE = prompt(5, seed=9)


def contract(name):
    return kvpress.Contract.load("full") if name == "full" else small(name)


def caches(model, names, **options):
    return [CompressedCache(model, contract(n), reference=REFERENCE, **options) for n in names]


def kept(cache):
    return [[p.tolist() for _, _, p in layer.storage.store.segments()] for layer in cache.compressed_layers]


def alone(model, ids, name):
    """Kept sets and greedy tokens of one contract by itself."""
    with kvpress.compress(model, contract(name), reference=REFERENCE) as session, torch.no_grad():
        out = model.generate(ids, max_new_tokens=N_NEW, do_sample=False)
        cache = session.new_cache()
        model(ids, past_key_values=cache, use_cache=True)
    return kept(cache), out[0, ids.shape[1] :].tolist()


def shared(model, ids, arms, chunk=None):
    """Read the prompt once for all arms; the logits behind it."""
    fan = FanOut(arms)
    fan.begin_prompt(ids.shape[1])
    with torch.no_grad():
        for part in ids.split(chunk or ids.shape[1], 1):
            logits = model(part, past_key_values=fan).logits[:, -1]
    return logits


def decode(model, cache, first, n):
    tokens = [first]
    with torch.no_grad():
        for _ in range(n - 1):
            tokens.append(model(tokens[-1], past_key_values=cache).logits[:, -1].argmax(-1, keepdim=True))
    return torch.cat(tokens, 1)


@pytest.mark.parametrize(
    "family", [family for family in sorted(CONFIGS) if family != "mistral"]
)  # all of its layers slide
def test_every_arm_keeps_and_says_what_it_does_alone(family, store):
    model, ids = tiny(family), prompt()
    arms = caches(model, ARMS)
    first = shared(model, ids, arms).argmax(-1, keepdim=True)
    with join(arms) as batch:
        told = decode(model, batch, first.expand(len(ARMS), 1), N_NEW)
    for row, name in enumerate(ARMS):
        sets, tokens = alone(model, ids, name)
        assert kept(arms[row]) == sets, name
        assert told[row].tolist() == tokens, name


@pytest.mark.parametrize("chunk", [7, 32])
def test_a_prompt_in_chunks_gives_the_same(chunk, store):
    model, ids = tiny("llama"), prompt()
    whole, parts = caches(model, ARMS), caches(model, ARMS)
    shared(model, ids, whole)
    shared(model, ids, parts, chunk)
    assert [kept(cache) for cache in whole] == [kept(cache) for cache in parts]


def test_the_prompt_is_attended_once(monkeypatch):
    model, ids = tiny("llama"), prompt()
    calls = []
    real = torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(
        torch.nn.functional, "scaled_dot_product_attention", lambda *a, **k: calls.append(1) or real(*a, **k)
    )
    arms = caches(model, ("full", "snapkv", "mii", "h2o"))
    shared(model, ids, arms)
    assert len(calls) == model.config.num_hidden_layers


def test_dense_keys_exist_once_while_arms_wait():
    model, ids = tiny("llama"), prompt()
    arms = caches(model, ("kvzip", "kvzip", "full"))
    fan = FanOut(arms)
    fan.begin_prompt(ids.shape[1] + 1)
    with torch.no_grad():
        model(ids, past_key_values=fan)
    for layers in zip(*(arm.compressed_layers for arm in arms), strict=True):
        assert len({layer.storage.dense[0].data_ptr() for layer in layers}) == 1


def test_a_question_behind_joined_contexts(store):
    # query-agnostic: the context is cut before the question is known, the question is stored in full
    model, context, question = tiny("llama"), prompt(48), prompt(9, seed=3)
    names = ("full", "snapkv", "kvzip", "streaming_llm")
    arms = caches(model, names)
    shared(model, context, arms)
    with join(arms) as batch, torch.no_grad():
        logits = model(question.expand(len(names), -1), past_key_values=batch).logits[:, -1]
        told = decode(model, batch, logits.argmax(-1, keepdim=True), N_NEW)
    for row, name in enumerate(names):
        cache = CompressedCache(model, contract(name))
        with cache, torch.no_grad():
            model(context, past_key_values=cache)
            cache.freeze()
            whole = torch.cat([context, question], 1)
            out = model.generate(whole, past_key_values=cache, max_new_tokens=N_NEW, do_sample=False)
        assert told[row].tolist() == out[0, whole.shape[1] :].tolist(), name


def test_joining_twice_leaves_the_arms_alone(store):
    model, ids = tiny("llama"), prompt()
    arms = caches(model, ("full", "snapkv"))
    first = shared(model, ids, arms).argmax(-1, keepdim=True).expand(2, 1)
    before = [kept(arm) for arm in arms]
    with join(arms) as batch:
        once = decode(model, batch, first, N_NEW)
    with join(arms) as batch:
        again = decode(model, batch, first, N_NEW)
    assert once.tolist() == again.tolist()
    assert [kept(arm) for arm in arms] == before


def test_rows_that_are_done_leave_the_batch(store):
    model, ids = tiny("llama"), prompt()
    arms = caches(model, ("full", "snapkv", "mii"))
    first = shared(model, ids, arms).argmax(-1, keepdim=True).expand(3, 1)
    with join(arms) as batch:
        whole = decode(model, batch, first, N_NEW)
    with join(arms) as batch:
        start = decode(model, batch, first, 4)
        batch.batch_select_indices(torch.tensor([0, 2]))
        rest = decode(model, batch, start[[0, 2], -1:], N_NEW - 3)
    assert torch.cat([start[[0, 2], :-1], rest], 1).tolist() == whole[[0, 2]].tolist()


def test_pages_come_back_when_the_batch_is_gone(store):
    model, ids = tiny("llama"), prompt()
    arms = caches(model, ("full", "snapkv"))
    first = shared(model, ids, arms).argmax(-1, keepdim=True).expand(2, 1)
    pages = [sum(layer.nbytes for layer in arm.compressed_layers) for arm in arms]
    batch = join(arms)
    decode(model, batch, first, N_NEW)
    batch.close()
    del batch
    # a shared page is copied before it is written, so the arms have neither moved nor grown
    assert [sum(layer.nbytes for layer in arm.compressed_layers) for arm in arms] == pages
    owned = [layer.storage.store for arm in arms for layer in arm.compressed_layers]
    for pool in arms[0].plan.pools.values():
        assert (pool.n_pages - pool.n_free) * pool.layout.nbytes == sum(each.table.page_bytes for each in owned)


def test_seconds_are_booked_once():
    model, ids = tiny("llama"), prompt()
    arms = caches(model, ("snapkv", "kvzip"))
    fan = FanOut(arms)
    with torch.no_grad():
        model(ids, past_key_values=fan)
    assert fan.prefill_seconds > 0
    assert all(arm.plan.clock.evidence > 0 and arm.plan.clock.prefill == 0 for arm in arms)


def test_refusals():
    model, ids = tiny("llama"), prompt()
    per_chunk = contract("snapkv").swap(schedule={"kind": "per_prefill_chunk"})
    with pytest.raises(ContractError, match="prefill of its own"):
        FanOut([CompressedCache(model, per_chunk)])
    late = contract("snapkv").swap(schedule={"kind": "every_decode_steps", "n": 2})
    arms = [CompressedCache(model, "full"), CompressedCache(model, late)]
    with pytest.raises(KvpressError, match="one length"):
        join(arms[:1])
    shared(model, ids, arms)
    with pytest.raises(ContractError, match="evicts while decoding"):
        join(arms)
    with pytest.raises(KvpressError, match="have read nothing"):
        FanOut(arms)
    fan = FanOut([CompressedCache(model, "full")])
    with torch.no_grad():
        model(ids, past_key_values=fan)
        with pytest.raises(KvpressError, match="only reads the prompt"):
            model(ids[:, :1], past_key_values=fan)


def test_an_arm_that_evicts_while_decoding_goes_on_alone():
    model, ids = tiny("llama"), prompt()
    late = contract("snapkv").swap(schedule={"kind": "every_decode_steps", "n": 3})
    arms = [CompressedCache(model, "full"), CompressedCache(model, late)]
    first = shared(model, ids, arms).argmax(-1, keepdim=True)
    told = decode(model, copy.copy(arms[1]), first, N_NEW)
    with kvpress.compress(model, late), torch.no_grad():
        out = model.generate(ids, max_new_tokens=N_NEW, do_sample=False)
    assert told[0].tolist() == out[0, ids.shape[1] :].tolist()


SNAPKV_FAMILY = ("snapkv", "mii", "nolev", "vatp")  # one query law; rankings that read mass, or mass and output change


@pytest.mark.parametrize("chunk", [None, 17])
def test_arms_with_the_same_evidence_read_the_keys_once(monkeypatch, chunk):
    model, ids = tiny("llama"), prompt()
    asked = []
    real = UnitFeatures.read_statistics
    monkeypatch.setattr(
        UnitFeatures,
        "read_statistics",
        lambda self, q, names, *a: asked.append(sorted(names)) or real(self, q, names, *a),
    )
    arms = caches(model, [*SNAPKV_FAMILY, "h2o", "h2o_debiased"])
    shared(model, ids, arms, chunk)
    n_layers, n_parts = model.config.num_hidden_layers, len(ids.split(chunk or 60, 1))
    assert asked.count(["change@0", "change@1", "mass"]) == n_layers, "one window, for all rankings"
    assert asked.count(["mass"]) == n_layers * n_parts, "h2o and h2o_debiased read the same sums, chunk by chunk"
    assert len(asked) == n_layers * (1 + n_parts)


def test_what_is_shared_is_booked_to_each_arm_and_to_the_prefill_never():
    model, ids = tiny("llama"), prompt()
    arms = caches(model, ["snapkv", "mii"])
    fan = FanOut(arms)
    (one,) = fan._shared
    real = UnitFeatures.read_statistics

    def slow(*args):
        time.sleep(0.02)
        return real(*args)

    with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(UnitFeatures, "read_statistics", slow)
        start = time.perf_counter()
        model(ids, past_key_values=fan)
        spent = time.perf_counter() - start
    least = 0.02 * model.config.num_hidden_layers
    assert all(arm.plan.clock.evidence >= least for arm in arms)
    assert one.repeated >= least
    booked = fan.prefill_seconds + sum(arm.plan.clock.evidence + arm.plan.clock.eviction for arm in arms)
    assert booked - one.repeated <= spent
    assert fan.prefill_seconds <= spent - least


def test_nothing_is_shared_behind_the_prompt_or_kept_beside_it():
    model, ids = tiny("llama"), prompt()
    arms = caches(model, SNAPKV_FAMILY)
    fan = FanOut(arms)
    assert all(arm.plan.shared is fan._shared[0] for arm in arms)
    with torch.no_grad():
        model(ids, past_key_values=fan)
    assert all(arm.plan.shared is None for arm in arms)
    assert not fan._shared[0]._known
