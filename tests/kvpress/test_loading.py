"""`kvpress.load`: what it opens, in which dtype, and the one sentence for everything that it cannot open."""

import json
import shutil
import struct
from pathlib import Path

import gguf
import pytest
import torch
from safetensors.torch import load_file, save_file

from kvpress import device as device_module
from kvpress.errors import InputError, KvpressError, UnsupportedModelError
from kvpress.loading import find_origin, load


@pytest.fixture
def folder(model_folder, tmp_path) -> Path:
    """A copy of the tiny model's folder, to be damaged."""
    return Path(shutil.copytree(model_folder, tmp_path / "model"))


def edit_config(folder: Path, **changes) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def refused(source, error=InputError, **arguments) -> str:
    """The message with which `load` refuses; one sentence on one line."""
    with pytest.raises(error) as info:
        load(source, **arguments)
    message = str(info.value)
    assert "\n" not in message
    assert len(message) < 400
    return message


def test_folder(model_folder):
    model, tokenizer = load(model_folder, dtype="float32", device="cpu")
    assert not model.training
    assert model.dtype == torch.float32
    ids = tokenizer("hello", return_tensors="pt")["input_ids"]
    assert model(ids).logits.shape == (1, 6, 259)


def test_tokenizer_is_remembered(model_folder):
    from kvpress.session import compress

    model, tokenizer = load(str(model_folder))
    with compress(model, "snapkv") as session:
        assert session.tokenizer is tokenizer


@pytest.mark.parametrize(("native", "dtype"), [(True, torch.bfloat16), (False, torch.float32)])
def test_auto_dtype_on_cpu_follows_the_cpu(model_folder, monkeypatch, native, dtype):
    monkeypatch.setattr(device_module, "cpu_has_native_bf16", lambda: native)
    assert load(model_folder, device="cpu")[0].dtype == dtype


def test_auto_dtype():
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert device_module.pick_dtype("auto", cpu, torch.float32) == torch.float32
    assert device_module.pick_dtype("auto", gpu, torch.float16) == torch.float16
    assert device_module.pick_dtype("auto", gpu, None) == torch.bfloat16
    assert device_module.pick_dtype("float16", cpu, torch.bfloat16) == torch.float16


def test_unknown_dtype_and_device(model_folder):
    assert "unknown dtype 'int3'" in refused(model_folder, dtype="int3")
    assert "unknown device 'abacus'" in refused(model_folder, device="abacus")
    assert "'cuda:99' is not there" in refused(model_folder, device="cuda:99")


def test_missing_paths(tmp_path):
    assert refused(tmp_path / "nowhere") == f"no such folder: '{tmp_path / 'nowhere'}'"
    assert refused(tmp_path / "model.gguf") == f"no such file: '{tmp_path / 'model.gguf'}'"
    (tmp_path / "model.txt").write_text("")
    assert "neither a model folder nor a .gguf file" in refused(tmp_path / "model.txt")
    assert "has no config.json" in refused(tmp_path)


def test_folder_of_gguf_files_names_one(tmp_path):
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    assert f"such as '{tmp_path / 'model.gguf'}'" in refused(tmp_path)


def test_model_that_is_nowhere():
    message = refused("nobody/no-such-model")
    assert "'nobody/no-such-model'" in message
    assert "hub cannot be reached" in message


def test_hub_ids_and_paths_are_told_apart(tmp_path):
    assert find_origin("Qwen/Qwen2.5-0.5B").name == "Qwen/Qwen2.5-0.5B"
    assert find_origin("gpt2").name == "gpt2"
    for path in ("a/b/c", "./a", "/a/b", "~/a"):
        with pytest.raises(InputError, match="no such folder"):
            find_origin(path)


