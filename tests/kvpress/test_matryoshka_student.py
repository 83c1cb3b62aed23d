"""Attention in the reduced space against attention on keys and values that were projected and brought back."""

import math

import pytest
import torch
from matryoshka_support import HEAD_DIM, bases_of, exact, small_model, some_windows
from tiny_models import CONFIGS, tiny
from torch.nn import functional as F

from kvpress.errors import InputError
from kvpress.matryoshka.bases import Bases, Ranks
from kvpress.matryoshka.distillation import distance
from kvpress.matryoshka.init import initial_bases
from kvpress.matryoshka.judge import judge_all
from kvpress.matryoshka.passing import attached, compressed_shapes, read_window
from kvpress.matryoshka.statistics import collect
from kvpress.matryoshka.student import attached_student, reduced_attention

SHAPES = [(2, HEAD_DIM, HEAD_DIM)] * 2


def brought_back(bases, ranks):
    """The definition: keys K U_r U_r^T and values W_r W_r^T v + (I - W_r W_r^T) mean of full size, one query head at a time."""

    def attend(place, query, keys, values, own, spec):
        rows, n_heads, n, dim = query.shape
        output = torch.zeros(rows, n, n_heads, dim, dtype=query.dtype)
        causal = torch.ones(n, n).tril().bool()
        for head in range(n_heads):
            kv = head // spec.group
            u = bases.keys[place][kv][:, : ranks.keys[place][kv]]
            w = bases.values[place][kv][:, : ranks.values[place][kv]]
            projector = w @ w.T
            value = values[:, kv] @ projector
            if bases.means is not None:
                value = value + bases.means[place][kv] @ (torch.eye(dim, dtype=w.dtype) - projector)
            logits = query[:, head] @ (keys[:, kv] @ u @ u.T).transpose(1, 2) * spec.scale
            output[:, :, head] = logits.masked_fill(~causal, -math.inf).softmax(-1) @ value
        return output

    return attend


RAGGED = Ranks(((8, 32), (24, 16)), ((16, 8), (32, 24)))


@pytest.mark.parametrize("with_means", [True, False])
@pytest.mark.parametrize("kind", ["pca", "random", "planes"])
def test_reduced_attention_is_attention_on_what_is_brought_back(kind, with_means):
    model = small_model()
    bases = bases_of(model, kind)
    if not with_means:
        bases = Bases(bases.layers, bases.keys, bases.values)
    ids = some_windows(2, 24)
    with torch.no_grad(), attached(model):
        found = read_window(model, ids, reduced_attention(bases, RAGGED))
        expected = read_window(model, ids, brought_back(bases, RAGGED))
        plain = model(ids).logits
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    assert (found - plain).abs().max() > 1e-3


@pytest.mark.parametrize("family", [name for name in CONFIGS if name != "mistral"])
def test_full_rank_is_the_model(family):
    """Mistral's layers all slide, so it has nothing to project."""
    model = tiny(family, torch.float32)
    layers, shapes = compressed_shapes(model)
    ids = some_windows(2, 20)
    moments = collect(model, ids.split(1))
    bases = initial_bases("random", layers, moments)
    if family == "gpt_oss":
        with torch.no_grad(), attached_student(model) as read, pytest.raises(InputError, match="learned sinks"):
            read(ids, bases, Ranks.full(shapes))
        bases = Bases(bases.layers, bases.keys, bases.values)
    with torch.no_grad(), attached_student(model) as read:
        found = read(ids, bases, Ranks.full(shapes))
        again = model(ids).logits
    scale = again.abs().max()
    torch.testing.assert_close(found / scale, again / scale, rtol=0, atol=1e-5)


def test_a_query_head_uses_the_basis_of_its_kv_head():
    """The published code keeps a basis, and a cache, for every query head."""
    model = small_model()
    bases = bases_of(model)
    ids = some_windows(1, 16)
    changed = tuple(keys.clone() for keys in bases.keys)
    changed[0][1] = bases_of(model, "random").keys[0][1]
    outputs = []

    def spy(attend):
        def watched(place, *args):
            output = attend(place, *args)
            if place == 0:
                outputs.append(output)
            return output

        return watched

    with torch.no_grad(), attached(model):
        for keys in (bases.keys, changed):
            other = Bases(bases.layers, keys, bases.values, bases.means)
            read_window(model, ids, spy(reduced_attention(other, RAGGED)))
    same = (outputs[0] - outputs[1]).abs().amax((0, 1, 3)) == 0
    # the second KV head keeps all 32 dimensions of its keys: its basis makes no difference beyond rounding
    assert same[:4].all()
    torch.testing.assert_close(outputs[0][:, :, 4:], outputs[1][:, :, 4:])
    lower = Ranks(((8, 16), (24, 16)), RAGGED.values)
    outputs.clear()
    with torch.no_grad(), attached(model):
        for keys in (bases.keys, changed):
            read_window(model, ids, spy(reduced_attention(Bases(bases.layers, keys, bases.values), lower)))
    moved = (outputs[0] - outputs[1]).abs().amax((0, 1, 3)) > 1e-6
    assert moved.tolist() == [False] * 4 + [True] * 4


