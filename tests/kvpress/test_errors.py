"""What a user gets for a mistake: one sentence that says what was wrong, where, and what would work."""

import pytest
import torch
from tiny_models import COMMON, prompts, tiny
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, DynamicCache, GenerationConfig
from transformers.models.deepseek_v3.configuration_deepseek_v3 import DeepseekV3Config
from transformers.models.qwen3_next.configuration_qwen3_next import Qwen3NextConfig
from transformers.models.t5.configuration_t5 import T5Config

import kvpress
from kvpress.errors import ContractError, InputError, KvpressError, UnsupportedModelError
from kvpress.memory import explain_out_of_memory

GREEDY = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0}


def sentence(error):
    """One line, and no traceback or list in it."""
    text = str(error.value)
    assert "\n" not in text
    assert len(text) < 500
    return text


def test_encoder_decoder_is_refused():
    model = AutoModelForSeq2SeqLM.from_config(
        T5Config(d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=2, vocab_size=50)
    )
    with pytest.raises(UnsupportedModelError) as error:
        kvpress.compress(model, "snapkv")
    assert "T5ForConditionalGeneration" in sentence(error)
    assert "encoder-decoder" in str(error.value)


def test_latent_attention_is_refused():
    config = DeepseekV3Config(
        **{k: v for k, v in COMMON.items() if k != "head_dim"}, q_lora_rank=16, kv_lora_rank=16, qk_rope_head_dim=8,
        qk_nope_head_dim=8, v_head_dim=16, n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=16,
        n_group=1, topk_group=1, first_k_dense_replace=3,
    )  # fmt: skip
    with pytest.raises(UnsupportedModelError) as error:
        kvpress.compress(AutoModelForCausalLM.from_config(config), "snapkv")
    assert "DeepseekV3ForCausalLM" in sentence(error)
    assert "latent" in str(error.value)


def test_linear_attention_hybrid_is_refused():
    config = Qwen3NextConfig(
        **COMMON, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, shared_expert_intermediate_size=16,
        linear_num_value_heads=4, linear_num_key_heads=2, linear_key_head_dim=8, linear_value_head_dim=8,
        layer_types=["linear_attention", "full_attention", "linear_attention"],
    )  # fmt: skip
    with pytest.raises(UnsupportedModelError) as error:
        kvpress.compress(AutoModelForCausalLM.from_config(config), "snapkv")
    assert "Qwen3NextForCausalLM" in sentence(error)
    assert "linear_attention" in str(error.value)


def test_state_space_model_is_refused():
    config = AutoConfig.for_model("mamba", hidden_size=32, num_hidden_layers=1, vocab_size=50)
    with pytest.raises(UnsupportedModelError) as error:
        kvpress.compress(AutoModelForCausalLM.from_config(config), "snapkv")
    assert "MambaForCausalLM" in sentence(error)


def test_a_model_of_another_kind_is_refused():
    with pytest.raises(UnsupportedModelError) as error:
        kvpress.compress(torch.nn.Linear(2, 2), "snapkv")
    assert "Linear" in sentence(error)


def test_a_model_without_full_attention_has_nothing_to_compress():
    with pytest.raises(ContractError) as error:
        kvpress.compress(tiny("mistral"), "snapkv")
    assert "MistralForCausalLM" in sentence(error)
    assert "slides" in str(error.value)


def test_budget_below_protection():
    with pytest.raises(ContractError) as error, kvpress.compress(tiny("llama"), "snapkv", budget=0.25):
        tiny("llama").generate(input_ids=prompts(1, 60)[0], **GREEDY)
    assert "15 tokens" in sentence(error)
    assert "protection of 32" in str(error.value)


def test_budget_that_keeps_nothing():
    with pytest.raises(ContractError) as error, kvpress.compress(tiny("llama"), "knorm", budget=0.01):
        tiny("llama").generate(input_ids=prompts(1, 60)[0], **GREEDY)
    assert "keeps none of 60 tokens" in sentence(error)


def test_budget_in_bytes_below_one_token():
    with pytest.raises(ContractError) as error, kvpress.compress(tiny("llama"), "knorm", budget="100B"):
        tiny("llama").generate(input_ids=prompts(1, 60)[0], **GREEDY)
    assert "100 bytes" in sentence(error)


def test_oracle_without_a_reference():
    with pytest.raises(ContractError) as error:
        kvpress.compress(tiny("llama"), "oracle_mass")
    assert "reference=" in sentence(error)


def test_reconstruction_without_a_tokenizer():
    with pytest.raises(ContractError) as error, kvpress.compress(tiny("llama"), "kvzip", budget=0.5):
        tiny("llama").generate(input_ids=prompts(1, 60)[0], **GREEDY)
    assert "tokenizer" in sentence(error)