def test_bin_weights_are_refused(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    assert "only .bin weights, which run code when opened" in refused(folder)


def test_no_weights(folder):
    (folder / "model.safetensors").unlink()
    assert "has no weights" in refused(folder)


def test_damaged_safetensors(folder):
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    assert "damaged safetensors file" in refused(folder)


def test_missing_weight_is_not_made_up(folder):
    tensors = load_file(folder / "model.safetensors")
    tensors.pop("model.layers.1.self_attn.k_proj.weight")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    assert "lacks 1 weights that the model needs, 'model.layers.1.self_attn.k_proj.weight'" in refused(folder)


def test_corrupt_config(folder):
    (folder / "config.json").write_text("{")
    assert "not a valid JSON file" in refused(folder)


def test_weights_of_another_shape(folder):
    edit_config(folder, intermediate_size=48)
    message = refused(folder)
    assert "has 6 weights of another shape than its config.json says" in message
    assert "'model.layers.0.mlp.down_proj.weight'" in message


def test_damaged_tokenizer(folder):
    (folder / "tokenizer.json").write_text("{")
    assert "the tokenizer of" in refused(folder)


def test_missing_tokenizer(folder):
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()
    assert "has no tokenizer" in refused(folder)


def test_unknown_architecture(folder):
    edit_config(folder, model_type="zork")
    assert "a model of type 'zork'" in refused(folder, UnsupportedModelError)


def test_encoder_decoder_is_refused_before_its_weights_are_read(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "t5"}))
    (tmp_path / "model.safetensors").write_bytes(b"never opened")
    message = refused(tmp_path, UnsupportedModelError)
    assert "encoder-decoder" in message
    assert "t5" in message


def test_model_with_its_own_code_needs_consent(folder):
    edit_config(folder, model_type="own", auto_map={"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"})
    assert "--trust-remote-code" in refused(folder)


def write_gguf(path: Path, architecture: str = "llama") -> Path:
    """A tiny float32 model of a llama-like architecture, with a byte tokenizer, as llama.cpp writes it."""
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_name("tiny")
    writer.add_context_length(128)
    writer.add_embedding_length(32)
    writer.add_block_count(1)
    writer.add_feed_forward_length(64)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(8)
    writer.add_vocab_size(259)
    from tokenizers.pre_tokenizers import ByteLevel

    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(["<s>", "</s>", "ab", *sorted(ByteLevel.alphabet())])
    writer.add_token_types([3, 3, 1] + [1] * 256)
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    shapes = {"attn_q": (32, 32), "attn_k": (16, 32), "attn_v": (16, 32), "attn_output": (32, 32)}
    shapes |= {"ffn_gate": (64, 32), "ffn_up": (64, 32), "ffn_down": (32, 64), "attn_norm": (32,), "ffn_norm": (32,)}
    tensors = {f"blk.0.{name}.weight": shape for name, shape in shapes.items()}
    tensors |= {"token_embd.weight": (259, 32), "output_norm.weight": (32,), "output.weight": (259, 32)}
    generator = torch.Generator().manual_seed(0)
    for name, shape in tensors.items():
        writer.add_tensor(name, torch.randn(shape, generator=generator).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_gguf(tmp_path):
    model, tokenizer = load(write_gguf(tmp_path / "tiny.gguf"), dtype="float32")
    assert model.config.num_key_value_heads == 2
    assert model.dtype == torch.float32
    assert tokenizer.decode(tokenizer("hello")["input_ids"], skip_special_tokens=True) == "hello"
    model.save_pretrained(tmp_path / "plain")  # transformers refuses that for a model it takes for a quantised one
    load_file(tmp_path / "plain" / "model.safetensors")


@pytest.mark.parametrize("content", [b"", b"junk" * 100, b"GGUF" + struct.pack("<IQQ", 3, 9, 9)])
def test_corrupt_gguf(tmp_path, content):
    path = tmp_path / "broken.gguf"
    path.write_bytes(content)
    assert "no GGUF file or a damaged one" in refused(path)


def test_truncated_gguf(tmp_path):
    path = write_gguf(tmp_path / "tiny.gguf")
    path.write_bytes(path.read_bytes()[:-5000])
    assert "no GGUF file or a damaged one" in refused(path)


def test_gguf_of_an_unknown_architecture(tmp_path):
    message = refused(write_gguf(tmp_path / "zork.gguf", "zork"), KvpressError)
    assert "'zork'" in message
