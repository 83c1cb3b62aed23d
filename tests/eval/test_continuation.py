"""Text that goes on from a compressed context: against transformers' own cache, resumed, and refused where it means nothing."""

import json
import math

import numpy as np
import pytest
import torch
import yaml
from cli_support import assert_one_sentence
from conftest import byte_tokenizer, tiny_llama
from scipy.stats import t
from torch.nn import functional as F

from kvpress.contract import resolve
from kvpress.errors import InputError
from kvpress_eval.arms import Arm, make_arms
from kvpress_eval.continuation import compared, measure_windows, read_window_records, summary

WINDOWS = torch.randint(3, 259, (6, 120), generator=torch.Generator().manual_seed(0))
CONTRACTS = [
    {"name": "int8", "budget": {"kind": "fraction", "value": 1.0}, "representation": "int8"},
    {"name": "snapkv", "query_law": {"kind": "tail", "window": 8}, "protection": {"kind": "standard", "sinks": 1, "recent": 8},
     "budget": {"kind": "fraction", "value": 0.5}},
]  # fmt: skip


def measure(path, arms=None, windows=WINDOWS, rest=20, text="t", documents=None):
    model = tiny_llama().double()
    return measure_windows(
        model, byte_tokenizer(), arms or make_arms(CONTRACTS, []), windows, rest, path, text, documents=documents
    )


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
    of_int8 = {row["arm"]: row["byte_share"] for row in summary(measure(tmp_path / "r.jsonl"), of="int8@100%")}
    assert of_int8["int8@100%"] == 1
    assert of_int8["snapkv@50%"] == pytest.approx(0.5 * 132 / 24)


def test_intervals_are_students_over_documents(tmp_path):
    """With one window a document they are the textbook's; windows of one document count together, and below five there is none."""
    for documents in (None, [0, 1, 2, 3, 4, 4], [0, 0, 1, 1, 2, 3]):
        place = tmp_path / f"{documents}.jsonl"
        found = measure(place, documents=documents)
        row = next(row for row in summary(found) if row["arm"] == "snapkv@50%")
        values = np.array([one.kl for one in found if one.arm == "snapkv@50%"])
        if documents is None:
            half = t.ppf(0.975, 5) * values.std(ddof=1) / math.sqrt(6)
            assert (row["kl_low"], row["kl_high"]) == pytest.approx((values.mean() - half, values.mean() + half))
        elif row["documents"] == 5:
            assert row["kl_high"] - row["kl_low"] > 0
        else:
            assert row["documents"] == 4
            assert row["kl_low"] is None


def test_pairs_of_arms(tmp_path):
    found = measure(tmp_path / "r.jsonl")
    by_arm = {arm: [one for one in found if one.arm == arm] for arm in ("int8@100%", "snapkv@50%")}
    (row,) = compared(found, [("int8@100%", "snapkv@50%")])
    differences = [a.kl - b.kl for a, b in zip(*by_arm.values(), strict=True)]
    assert row["kl"] == pytest.approx(sum(differences) / 6)
    assert row["lower"] == sum(value < 0 for value in differences) == 6
    assert row["kl_low"] < row["kl"] < row["kl_high"] < 0
    (back,) = compared(found, [("snapkv@50%", "int8@100%")])
    assert (back["kl"], back["lower"]) == (pytest.approx(-row["kl"]), 0)
    with pytest.raises(InputError, match="there is no arm 'pca' to compare: give two of full, int8"):
        compared(found, [("pca", "full")])


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
    code, out, err = kvpress(*ask, "--pair", "int8@100%:snapkv@50%")
    assert code == 0, err
    assert "KL lower in 5 of 5 windows" in " ".join(out.split())
    code, out, err = kvpress(*ask, "--of", "int8@100%")
    assert code == 0, err
    assert "100.0%" in next(line for line in out.splitlines() if line.startswith("int8"))
    assert_one_sentence(kvpress(*ask, "--of", "int4"), "--of int4: 'int4' is no arm of the sweep, which has full")
    assert_one_sentence(kvpress(*ask, "--pair", "int8"), "--pair int8: 'int8' is no arm of the sweep")
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