def test_layers_that_the_model_lacks():
    contract = kvpress.Contract.load("mii_blocks")
    access = {**contract.access.model_dump(), "layers": [1, 7]}
    with pytest.raises(ContractError) as error:
        kvpress.compress(tiny("llama"), contract.swap(access=access))
    assert "3 compressed layers" in sentence(error)


@pytest.mark.parametrize("how", ["argument", "config"])
def test_output_attentions(how):
    model = tiny("llama")
    extra = {"output_attentions": True, "return_dict_in_generate": True} if how == "argument" else {}
    if how == "config":
        model.generation_config.output_attentions = True
    try:
        with pytest.raises(InputError) as error, kvpress.compress(model, "full"):
            model.generate(input_ids=prompts(1, 10)[0], **extra, **GREEDY)
    finally:
        model.generation_config.output_attentions = False
    assert "output_attentions" in sentence(error)


def test_four_dimensional_mask():
    with torch.no_grad(), pytest.raises(InputError) as error, kvpress.compress(tiny("llama"), "full"):
        tiny("llama")(input_ids=prompts(1, 10)[0], attention_mask=torch.ones(1, 1, 10, 10, dtype=torch.bool))
    assert "4-D" in sentence(error)


def test_wrong_device():
    with torch.no_grad(), pytest.raises(InputError) as error, kvpress.compress(tiny("llama"), "full"):
        tiny("llama")(input_ids=prompts(1, 10)[0].to("meta"))
    assert "meta" in sentence(error)
    assert "cpu" in str(error.value)


def test_prompt_longer_than_the_model():
    with pytest.raises(InputError) as error, kvpress.compress(tiny("llama"), "full"):
        tiny("llama").generate(input_ids=prompts(1, 1025)[0], **GREEDY)
    assert "1,025" in sentence(error)
    assert "1,024" in str(error.value)


@pytest.mark.parametrize(
    ("inputs", "says"),
    [
        ({"use_cache": False}, "use_cache"),
        ({"generation_config": GenerationConfig(use_cache=False)}, "use_cache"),
        ({"cache_implementation": "static"}, "cache_implementation"),
        ({"past_key_values": DynamicCache()}, "DynamicCache"),
    ],
)
def test_generate_settings_that_conflict(inputs, says):
    with pytest.raises(InputError) as error, kvpress.compress(tiny("llama"), "full"):
        tiny("llama").generate(input_ids=prompts(1, 10)[0], **inputs, **GREEDY)
    assert says in sentence(error)


def test_reference_with_another_batch_size():
    model, reference = tiny("llama"), prompts(2, 5)[0]
    contract = kvpress.Contract.load("oracle_mass").swap(protection={"kind": "none"})
    with pytest.raises(InputError) as error, kvpress.compress(model, contract, reference=reference):
        model.generate(input_ids=prompts(3, 60)[0], **GREEDY)
    assert "3 rows" in sentence(error)


def test_scores_that_are_no_numbers_stop_the_run():
    model = tiny("llama")
    weight = model.model.layers[1].self_attn.v_proj.weight
    saved = weight[0, 0].item()
    with torch.no_grad():
        weight[0, 0] = float("nan")
        try:
            with pytest.raises(KvpressError) as error, kvpress.compress(model, "mii", budget=0.7):
                model.generate(input_ids=prompts(1, 60)[0], **GREEDY)
        finally:
            weight[0, 0] = saved
    assert "layer 1" in sentence(error)


def test_out_of_memory_says_what_was_asked_and_what_would_fit():
    model = tiny("llama")
    cache = kvpress.CompressedCache(model, "snapkv", budget=0.7)
    with torch.no_grad():
        model(input_ids=prompts(1, 60)[0], past_key_values=cache)
    with pytest.raises(InputError) as error, explain_out_of_memory(cache, 60):
        torch.empty(1 << 60, dtype=torch.uint8)  # more than any machine has
    assert "60 tokens" in sentence(error)
    assert "would fit" in str(error.value)
    with pytest.raises(InputError) as error, explain_out_of_memory(cache, 60):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has ...")
    assert "2.50 GiB" in sentence(error)
    with pytest.raises(RuntimeError, match="something else"), explain_out_of_memory(cache, 60):
        raise RuntimeError("something else")
    cache.close()


def test_offloading_is_refused():
    cache = kvpress.CompressedCache(tiny("llama"), "full")
    with pytest.raises(KvpressError, match="offloaded"):
        cache.compressed_layers[0].offload()
    cache.close()
