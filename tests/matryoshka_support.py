"""Small models with head dimensions that can be projected, and bases for them."""

import functools

import torch
from tiny_models import COMMON, VOCABULARY
from transformers import AutoModelForCausalLM
from transformers.models.llama.configuration_llama import LlamaConfig

from kvpress.matryoshka.bases import Bases
from kvpress.matryoshka.init import initial_bases
from kvpress.matryoshka.passing import compressed_shapes
from kvpress.matryoshka.statistics import collect

HEAD_DIM = 32


@functools.cache
def small_model(dtype=torch.float64, **changes):
    """Two layers, eight query heads on two KV heads of 32 dimensions."""
    torch.manual_seed(0)
    config = LlamaConfig(**{**COMMON, "head_dim": HEAD_DIM, "num_hidden_layers": 2, **changes})
    model = AutoModelForCausalLM.from_config(config).eval()
    for name, weight in model.named_parameters():  # a fresh model's attention is nearly uniform
        if "q_proj" in name or "k_proj" in name:
            weight.data *= 6
    return model.to(dtype)


def some_windows(n=3, length=24, seed=0):
    """[n, length] ids."""
    return torch.randint(3, VOCABULARY, (n, length), generator=torch.Generator().manual_seed(seed))


def bases_of(model, kind="pca", seed=0):
    """Bases of a kind from a little text, orthogonal to the last bit of the model's dtype."""
    layers, _ = compressed_shapes(model)
    moments = collect(model, some_windows(6, 40, seed=5).split(1))
    return exact(initial_bases(kind, layers, moments, seed), model.dtype)


def exact(bases, dtype=torch.float64):
    """Bases are stored in float32: the same made orthogonal in float64."""

    def clean(matrices):
        return tuple((matrix.double() @ polar(matrix.double())).to(dtype) for matrix in matrices)

    def polar(matrix):  # (M^T M)^-1/2, next to the identity
        values, vectors = torch.linalg.eigh(matrix.transpose(1, 2) @ matrix)
        return (vectors * values[:, None, :] ** -0.5) @ vectors.transpose(1, 2)

    means = None if bases.means is None else tuple(mean.to(dtype) for mean in bases.means)
    return Bases(bases.layers, clean(bases.keys), clean(bases.values), means)
