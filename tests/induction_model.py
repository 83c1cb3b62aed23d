"""A transformer of two layers, written down and not trained, that looks things up: behind a word it says what followed that word before.

Layer 0 has a previous-token head: a bias makes queries and keys that rotary embedding turns into a peak one position back,
and its value brings that token's word. Layer 1 has an induction head: it looks for the place whose previous word is the present one and says the word
there. With the whole prompt in the cache the answer to "... key" is what stands behind the key, word for word.
"""

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerFast
from transformers.models.llama.configuration_llama import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaForCausalLM

from kvpress_eval.sample import Sample

END = "end"
FILLER = [f"f{i}" for i in range(16)]
FACTS = [[f"k{i}", f"a{i}", f"b{i}", f"c{i}"] for i in range(11)]
WORDS = [END, "<pad>", *FILLER, *(word for fact in FACTS for word in fact)]
HEAD_DIM, FIRST_STEADY = 128, 16  # pairs of dimensions from here on hardly rotate within a few thousand positions
THETA = 1e30


def slots(n: int) -> torch.Tensor:
    """Dimensions of a head that keep their value under rotary embedding, n of them."""
    half = HEAD_DIM // 2
    return torch.cat([torch.arange(FIRST_STEADY, half), torch.arange(half + FIRST_STEADY, HEAD_DIM)])[:n]


def induction_model(sharpness: float = 24.0) -> LlamaForCausalLM:
    """The model, float32; two KV heads with one query head each, of which the second does nothing."""
    n = len(WORDS)
    config = LlamaConfig(
        attention_bias=True,
        vocab_size=n,
        hidden_size=3 * n,
        intermediate_size=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=HEAD_DIM,
        max_position_embeddings=4096,
        rope_parameters={"rope_type": "default", "rope_theta": THETA},
        tie_word_embeddings=False,
        eos_token_id=0,
        pad_token_id=1,
        bos_token_id=None,
    )
    model = LlamaForCausalLM(config).float().eval()
    eye, word = torch.eye(n), slots(n)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.fill_(1.0 if "norm" in name else 0.0)
        model.model.embed_tokens.weight[:, :n] = eye
        first, second = (layer.self_attn for layer in model.model.layers)
        # one word among 3n: its entry is sqrt(3n) after the norm; two words: sqrt(3n / 2)
        alone, paired = (3 * n) ** 0.5, (3 * n / 2) ** 0.5
        pairs = torch.arange(8)
        frequency = THETA ** (-2 * pairs / HEAD_DIM)
        height = 40 * HEAD_DIM**0.5 / 8
        first.k_proj.bias[pairs] = height**0.5
        # the query's angle is one position behind the key's
        first.q_proj.bias[pairs] = height**0.5 * torch.cos(-frequency) * 8**0.5
        first.q_proj.bias[pairs + HEAD_DIM // 2] = height**0.5 * torch.sin(-frequency) * 8**0.5
        first.v_proj.weight[word, :n] = eye / alone
        first.o_proj.weight[n : 2 * n, word] = eye
        strength = (sharpness * HEAD_DIM**0.5) ** 0.5 / paired
        second.q_proj.weight[word, :n] = eye * strength
        second.k_proj.weight[word, n : 2 * n] = eye * strength
        second.v_proj.weight[word, :n] = eye / paired
        second.o_proj.weight[2 * n :, word] = eye
        model.lm_head.weight[:, 2 * n :] = 20 * eye
    return model


def induction_tokenizer() -> PreTrainedTokenizerFast:
    """One id a word."""
    words = Tokenizer(WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<pad>"))
    words.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=words, eos_token=END, pad_token="<pad>")


def lookup_sample(index: int, n_tokens: int = 240) -> Sample:
    """Facts among filler; one is asked for, and stands far from both ends."""
    generator = torch.Generator().manual_seed(index)

    def draw(high: int) -> int:
        return int(torch.randint(high, (1,), generator=generator))

    order = torch.randperm(len(FACTS), generator=generator).tolist()
    asked = FACTS[order[0]]
    gap = (n_tokens - 5 * len(FACTS)) // (len(FACTS) + 1)
    words: list[str] = []
    places = [*order[1:6], order[0], *order[6:]]
    for fact in places:
        words += [FILLER[draw(16)] for _ in range(gap)] + [*FACTS[fact], END]
    words += [FILLER[draw(16)] for _ in range(gap)]
    return Sample(
        id=str(index),
        cluster=str(index),
        lead="",
        context=" ".join(words),
        question=" " + " ".join(FILLER[draw(16)] for _ in range(8)),
        answer_prefix=" " + asked[0],
        answers=(" ".join(asked[1:]),),
        metric="ruler_all",
        max_new_tokens=8,
        evidence=(" ".join([*asked, END]),),
    )
