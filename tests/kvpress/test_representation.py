"""Tokens stored in fewer dimensions or in eight bits: the engine against attention over full-size keys and values made from them."""

import math

import pytest
import torch
from matryoshka_support import HEAD_DIM, bases_of, small_model, some_windows
from torch.utils._python_dispatch import TorchDispatchMode

import kvpress
from kvpress.cache import FanOut, join
from kvpress.cache.packed import PackedStore
from kvpress.cache.projected import ProjectedStore
from kvpress.contract import resolve
from kvpress.errors import ContractError, InputError, KvpressError
from kvpress.evidence import HeadGroup, LayerSpec, Queries, UnitFeatures
from kvpress.matryoshka.bases import Bases, Ranks
from kvpress.matryoshka.checkpoint import (
    Header,
    ModelId,
    Projection,
    RankTable,
    save_projection,
)
from kvpress.matryoshka.layer_projection import LayerProjection
from kvpress.matryoshka.passing import attached, read_window
from kvpress_kernels.reference.int8 import dequantise, quantise

RANKS = Ranks(((8, 32), (24, 16)), ((16, 8), (32, 24)))
SHARE = RANKS.share([(2, 32, 32)] * 2)


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    """A projection of the small model with one searched table."""
    model = small_model()
    table = RankTable(share=SHARE, method="by hand", keys=RANKS.keys, values=RANKS.values)
    identity = ModelId.of(model, "small")
    header = Header(model=identity, layers=(0, 1), tables=(table,))
    path = tmp_path_factory.mktemp("projection") / "p.safetensors"
    save_projection(path, Projection(header=header, bases=bases_of(model)))
    return path


def stored_bases(file):
    """The bases as the file holds them."""
    from kvpress.matryoshka.checkpoint import load_projection

    return load_projection(file).bases


def contract(file, budget=1.0, base="snapkv", **changes):
    fields = {"kind": "orthogonal", "file": str(file), "share": SHARE, "ranks": "searched", **changes}
    return resolve(base, budget).swap(representation=fields)


def decoded_from(model, bases, ranks, ids, n_prompt, change=lambda keys, values: (keys, values)):
    """Logits of all tokens where queries behind the prompt see K U_r U_r^T and V W_r W_r^T + the lost mean, made at full size."""

    def attend(place, query, keys, values, own, spec):
        output = own(query, keys, values)
        n = query.shape[2]
        causal = torch.ones(n, n).tril().bool()[n_prompt:]
        for head in range(query.shape[1]):
            kv = head // spec.group
            u, w = (m[place][kv].double() for m in (bases.keys, bases.values))
            u, w = u[:, : ranks.keys[place][kv]], w[:, : ranks.values[place][kv]]
            k, v = change(keys[:, kv] @ u, values[:, kv] @ w)
            value = v @ w.T + (torch.eye(HEAD_DIM) - w @ w.T) @ bases.means[place][kv].double()
            logits = query[:, head, n_prompt:] @ (k @ u.T).transpose(1, 2) * spec.scale
            output[:, n_prompt:, head] = logits.masked_fill(~causal, -math.inf).softmax(-1) @ value
        return output

    with torch.no_grad(), attached(model):
        return read_window(model, ids, attend)


@pytest.mark.parametrize("n_new", [1, 3])
def test_decoding_is_attention_over_what_is_brought_back(file, store, n_new):
    model, ids, n_prompt = small_model(), some_windows(2, 30), 24
    expected = decoded_from(model, stored_bases(file), RANKS, ids, n_prompt)
    with torch.no_grad(), kvpress.CompressedCache(model, contract(file)) as cache:
        found = [model(ids[:, :n_prompt], past_key_values=cache).logits]
        for at in range(n_prompt, 30, n_new):
            found.append(model(ids[:, at : at + n_new], past_key_values=cache).logits)
        torch.testing.assert_close(torch.cat(found, 1), expected, rtol=1e-6, atol=1e-6)
        lengths = [length for layer in cache.compressed_layers for length in layer.storage.store.lengths]
        assert lengths == [30] * 8  # every token once


def test_full_ranks_give_the_tokens_of_the_full_cache(file, store):
    model, ids = small_model(), some_windows(2, 20)
    plain = model.generate(ids, max_new_tokens=12, do_sample=False)
    with kvpress.compress(model, contract(file, share=1.0, ranks="uniform")):
        found = model.generate(ids, max_new_tokens=12, do_sample=False)
    assert torch.equal(found, plain)


