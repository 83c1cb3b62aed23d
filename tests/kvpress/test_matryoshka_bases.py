"""Orthogonal matrices, their ranks, and where they come from."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from matryoshka_support import HEAD_DIM, bases_of, small_model, some_windows

from kvpress.errors import InputError
from kvpress.matryoshka.bases import Bases, Ranks, orthogonality_error
from kvpress.matryoshka.cayley import TrainableBases, cayley, special
from kvpress.matryoshka.init import KINDS, initial_bases
from kvpress.matryoshka.passing import compressed_shapes
from kvpress.matryoshka.statistics import Moments, collect, load_moments, save_moments

SHAPES = [(2, 32, 32), (2, 32, 64)]


@settings(max_examples=30, deadline=None)
@given(st.integers(2, 48), st.floats(0, 100), st.integers(0, 1000))
def test_the_cayley_map_is_orthogonal_with_determinant_one(dim, size, seed):
    free = torch.randn(3, dim, dim, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) * size
    found = cayley(free)
    assert orthogonality_error(found) < 1e-12
    torch.testing.assert_close(torch.linalg.det(found), torch.ones(3, dtype=torch.float64))
    assert orthogonality_error(cayley(free.float())) < 1e-6
    assert cayley(free.float()).dtype == torch.float32


def test_the_cayley_map_is_the_papers():
    free = torch.randn(8, 8, dtype=torch.float64)
    skew = free.tril(-1) - free.tril(-1).T
    eye = torch.eye(8, dtype=torch.float64)
    torch.testing.assert_close(cayley(free), (eye + skew / 2) @ torch.linalg.inv(eye - skew / 2))
    torch.testing.assert_close(cayley(torch.zeros(2, 4, 4)), torch.eye(4).expand(2, 4, 4))


def test_gradients_reach_the_free_numbers():
    free = torch.randn(2, 5, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(cayley, free)


def random_bases(seed=0):
    def drawn(heads, dim):
        return torch.linalg.qr(torch.randn(heads, dim, dim, generator=generator)).Q

    generator = torch.Generator().manual_seed(seed)
    keys, values = [drawn(2, 32) for _ in SHAPES], [drawn(2, shape[2]) for shape in SHAPES]
    return Bases((0, 2), tuple(keys), tuple(values), tuple(torch.randn(2, shape[2]) for shape in SHAPES))


def test_training_begins_at_the_given_bases_and_stays_orthogonal():
    start = random_bases()
    trained = TrainableBases(start)
    for mine, given_one in zip([*trained().keys, *trained().values], [*start.keys, *start.values], strict=True):
        signs = (mine * given_one).sum(1)
        torch.testing.assert_close(signs.abs(), torch.ones_like(signs))  # only whole columns are turned
        assert (signs[:, :-1] > 0).all()
        torch.testing.assert_close(torch.linalg.det(mine), torch.ones(2))
    for parameter in trained.keys:
        parameter.data.normal_(std=3)
    assert trained().orthogonality_error() < 1e-6
    assert trained().shapes == SHAPES


def test_special_turns_one_column():
    basis = torch.eye(4).repeat(2, 1, 1)
    basis[0, 0, 0] = -1
    found = special(basis)
    assert torch.linalg.det(found).tolist() == [1, 1]
    torch.testing.assert_close(found[0, :, :3], basis[0, :, :3])
    torch.testing.assert_close(found[1], basis[1])


def test_uniform_ranks_and_their_bytes():
    ranks = Ranks.uniform(SHAPES, 0.5)
    assert ranks.keys == ((16, 16), (16, 16))
    assert ranks.values == ((16, 16), (32, 32))
    assert ranks.total == 4 * 16 + 2 * 16 + 2 * 32
    assert ranks.share(SHAPES) == 0.5
    assert Ranks.full(SHAPES).share(SHAPES) == 1
    ranks.check(SHAPES)


@pytest.mark.parametrize(
    ("share", "sentence"),
    [
        (0.3, r"0.3 of 32 dimensions is no rank that is a multiple of 8: the nearest share is 0.25"),
        (1.5, r"the nearest share is 1"),
        (0.0, r"the nearest share is 0.25"),
    ],
)
def test_a_share_that_is_no_rank(share, sentence):
    with pytest.raises(InputError, match=sentence):
        Ranks.uniform(SHAPES, share)


@pytest.mark.parametrize(
    ("ranks", "sentence"),
    [
        (Ranks(((16,), (16, 16)), ((16, 16), (32, 32))), "the ranks of the keys are not one for each"),
        (Ranks(((16, 12), (16, 16)), ((16, 16), (32, 32))), "rank 12 of the keys in layer 0 is no multiple of 8"),
        (Ranks(((16, 16), (16, 16)), ((16, 16), (72, 32))), "rank 72 of the values in layer 1 .* from 8 to 64"),
        (Ranks(((16, 16), (16, 0)), ((16, 16), (32, 32))), "rank 0 of the keys in layer 1"),
    ],
)
def test_ranks_that_do_not_fit(ranks, sentence):
    with pytest.raises(InputError, match=sentence):
        ranks.check(SHAPES)


def test_moments_are_those_of_all_vectors():
    vectors = torch.randn(2, 50, 4, dtype=torch.float64) + 3
    moments = Moments()
    for part in vectors.split(13, dim=1):
        moments.add(part.float())
    single = vectors.float().double()
    for head in range(2):
        torch.testing.assert_close(moments.covariance[head], torch.cov(single[head].T, correction=0))
    torch.testing.assert_close(moments.mean, single.mean(1))


def test_moments_of_a_model_are_those_of_what_attention_reads():
    from transformers.models.llama import modeling_llama

    model = small_model()

    ids = some_windows(2, 20)
    moments = collect(model, [ids[:1], ids[1:]])
    real = modeling_llama.eager_attention_forward
    caught = []

    def spy(module, query, key, value, mask, **kwargs):
        output = real(module, query, key, value, mask, **kwargs)
        caught.append((query, key, value, output[0]))
        return output

    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    modeling_llama.eager_attention_forward = spy
    try:
        with torch.no_grad():
            model(ids)
    finally:
        modeling_llama.eager_attention_forward = real
        model.set_attn_implementation(before)
    for layer, (query, key, value, output) in zip(moments, caught, strict=True):
        for head in range(2):
            q = query[:, 4 * head : 4 * head + 4].reshape(-1, HEAD_DIM)
            o = output.transpose(1, 2)[:, 4 * head : 4 * head + 4].reshape(-1, HEAD_DIM)
            k, v = key[:, head].reshape(-1, HEAD_DIM), value[:, head].reshape(-1, HEAD_DIM)
            for found, vectors in ((layer.queries, q), (layer.keys, k), (layer.values, v), (layer.outputs, o)):
                torch.testing.assert_close(found.uncentred[head], vectors.T @ vectors / len(vectors))


def test_moments_come_back_from_their_file(tmp_path):
    moments = collect(small_model(), some_windows(2, 20).split(1))
    save_moments(tmp_path / "m.safetensors", moments, "made so")
    found = load_moments(tmp_path / "m.safetensors", "made so")
    for a, b in zip(moments, found, strict=True):
        for name in ("keys", "values", "queries", "outputs"):
            one, two = getattr(a, name), getattr(b, name)
            assert one.n == two.n
            assert torch.equal(one.first, two.first)
            assert torch.equal(one.second, two.second)
    assert load_moments(tmp_path / "m.safetensors", "made otherwise") is None
    assert load_moments(tmp_path / "none", "made so") is None
    content = (tmp_path / "m.safetensors").read_bytes()
    (tmp_path / "m.safetensors").write_bytes(content[:500])
    assert load_moments(tmp_path / "m.safetensors", "made so") is None


@pytest.mark.parametrize("kind", KINDS)
def test_every_start_is_orthogonal_and_repeatable(kind):
    model = small_model()
    layers, shapes = compressed_shapes(model)
    moments = collect(model, some_windows(4, 30).split(2))
    found = initial_bases(kind, layers, moments, seed=3)
    assert found.shapes == shapes == [(2, HEAD_DIM, HEAD_DIM)] * 2
    assert found.layers == (0, 1)
    assert found.orthogonality_error() < 1e-6
    again = initial_bases(kind, layers, moments, seed=3)
    assert all(torch.equal(a, b) for a, b in zip(found.keys, again.keys, strict=True))


def test_pca_keeps_most_of_the_variance():
    model = small_model()
    layers, _ = compressed_shapes(model)
    moments = collect(model, some_windows(4, 30).split(2))
    found = initial_bases("pca", layers, moments)
    for basis, layer in zip(found.keys, moments, strict=True):
        kept = (basis.double().transpose(1, 2) @ layer.keys.covariance @ basis.double()).diagonal(dim1=1, dim2=2)
        assert (kept.diff(dim=1) <= 1e-9).all()  # the largest first
        torch.testing.assert_close(kept.sum(1), layer.keys.covariance.diagonal(dim1=1, dim2=2).sum(1))


def test_planes_commute_with_the_rotation():
    basis = bases_of(small_model(), "planes").keys[0][0]
    half = HEAD_DIM // 2
    angles = torch.rand(half, dtype=torch.float64)
    rotation = torch.zeros(HEAD_DIM, HEAD_DIM, dtype=torch.float64)
    at = torch.arange(half)
    rotation[at, at] = rotation[at + half, at + half] = angles.cos()
    rotation[at, at + half], rotation[at + half, at] = -angles.sin(), angles.sin()
    for rank in range(2, HEAD_DIM + 1, 2):
        projector = basis[:, :rank] @ basis[:, :rank].T
        torch.testing.assert_close(projector @ rotation, rotation @ projector)


def test_without_means_the_mean_is_a_direction_of_the_values():
    model = small_model()
    layers, _ = compressed_shapes(model)
    moments = collect(model, some_windows(4, 30).split(2))
    for layer in moments:  # values far from zero, which hardly vary
        layer.values.first[:] = 100.0 * layer.values.n / HEAD_DIM**0.5
        layer.values.second[:] = layer.values.second + 100.0**2 * layer.values.n / HEAD_DIM
    direction = torch.full((HEAD_DIM,), HEAD_DIM**-0.5)
    found = initial_bases("pca", layers, moments, means=False)
    assert found.means is None
    for basis in found.values:
        assert ((basis[..., 0] @ direction).abs() > 0.99).all()
    assert initial_bases("pca", layers, moments).means is not None


def test_wrong_starts():
    model = small_model()
    layers, _ = compressed_shapes(model)
    moments = collect(model, some_windows(1, 10).split(1))
    with pytest.raises(InputError, match="unknown start of a projection 'pcb': did you mean 'pca'"):
        initial_bases("pcb", layers, moments)
    moments[1].keys.second[0, 0, 0] = torch.nan
    with pytest.raises(InputError, match="layer 1 gave numbers that are not finite"):
        initial_bases("pca", layers, moments)
