"""Shared by all tests: no network for model files, one thread a worker, kernels in the interpreter, a tiny model."""

import os

# before transformers is imported anywhere: it reads this once
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# two workers share two cores; more threads than cores make small models several times slower. Before torch and numpy are imported,
# and for the processes that tests start
os.environ["OMP_NUM_THREADS"] = os.environ["KVPRESS_THREADS"] = "1"
# before a kernel is decorated: tests run kernels in Triton's interpreter; compile-only tests start a process without it
os.environ["TRITON_INTERPRET"] = "1"

import io
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

torch.set_num_threads(1)

#: puts one BOS in front itself, as Llama's template does
CHAT_TEMPLATE = "{{ bos_token }}{% for m in messages %}user: {{ m['content'] }}\n{% endfor %}assistant: "


def byte_tokenizer(chat_template=CHAT_TEMPLATE):
    """A tokenizer with one token a byte and three special ones, that puts BOS in front of plain text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate(["<s>", "</s>", "<pad>", *alphabet])}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = chat_template
    return tokenizer


def tiny_llama(**changes):
    """A random Llama of two layers, four query and two KV heads, and a context of 512 tokens."""
    from transformers import LlamaConfig, LlamaForCausalLM

    settings = {
        "vocab_size": 259,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 2,
        "tie_word_embeddings": False,
    }
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**{**settings, **changes})).eval()


@pytest.fixture(params=["packed", "paged"])
def store(request, monkeypatch):
    """Each test that uses it runs over both stores; pages are tiny, so that a short prompt fills many."""
    if request.param == "paged":
        from kvpress.backend import BackendRequest

        real = BackendRequest.resolve
        monkeypatch.setattr(
            BackendRequest, "resolve", lambda self, *args: replace(real(self, *args), store="paged", page_size=4)
        )
    return request.param


@pytest.fixture(scope="session")
def tokenizer():
    """The byte tokenizer, with a chat template."""
    return byte_tokenizer()


@pytest.fixture(scope="session")
def plain_tokenizer():
    """The byte tokenizer without a chat template."""
    return byte_tokenizer(chat_template=None)


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory) -> Path:
    """A folder with a tiny model in bfloat16 and its tokenizer, as `save_pretrained` writes them."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    tiny_llama().to(torch.bfloat16).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def kvpress(monkeypatch, capsys):
    """Call `kvpress ARGUMENTS` in this process; gives exit code, stdout and stderr."""
    from kvpress.cli import main

    def call(*arguments, stdin: str | bytes = ""):
        raw = stdin if isinstance(stdin, bytes) else stdin.encode()
        monkeypatch.setattr(sys, "argv", ["kvpress", *map(str, arguments)])
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(raw)))
        with pytest.raises(SystemExit) as stop:
            main()
        captured = capsys.readouterr()
        return stop.value.code, captured.out, captured.err

    return call