def test_a_lower_rank_reads_a_prefix():
    """Changing columns behind the rank changes nothing."""
    model = small_model()
    bases, other = bases_of(model), bases_of(model, "random")
    ranks, ids = Ranks.uniform(SHAPES, 0.5), some_windows(1, 16)

    def mixed(mine, theirs):
        return tuple(torch.cat([a[..., :16], b[..., 16:]], -1) for a, b in zip(mine, theirs, strict=True))

    swapped = Bases(bases.layers, mixed(bases.keys, other.keys), mixed(bases.values, other.values), bases.means)
    with torch.no_grad(), attached_student(model) as read:
        torch.testing.assert_close(read(ids, swapped, ranks), read(ids, bases, ranks), rtol=0, atol=0)


def test_a_mean_of_the_keys_drops_out():
    """The published code stores (k - mean) U_r and adds q mean to the logits; the softmax is the same without."""
    model = small_model()
    bases = exact(bases_of(model))
    generator = torch.Generator().manual_seed(1)
    mean = torch.randn(2, HEAD_DIM, dtype=torch.float64, generator=generator) * 3

    def published(place, query, keys, values, own, spec):
        u = bases.keys[place][:, :, :16]
        logits = torch.einsum(
            "bhgqr,bhkr->bhgqk",
            query.unflatten(1, (2, spec.group)) @ u[:, None],
            (keys - mean[:, None]) @ u,
        )
        logits = logits + torch.einsum("bhgqd,hd->bhgq", query.unflatten(1, (2, spec.group)), mean)[..., None]
        n = query.shape[2]
        logits = (logits * spec.scale).masked_fill(~torch.ones(n, n).tril().bool(), -math.inf)
        w = bases.values[place][:, :, :24]
        reduced = torch.einsum("bhgqk,bhkr->bhgqr", logits.softmax(-1), (values - bases.means[place][:, None]) @ w)
        output = torch.einsum("bhgqr,hdr->bqhgd", reduced, w) + bases.means[place][:, None]
        return output.flatten(2, 3)

    ids, ranks = some_windows(1, 16), Ranks(((16, 16),) * 2, ((24, 24),) * 2)
    with torch.no_grad(), attached(model):
        torch.testing.assert_close(
            read_window(model, ids, reduced_attention(bases, ranks)), read_window(model, ids, published)
        )


def test_the_model_is_left_as_it_was():
    model = small_model()
    ids = some_windows(1, 12)
    before = model(ids).logits
    with torch.no_grad(), attached_student(model) as read:
        read(ids, bases_of(model), RAGGED)
        torch.testing.assert_close(model(ids).logits, before, rtol=0, atol=0)
    assert model.config._attn_implementation == "sdpa"
    torch.testing.assert_close(model(ids).logits, before, rtol=0, atol=0)


@pytest.mark.parametrize("chunk", [1, 700, 1 << 25])
def test_distance_is_the_definition(monkeypatch, chunk):
    monkeypatch.setattr("kvpress.matryoshka.distillation.CHUNK", chunk)
    teacher, student = torch.randn(2, 9, 50), torch.randn(2, 9, 50)
    ids = torch.randint(50, (2, 9))
    found = distance(teacher, student, ids)
    kl = F.kl_div(student.log_softmax(-1), teacher.log_softmax(-1), log_target=True, reduction="none").sum(-1)[:, :-1]
    entropy = F.cross_entropy(student[:, :-1].transpose(1, 2), ids[:, 1:], reduction="none")
    torch.testing.assert_close(found.kl, kl)
    torch.testing.assert_close(found.cross_entropy, entropy)
    torch.testing.assert_close(found.loss(0.25, 0.75), 0.25 * kl.mean() + 0.75 * entropy.mean())


def test_judging_is_per_window():
    model = small_model()
    bases, windows = bases_of(model), some_windows(3, 16)
    settings = [(bases, Ranks.full(SHAPES)), (bases, RAGGED)]
    found = judge_all(model, windows, settings, rows=2)
    single = judge_all(model, windows[2:], settings)
    torch.testing.assert_close(found[1].kl[2:], single[1].kl)
    torch.testing.assert_close(found[0].kl, torch.zeros(3), atol=1e-6, rtol=0)
    assert (found[1].kl > 0).all()
    with torch.no_grad():
        logits = model(windows).logits
    plain = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), windows[:, 1:].flatten())
    assert found[0].perplexity == pytest.approx(float(plain.exp()), rel=1e-5)
