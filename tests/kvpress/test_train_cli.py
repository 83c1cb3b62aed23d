"""`kvpress train` from a recipe to a projection that `kvpress generate` reads, and its mistakes in one sentence."""

import json
import shutil

import pytest
import torch
import yaml
from cli_support import assert_one_sentence
from conftest import byte_tokenizer
from tiny_models import COMMON
from transformers import LlamaConfig, LlamaForCausalLM

from kvpress.matryoshka.checkpoint import load_projection
from kvpress.matryoshka.recipe import load_recipe, recipes_folder
from kvpress.matryoshka.training_state import points

RECIPE = {
    "text": [{"python": "topics", "licence": "PSF-2.0"}],
    "start": {"kind": "query", "windows": 4, "window": 64},
    "training": {
        "steps": 4, "windows": 1, "window": 64, "shares": [0.25, 0.5, 1.0], "judge_every": 2, "judge_windows": 1,
    },
    "search": {"windows": 1, "window": 64, "step": 8, "shares": [0.5]},
    "judging": {"windows": 2, "window": 64, "shares": [1.0, 0.5]},
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model with heads of 32 dimensions, its tokenizer, and a recipe."""
    place = tmp_path_factory.mktemp("train")
    torch.manual_seed(0)
    config = LlamaConfig(**{**COMMON, "vocab_size": 259, "head_dim": 32, "num_hidden_layers": 2, "bos_token_id": 0})
    LlamaForCausalLM(config).save_pretrained(place / "model")
    byte_tokenizer(chat_template=None).save_pretrained(place / "model")
    (place / "recipe.yaml").write_text(yaml.safe_dump(RECIPE))
    return place


def test_a_log_gets_lines_of_progress_and_every_method_searches(kvpress, folder, monkeypatch):
    monkeypatch.setattr("kvpress.cli.train.SECONDS_BETWEEN_LINES", 0.0)
    train = ["-m", folder / "model", "-r", folder / "recipe.yaml", "--dtype", "float32"]
    code, _, err = kvpress("train", "projections", *train, "-o", folder / "log", "--no-judge")
    assert code == 0, err
    assert "reading: 1 of 4, " in err
    assert ": 4 of 4, " in err
    path = folder / "log" / "projection.safetensors"
    for method in ("greedy", "sensitivity", "evolution"):
        code, _, err = kvpress("train", "ranks", path, *train, "--method", method)
        assert code == 0, err
        assert "searching: " in err
        assert "judging: " in err
        (table,) = load_projection(path).header.tables
        assert (table.share, table.method) == (0.5, method)


def test_from_a_recipe_to_an_answer(kvpress, folder):
    train = ["train", "projections", "-m", folder / "model", "-r", folder / "recipe.yaml", "--dtype", "float32"]
    code, out, err = kvpress(*train, "-o", folder / "one", "--json")
    assert code == 0, err
    rows = {(row["arm"], row["share"]): row for row in json.loads(out)["rows"]}
    assert set(rows) == {(arm, share) for arm in ("random", "pca", "query", "trained") for share in (1.0, 0.5)}
    assert all(row["kl"] == pytest.approx(0, abs=1e-4) for (_, share), row in rows.items() if share == 1)
    assert all(len(row["windows"]["kl"]) == 2 for row in rows.values())
    path = folder / "one" / "projection.safetensors"
    assert load_projection(path).header.model.name == "model"
    assert [point.step for point in points(folder / "one" / "curve.jsonl")] == [0, 1, 2, 3, 4]
    assert (folder / "one" / "curve.svg").read_text().startswith("<?xml")

    code, out, err = kvpress(
        "train", "ranks", path, "-m", folder / "model", "-r", folder / "recipe.yaml", "--dtype", "float32"
    )
    assert code == 0, err
    assert "50.0%" in out
    assert "searched" in out
    tables = load_projection(path).header.tables
    assert [(table.share, table.method) for table in tables] == [(0.5, "exchange")]

    document = folder / "document.txt"
    document.write_text("The hen was called Duchess. " * 8)
    ask = [
        "generate",
        "-m",
        folder / "model",
        "-d",
        document,
        "--json",
        "--max-new-tokens",
        3,
        "-b",
        "50%",
        "--dtype",
        "float32",
    ]
    sizes = {}
    for name, more in {
        "plain": [],
        "int8": ["--int8"],
        "half": ["-p", path],
        "searched": ["-p", path, "--ranks", "searched"],
        "both": ["-p", path, "--share", 0.25, "--int8"],
    }.items():
        code, out, err = kvpress(*ask, *more)
        assert code == 0, err
        sizes[name] = json.loads(out)["runs"][0]["cache_bytes"]
    assert sizes["plain"] > sizes["half"] > sizes["int8"] > sizes["both"]
    assert sizes["searched"] <= sizes["half"]
    # eight bits go on top of a contract's own projection
    (folder / "half.yaml").write_text(yaml.safe_dump({"representation": {"kind": "orthogonal", "file": str(path)}}))
    code, out, err = kvpress(*ask, "-c", folder / "half.yaml", "--int8")
    assert code == 0, err
    assert json.loads(out)["runs"][0]["cache_bytes"] < sizes["int8"]
    assert_one_sentence(kvpress(*ask, "--share", 0.25), "--share and --ranks belong to a projection")
    # without a budget nothing is evicted
    code, out, err = kvpress(
        "generate",
        "-m",
        folder / "model",
        "-d",
        document,
        "--json",
        "--max-new-tokens",
        3,
        "-p",
        path,
        "--dtype",
        "float16",
    )
    assert code == 0, err
    assert json.loads(out)["contract"] == "full"

    # a finished training that is asked for again keeps the ranks that were searched for it
    code, out, err = kvpress(*train, "-o", folder / "one", "--json")
    assert code == 0, err
    assert load_projection(path).header.tables == tables


def test_a_training_goes_on(kvpress, folder):
    train = [
        "train",
        "projections",
        "-m",
        folder / "model",
        "-r",
        folder / "recipe.yaml",
        "--dtype",
        "float32",
        "--json",
    ]
    code, first, err = kvpress(*train, "-o", folder / "two")
    assert code == 0, err
    code, again, err = kvpress(*train, "-o", folder / "two")
    assert code == 0, err
    assert json.loads(first)["rows"] == json.loads(again)["rows"]
    assert_one_sentence(
        kvpress(*train, "-o", folder / "two", "--seed", 5), "holds another training (it differs in recipe)"
    )


def test_no_steps_keep_the_start(kvpress, folder):
    train = ["train", "projections", "-m", folder / "model", "-r", folder / "recipe.yaml", "--dtype", "float32"]
    code, out, err = kvpress(*train, "-o", folder / "three", "--steps", 0, "--start", "pca", "--json")
    assert code == 0, err
    rows = {(row["arm"], row["share"]): row["kl"] for row in json.loads(out)["rows"]}
    assert rows[("trained", 0.5)] == pytest.approx(rows[("pca", 0.5)], rel=1e-3)
    code, out, err = kvpress(*train, "-o", folder / "four", "--steps", 0, "--start", "pca", "--no-judge")
    assert (code, out) == (0, ""), err
    one, other = (load_projection(folder / name / "projection.safetensors") for name in ("three", "four"))
    assert all(torch.equal(a, b) for a, b in zip(one.bases.keys, other.bases.keys, strict=True))


def test_mistakes(kvpress, folder, tmp_path):
    model, recipe = folder / "model", tmp_path / "recipe.yaml"
    train = ["train", "projections", "-m", model, "-o", tmp_path / "out"]
    assert_one_sentence(kvpress(*train, "-r", "pyhton"), "there is no recipe 'pyhton'", "python")
    assert_one_sentence(kvpress(*train, "-r", recipe), "cannot be read")
    for change, part in (
        ({"colour": 1}, "unknown field 'colour'"),
        ({"text": []}, "text"),
        ({"text": [{"folder": str(tmp_path / "none"), "licence": "x"}]}, "there is no folder"),
        ({"start": {"kind": "pcb", "window": 64}}, "unknown start of a projection 'pcb'"),
        (
            {"training": {**RECIPE["training"], "shares": [0.3, 1.0]}},
            "a rank schedule with the share 0.3 does not divide",
        ),
        ({"training": {**RECIPE["training"], "window": 100_000}}, "no document of split 'train' has 100,000 tokens"),
    ):
        recipe.write_text(yaml.safe_dump({**RECIPE, **change}))
        assert_one_sentence(kvpress(*train, "-r", recipe, "--dtype", "float32"), part)
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
    recipe.write_text(yaml.safe_dump({**RECIPE, "training": {**RECIPE["training"], "learning_rate": 1e30}}))
    code, _out, err = kvpress(*train, "-r", recipe, "--dtype", "float32")
    assert code == 2
    assert err.splitlines()[-1].startswith("error: training stopped at step 2: the loss is no finite number")
    assert err.splitlines()[-1].endswith(f"'{tmp_path / 'out' / 'projection.safetensors'}' holds the bases of step 0")
    stopped = load_projection(tmp_path / "out" / "projection.safetensors")
    assert stopped.header.history[-1]["stopped_after"] == 0
    assert stopped.bases.orthogonality_error() < 1e-5
    ranks = ["train", "ranks", tmp_path / "out" / "projection.safetensors", "-m", model, "-r", folder / "recipe.yaml"]
    assert kvpress(*ranks, "--dtype", "float32")[0] == 0
    assert kvpress(*train, "-r", recipe, "--dtype", "float32")[0] == 2
    assert load_projection(tmp_path / "out" / "projection.safetensors").header.tables, (
        "searched ranks outlive another stop"
    )
    ranks = ["train", "ranks", tmp_path / "none.safetensors", "-m", model, "-r", folder / "recipe.yaml"]
    assert_one_sentence(kvpress(*ranks), "no such projection")
    assert_one_sentence(kvpress(*ranks, "--method", "luck"), "search: field 'method'")
    assert_one_sentence(kvpress(*train, "--start", "luck"), "start: field 'kind': unknown start of a projection 'luck'")


@pytest.mark.parametrize("name", sorted(path.stem for path in recipes_folder().glob("*.yaml")))
def test_the_recipes_are_valid(name):
    recipe = load_recipe(name)
    assert all(source.licence for source in recipe.text)