@pytest.mark.parametrize("int8", [False, True])
def test_bytes_are_those_of_the_ranks(file, int8):
    """Heads keep their own ranks: nothing is padded to the largest of a layer."""
    model, ids = small_model(), some_windows(2, 100)
    with torch.no_grad(), kvpress.CompressedCache(model, contract(file, 0.5, int8=int8)) as cache:
        model(ids, past_key_values=cache)
        kept = 50
        size, scales = (1, 4) if int8 else (8, 0)
        numbers = sum(k + v for layer in range(2) for k, v in zip(RANKS.keys[layer], RANKS.values[layer], strict=True))
        formula = 2 * kept * (numbers * size + 4 * scales + 4 * 4)
        stores = [layer.storage.store for layer in cache.compressed_layers]
        assert sum(store.nbytes for store in stores) == formula
        report = cache.report().to_dict()
        assert sum(head["bytes_after"] for layer in report["layers"] for head in layer["heads"]) == formula
        assert report["full_bytes"] == 2 * 100 * 4 * 64 * 8
        assert cache.nbytes == formula


def test_int8_alone(store):
    model, ids, n_prompt = small_model(), some_windows(2, 30), 24
    whole = resolve("full").swap(representation="int8")

    def rounded(*tensors):
        return tuple(dequantise(*quantise(tensor), torch.float64) for tensor in tensors)

    eye = tuple(torch.eye(HEAD_DIM).expand(2, -1, -1) for _ in range(2))
    zeros = tuple(torch.zeros(2, HEAD_DIM) for _ in range(2))
    bases, ranks = Bases((0, 1), eye, eye, zeros), Ranks.full([(2, 32, 32)] * 2)
    expected = decoded_from(model, bases, ranks, ids, n_prompt, rounded)
    with torch.no_grad(), kvpress.CompressedCache(model, whole) as cache:
        found = [model(ids[:, :n_prompt], past_key_values=cache).logits]
        found += [model(ids[:, at : at + 2], past_key_values=cache).logits for at in range(n_prompt, 30, 2)]
        torch.testing.assert_close(torch.cat(found, 1), expected, rtol=1e-8, atol=1e-8)
        assert cache.compressed_layers[0].storage.store.token_bytes == 2 * HEAD_DIM + 4 + 4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_smaller_dtype(file, dtype):
    model, ids, n_prompt = small_model(), some_windows(1, 30), 24
    name = str(dtype).removeprefix("torch.")

    def rounded(*tensors):
        return tuple(tensor.to(dtype).double() for tensor in tensors)

    expected = decoded_from(model, stored_bases(file), RANKS, ids, n_prompt, rounded)
    with torch.no_grad(), kvpress.CompressedCache(model, contract(file, dtype=name)) as cache:
        found = [model(ids[:, :n_prompt], past_key_values=cache).logits]
        found += [model(ids[:, at : at + 1], past_key_values=cache).logits for at in range(n_prompt, 30)]
        torch.testing.assert_close(torch.cat(found, 1), expected, rtol=1e-6, atol=1e-6)
    plain = resolve("snapkv", 0.5).swap(representation={"kind": "model", "dtype": name})
    with torch.no_grad(), kvpress.CompressedCache(model, plain) as cache:
        model(some_windows(1, 80), past_key_values=cache)
        assert sum(layer.storage.nbytes for layer in cache.compressed_layers) == 40 * 4 * (64 * 2 + 4)


def test_rank_times_int8(file, store):
    model, ids, n_prompt = small_model(), some_windows(1, 30), 24

    def rounded(*tensors):
        return tuple(dequantise(*quantise(tensor), torch.float64) for tensor in tensors)

    expected = decoded_from(model, stored_bases(file), RANKS, ids, n_prompt, rounded)
    with torch.no_grad(), kvpress.CompressedCache(model, contract(file, int8=True)) as cache:
        found = [model(ids[:, :n_prompt], past_key_values=cache).logits]
        found += [model(ids[:, at : at + 1], past_key_values=cache).logits for at in range(n_prompt, 30)]
        torch.testing.assert_close(torch.cat(found, 1), expected, rtol=1e-6, atol=1e-6)


