"""Text that goes on from a compressed context: against transformers' own cache, resumed, and refused where it means nothing."""

import json

import pytest
import torch
import yaml
from cli_support import assert_one_sentence
from conftest import byte_tokenizer, tiny_llama
from torch.nn import functional as F

from kvpress.contract import resolve
from kvpress.errors import InputError
from kvpress_eval.arms import Arm, make_arms
from kvpress_eval.continuation import measure_windows, read_window_records, summary

WINDOWS = torch.randint(3, 259, (6, 120), generator=torch.Generator().manual_seed(0))
CONTRACTS = [
    {"name": "int8", "budget": {"kind": "fraction", "value": 1.0}, "representation": "int8"},
    {"name": "snapkv", "query_law": {"kind": "tail", "window": 8}, "protection": {"kind": "standard", "sinks": 1, "recent": 8},
     "budget": {"kind": "fraction", "value": 0.5}},
]  # fmt: skip


def measure(path, arms=None, windows=WINDOWS, rest=20, text="t"):
    model = tiny_llama().double()
    return measure_windows(model, byte_tokenizer(), arms or make_arms(CONTRACTS, []), windows, rest, path, text)


def test_the_full_cache_is_transformers_own(tmp_path, monkeypatch):
    monkeypatch.setattr("kvpress_eval.continuation.LOGITS", 3 * 259 * 7)  # several passes over the rest
    found = measure(tmp_path / "r.jsonl")
    model = tiny_llama().double()
    with torch.no_grad():
        logits = model(WINDOWS).logits
    for record in found:
        if record.arm == "full":
            part = logits[record.window, 100:119]
            expected = F.cross_entropy(part.float(), WINDOWS[record.window, 101:120])
            assert record.loss == pytest.approx(float(expected), rel=1e-5)
            assert record.kl == pytest.approx(0, abs=1e-9)
            assert record.kept_bytes > record.full_bytes == 100 * 4 * 16 * 8
        elif record.arm.startswith("snapkv"):
            assert record.kl > 1e-6
            assert record.kept_bytes == 50 * 4 * (16 * 8 + 4)
        else:
            assert record.kept_bytes == 100 * 4 * (16 + 4 + 4)
    assert read_window_records(tmp_path / "r.jsonl") == found


def test_a_measurement_that_was_stopped_goes_on(tmp_path):
    whole = measure(tmp_path / "one.jsonl")
    lines = (tmp_path / "one.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "two.jsonl").write_text("".join(lines[:7]) + lines[7][:20])
    resumed = measure(tmp_path / "two.jsonl")
    assert sorted(map(repr, resumed)) == sorted(map(repr, whole))
    assert sorted((tmp_path / "two.jsonl").read_text().splitlines()) == sorted(line.strip() for line in lines)
    with pytest.raises(InputError, match="another text, model or of other arms"):
        measure(tmp_path / "two.jsonl", text="u")


def test_rows_of_the_summary(tmp_path):
    rows = {row["arm"]: row for row in summary(measure(tmp_path / "r.jsonl"))}
    assert set(rows) == {"full", "int8@100%", "snapkv@50%"}
    assert rows["full"]["loss_change"] == 0
    snapkv = rows["snapkv@50%"]
    assert snapkv["windows"] == 6
    assert snapkv["kl_low"] <= snapkv["kl"] <= snapkv["kl_high"]
    assert snapkv["byte_share"] == pytest.approx(0.5 * 132 / 128)


@pytest.mark.parametrize(
    ("contract", "sentence"),
    [
        ("oracle_mass", "needs a reference answer"),
        (
            resolve("snapkv", 0.5).swap(schedule={"kind": "every_decode_steps", "n": 4}),
            "evicts before or behind the end",
        ),
    ],
)
def test_arms_that_cannot_be_measured(tmp_path, contract, sentence):
    with pytest.raises(InputError, match=sentence):
        measure(tmp_path / "r.jsonl", [Arm("full", resolve("full")), Arm("odd", resolve(contract))])


def test_the_command(kvpress, model_folder, tmp_path):
    sweep = tmp_path / "sweep.yaml"
    sweep.write_text(yaml.safe_dump({"model": str(model_folder), "tasks": [{"task": "standin/standin_factbook_kv"}], "contracts": CONTRACTS,
                                     "dtype": "float32"}))  # fmt: skip
    ask = ["eval", "text", sweep, "-o", tmp_path / "out.jsonl", "--windows", 5, "--window", 200, "--rest", 20]
    code, out, err = kvpress(*ask, "--json")
    assert code == 0, err
    assert [row["arm"] for row in json.loads(out)["rows"]] == ["full", "int8@100%", "snapkv@50%"]
    code, out, err = kvpress(*ask)
    assert code == 0, err
    assert "snapkv@50%" in out
    assert_one_sentence(kvpress(*ask, "--rest", 300), "a rest of 300 tokens does not fit")
    assert_one_sentence(
        kvpress(*ask[:3], "-o", tmp_path / "out.jsonl", "--windows", 4, "--window", 200), "another text"
    )
    with torch.no_grad():
        other = tiny_llama()
        other.lm_head.weight.mul_(2)
    other.save_pretrained(tmp_path / "other")
    byte_tokenizer().save_pretrained(tmp_path / "other")
    assert_one_sentence(kvpress(*ask, "--model", tmp_path / "other"), "another text, model")
