"""Small random models of the families that the cache serves, for tests. Nothing is downloaded."""

import functools

import torch
from transformers import AutoModelForCausalLM
from transformers.models.gemma3.configuration_gemma3 import Gemma3TextConfig
from transformers.models.gpt_oss.configuration_gpt_oss import GptOssConfig
from transformers.models.llama.configuration_llama import LlamaConfig
from transformers.models.mistral.configuration_mistral import MistralConfig
from transformers.models.phi3.configuration_phi3 import Phi3Config
from transformers.models.qwen2.configuration_qwen2 import Qwen2Config
from transformers.models.qwen3.configuration_qwen3 import Qwen3Config
from transformers.models.qwen3_moe.configuration_qwen3_moe import Qwen3MoeConfig

VOCABULARY = 211
COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 1024,
    "eos_token_id": None,
    "pad_token_id": 0,
    "bos_token_id": 1,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "decoder_sparse_step": 1}
LAYER_TYPES = ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]
CONFIGS = {
    "llama": lambda: LlamaConfig(**COMMON),
    "mistral": lambda: MistralConfig(**COMMON, sliding_window=12),
    "qwen2": lambda: Qwen2Config(**COMMON),
    "qwen3": lambda: Qwen3Config(**COMMON),
    "qwen3_moe": lambda: Qwen3MoeConfig(**COMMON, **EXPERTS),
    "phi3": lambda: Phi3Config(**COMMON, original_max_position_embeddings=1024),
    "gemma3": lambda: Gemma3TextConfig(
        **{**COMMON, "num_hidden_layers": 4}, sliding_window=12, layer_types=LAYER_TYPES, query_pre_attn_scalar=16
    ),
    "gpt_oss": lambda: GptOssConfig(
        **{**COMMON, "num_hidden_layers": 4},
        sliding_window=12,
        layer_types=LAYER_TYPES,
        num_local_experts=4,
        num_experts_per_tok=2,
    ),
}


@functools.cache
def tiny(family: str, dtype: torch.dtype = torch.float32, layers: int | None = None):
    """A random model of the family in eval mode; the same call gives the same object."""
    torch.manual_seed(hash_of(family))
    config = CONFIGS[family]()
    if layers is not None:
        config.num_hidden_layers = layers
        if getattr(config, "layer_types", None):
            config.layer_types = config.layer_types[-layers:]
    model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    if dtype == torch.float64 and hasattr(config, "num_experts_per_tok"):
        model.set_experts_implementation("eager")  # the grouped matmul of the experts has no float64
    with torch.no_grad():  # spread the attention, so that rankings differ; and give the sinks a say
        for name, parameter in model.named_parameters():
            if name.endswith("sinks"):
                parameter.normal_(0, 1)
            elif parameter.dim() >= 2:
                parameter.mul_(3)
    return model


def hash_of(text: str) -> int:
    """A seed that does not change between processes."""
    return sum(ord(letter) * 31**place for place, letter in enumerate(text)) % 2**31


def prompts(n_rows: int, length: int, padding: list[int] | None = None, seed: int = 0):
    """Random ids [B, n] and their mask, left-padded by `padding[row]` tokens."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(2, VOCABULARY, (n_rows, length), generator=generator)
    mask = torch.ones_like(ids)
    for row, n in enumerate(padding or [0] * n_rows):
        ids[row, :n] = 0
        mask[row, :n] = 0
    return ids, mask