class LargestTensor(TorchDispatchMode):
    """The most numbers in any tensor that an op has made, views left out."""

    def __init__(self):
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        for tensor in found if isinstance(found, tuple | list) else [found]:
            if isinstance(tensor, torch.Tensor) and not tensor._is_view():
                self.numel = max(self.numel, tensor.numel())
        return found


def test_nothing_of_full_size_exists_while_decoding(file):
    """One head's keys at full width would be 3,000 x 32 numbers; a layer of the store holds less than that for both heads."""
    model = small_model(max_position_embeddings=4096)
    ids, n = some_windows(1, 3001), 3000
    with torch.no_grad(), kvpress.CompressedCache(model, contract(file, share=0.25, ranks="uniform")) as cache:
        model(ids[:, :n], past_key_values=cache)
        model(ids[:, n:], past_key_values=cache)  # makes room for more
        with LargestTensor() as seen:
            model(ids[:, :1], past_key_values=cache)
    assert n * 8 <= seen.numel < n * HEAD_DIM  # weights of the attention: 4 query heads a KV head


def test_evidence_in_the_reduced_space_is_that_of_what_is_brought_back():
    generator = torch.Generator().manual_seed(3)

    def drawn(*shape):
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    n, group, dim = 40, 3, 16
    keys, values, vectors, weight = (
        drawn(2, n, dim) * 2,
        drawn(2, n, dim),
        drawn(2, group, 5, dim),
        drawn(2, group, dim, 24),
    )
    u, w = (torch.linalg.qr(drawn(2, dim, dim)).Q[:, :, :8] for _ in range(2))
    at = torch.arange(n)
    queries = Queries(vectors, torch.arange(n - 5, n), torch.ones(5, dtype=torch.float64))
    spec = LayerSpec(0, group, 0.3, output_weight=weight)
    reduced = UnitFeatures(spec, [HeadGroup(keys @ u, values @ w, at, (u, w))], 4)
    full = UnitFeatures(spec, [HeadGroup(keys @ u @ u.transpose(1, 2), values @ w @ w.transpose(1, 2), at)], 4)
    names = ["mass", "change@0", "change@1"]
    for in_output_space in (False, True):
        found = reduced.statistics(queries, names, "sum", in_output_space)
        wanted = full.statistics(queries, names, "sum", in_output_space)
        for name in names:
            torch.testing.assert_close(found[name], wanted[name])
    torch.testing.assert_close(reduced.output_norm(1), full.output_norm(1))
    for order in (1, 2):
        torch.testing.assert_close(reduced.value_norm(order), full.value_norm(order))
    kept = torch.arange(0, n, 2)
    last = Queries(vectors[:, :, -1:], queries.positions[-1:], queries.weights[-1:])
    for head in range(2):
        for a, b in zip(reduced.loss(head, last, kept), full.loss(head, last, kept), strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("base", ["snapkv", "mii", "h2o", "adakv", "tova", "criticalkv", "streaming_llm"])
def test_every_selector_composes(file, store, base):
    model, ids = small_model(), some_windows(2, 100)
    chosen = contract(file, 0.5, base)
    with kvpress.compress(model, chosen) as session:
        found = model.generate(ids, max_new_tokens=8, do_sample=False)
    assert found.shape == (2, 108)
    plain = resolve(base, 0.5)
    with torch.no_grad(), kvpress.CompressedCache(model, plain) as one, kvpress.CompressedCache(model, chosen) as two:
        model(ids, past_key_values=one)
        model(ids, past_key_values=two)
        for a, b in zip(one.compressed_layers, two.compressed_layers, strict=True):
            assert a.storage.store.lengths == b.storage.store.lengths
            for index in range(4):  # the same tokens of the prompt, whatever they are stored in
                assert torch.equal(a.storage.store.segment(index)[2], b.storage.store.segment(index)[2])
    assert session.report() is not None


def every_fourth_step(chosen):
    return chosen.swap(schedule={"kind": "every_decode_steps", "n": 4})


def test_eviction_while_decoding_reads_the_reduced_space(file, store):
    """At full ranks the reduced space is the full one turned round: tokens and kept sets are those without a projection. Below, every head
    keeps to its budget."""
    model, ids = small_model(), some_windows(1, 100)

    def generated(chosen):
        with torch.no_grad(), kvpress.CompressedCache(model, every_fourth_step(chosen)) as cache:
            found = model.generate(ids, past_key_values=cache, max_new_tokens=16, do_sample=False)
            segments = [s for layer in cache.compressed_layers for s in layer.storage.store.segments()]
            return found.tolist(), [positions.tolist() for _, _, positions in segments]

    plain = generated(resolve("snapkv", 0.5))
    assert generated(contract(file, 0.5, share=1.0, ranks="uniform")) == plain
    _, kept = generated(contract(file, 0.5))
    assert all(50 <= len(positions) <= 54 for positions in kept)
    assert all(positions[-1] == 114 for positions in kept), "the newest token that was read is there"
    assert kept != plain[1], "what is lost below full ranks shows in the evidence"


def in_turns(model, ids, chosen):
    """Tokens by beams, and of a second turn on one cache."""
    with kvpress.compress(model, chosen):
        beams = model.generate(ids, max_new_tokens=6, num_beams=3, do_sample=False)
    with torch.no_grad(), kvpress.CompressedCache(model, chosen) as cache:
        first = model.generate(ids, past_key_values=cache, max_new_tokens=4, do_sample=False)
        longer = torch.cat([first, some_windows(2, 10, seed=4)[: len(ids)]], 1)
        second = model.generate(longer, past_key_values=cache, max_new_tokens=4, do_sample=False)
    return beams.tolist(), second.tolist()


def test_beams_rows_and_second_turns(file, store):
    """At full ranks the tokens are those without a projection; with ranks of their own, rows say in a batch what they say alone."""
    model, ids = small_model(), some_windows(2, 80)
    plain = in_turns(model, ids, resolve("snapkv", 0.5))
    assert in_turns(model, ids, contract(file, 0.5, share=1.0, ranks="uniform")) == plain
    beams, second = in_turns(model, ids, contract(file, 0.5))
    assert len(beams[0]) == 86
    assert len(second[0]) == 98
    alone = in_turns(model, ids[:1], contract(file, 0.5))
    assert (beams[:1], second[:1]) == alone


def test_a_store_over_buckets_is_one_store(file):
    """Segments, rows and lengths of a ragged store with ragged ranks against a plain one per head."""
    projection = LayerProjection.of(stored_bases(file), RANKS, 0)
    keys, values = torch.randn(3, 2, 20, 32), torch.randn(3, 2, 20, 32)
    kept = [torch.arange(index, 20, 2) for index in range(6)]

    def make(k, v, columns):
        return PackedStore(k, v, columns)

    store = ProjectedStore(keys, values, kept, projection, make)
    plain = PackedStore(keys, values, kept)
    columns = torch.tensor([20, 21])
    new = torch.randn(3, 2, 2, 32), torch.randn(3, 2, 2, 32)
    for one in (store, plain):
        one.append(*new, columns)
        one.keep([torch.arange(1, n) for n in one.lengths])
        one.select_rows([2, 0, 0])
        one.truncate(21)
    assert store.lengths == plain.lengths
    assert store.n_rows == 3
    assert store.stored_before(10) == plain.stored_before(10)
    for index in range(6):
        head = index % 2
        (k, v, at), (full_k, full_v, full_at) = store.segment(index), plain.segment(index)
        assert torch.equal(at, full_at)
        bases = store.bases(index)
        assert k.shape[1] == RANKS.keys[0][head]
        torch.testing.assert_close(k, full_k @ bases[0][0])
        torch.testing.assert_close(v, full_v @ bases[1][0])
    joined = ProjectedStore.joined([store, store])
    assert joined.lengths == store.lengths * 2
    assert joined.row_bytes(4) == store.row_bytes(1)


def test_rows_of_different_formats_decode_in_one_batch(file, store):
    model, ids = small_model(), some_windows(1, 80)
    arms = [resolve("full"), contract(file, 0.5), contract(file, 0.6), resolve("snapkv", 0.5)]
    arms[1:1] = [resolve("snapkv", 0.5).swap(representation="int8"), contract(file, 0.5, int8=True)]
    with torch.no_grad():
        caches = [kvpress.CompressedCache(model, arm) for arm in arms]
        first = model(ids, past_key_values=FanOut(caches)).logits[:, -1].argmax(-1)
        batch = join(caches)
        new = torch.cat([first.expand(len(arms))[:, None], some_windows(len(arms), 4, seed=9)], 1)
        together = [model(new[:, :1], past_key_values=batch).logits, model(new[:, 1:4], past_key_values=batch).logits]
        rows = [0, 2, 3]
        batch.batch_select_indices(torch.tensor(rows))
        last = model(new[rows, 4:], past_key_values=batch).logits
        for row, cache in enumerate(caches):
            cache.freeze()
            alone = [model(new[row : row + 1, :1], past_key_values=cache).logits]
            alone.append(model(new[row : row + 1, 1:4], past_key_values=cache).logits)
            for a, b in zip(alone, together, strict=True):
                torch.testing.assert_close(b[row : row + 1], a)
            if row in rows:
                alone_last = model(new[row : row + 1, 4:], past_key_values=cache).logits
                torch.testing.assert_close(last[rows.index(row)][None], alone_last)
                own = [layer.storage.store for layer in cache.compressed_layers]
                joined = [layer.storage.store for layer in batch.compressed_layers]
                at = rows.index(row)
                assert [store.row_bytes(0) for store in own] == [store.row_bytes(at) for store in joined]
        with pytest.raises(KvpressError, match="can be dropped, but not repeated or reordered"):
            batch.batch_select_indices(torch.tensor([1, 0]))
        for cache in [*caches, batch]:
            cache.close()


def test_the_id_of_a_contract_is_that_of_the_file(file, tmp_path):
    other = tmp_path / "elsewhere.safetensors"
    other.write_bytes(file.read_bytes())
    fields = {"kind": "orthogonal", "share": 0.5}
    one, two = (resolve({"representation": {**fields, "file": str(path)}}) for path in (file, other))
    assert one.id == two.id
    assert one.representation.sha256
    assert resolve(one).id == one.id
    assert resolve({"representation": {**fields, "file": str(file), "share": 0.25}}).id != one.id


def test_a_projection_that_is_not_the_contracts(file, tmp_path):
    model = small_model()
    path = tmp_path / "p.safetensors"
    path.write_bytes(file.read_bytes())
    chosen = contract(path)
    chosen = resolve(chosen)
    save_projection(
        path,
        Projection(
            header=Header(model=ModelId(name="x", fingerprint="", sample=()), layers=(0, 1)), bases=bases_of(model)
        ),
    )
    with pytest.raises(ContractError, match="has changed since the contract was made"):
        kvpress.CompressedCache(model, chosen)
    with pytest.raises(InputError, match="was made for 'x', and this model has other weights"):
        kvpress.CompressedCache(model, contract(path, share=0.5, ranks="uniform"))
    with pytest.raises(ContractError, match=r"projection '/nowhere' cannot be read"):
        resolve(contract("/nowhere"))
    with pytest.raises(InputError, match=r"no searched ranks for a share of 0\.5"):
        kvpress.CompressedCache(model, contract(file, share=0.5))
    with pytest.raises(InputError, match=r"0\.3 of 32 dimensions is no rank"):
        kvpress.CompressedCache(model, contract(file, share=0.3, ranks="uniform"))


def test_bytes_cannot_be_promised_where_ranks_and_lengths_differ(file):
    model, ids = small_model(), some_windows(1, 200)
    refused = pytest.raises(ContractError, match="a budget in bytes cannot be kept where heads have ranks of their own")
    with torch.no_grad(), kvpress.CompressedCache(model, contract(file, "50000B", "adakv")) as cache, refused:
        model(ids, past_key_values=cache)
    equal = contract(file, "90000B", "adakv", share=0.5, ranks="uniform")
    with torch.no_grad(), kvpress.CompressedCache(model, equal) as cache:
        model(ids, past_key_values=cache)
        assert sum(layer.storage.nbytes for layer in cache.compressed_layers) <= 90_000


def test_bytes_budgets_count_what_is_stored(file):
    model, ids = small_model(), some_windows(1, 200)
    budget = 50_000
    for chosen in (contract(file, f"{budget}B"), resolve("snapkv", f"{budget}B").swap(representation="int8")):
        with torch.no_grad(), kvpress.CompressedCache(model, chosen) as cache:
            model(ids, past_key_values=cache)
            assert 0.95 * budget < sum(layer.storage.nbytes for layer in cache.compressed_layers) <= budget
            lengths = {n for layer in cache.compressed_layers for n in layer.storage.store.lengths}
            assert len(lengths) == 1  # whatever their ranks, heads keep equally many tokens
