"""Contracts as data: files in and out, an id of the content, single-slot swaps, and refusals that name the remedy."""

import json
from itertools import islice, pairwise
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from kvpress.contract import SLOTS, Contract, differences, preset_names, read_yaml, resolve
from kvpress.contract.presets import presets_folder
from kvpress.errors import ContractError
from kvpress.slots import parse_budget

PRESETS = preset_names()
NAMED_BY_THE_PROJECT = {
    "full", "streaming_llm", "h2o", "h2o_debiased", "tova", "snapkv", "pyramidkv", "adakv", "vatp", "criticalkv",
    "caote", "laprox", "mii", "nolev", "knorm", "kvzip", "random", "oracle_mass",
}  # fmt: skip


def refusal(build, *args, **kwargs) -> str:
    """The one sentence with which a contract is refused."""
    with pytest.raises(ContractError) as error:
        build(*args, **kwargs)
    sentence = str(error.value)
    assert "\n" not in sentence
    assert len(sentence) < 600
    return sentence


# --- presets and files -------------------------------------------------------------------------------------------


def test_all_named_presets_exist():
    assert set(PRESETS) >= NAMED_BY_THE_PROJECT


@pytest.mark.parametrize("name", PRESETS)
def test_preset_survives_yaml_and_json(name, tmp_path):
    contract = Contract.load(name)
    path = tmp_path / "again.yaml"
    path.write_text(contract.to_yaml(), encoding="utf-8")
    again = read_yaml(path)
    assert again == contract
    assert again.id == contract.id
    assert again.name == name  # the file gives a name, so its stem does not count
    as_json = json.loads(json.dumps(contract.model_dump(mode="json")))
    assert Contract.build(as_json) == contract
    assert set(json.loads(contract.canonical_json())) == set(SLOTS)


@pytest.mark.parametrize("name", PRESETS)
def test_preset_file_names_its_source(name):
    text = (presets_folder() / f"{name}.yaml").read_text(encoding="utf-8")
    assert text.startswith("# ")
    assert yaml.safe_load(text)["description"]


def test_no_two_presets_are_the_same():
    ids = {Contract.load(name).id for name in PRESETS}
    assert len(ids) == len(PRESETS)


@pytest.mark.parametrize(
    ("name", "slot"),
    [
        ("mii", "ranking"),
        ("nolev", "ranking"),
        ("criticalkv", "ranking"),
        ("caote", "ranking"),
        ("pyramidkv", "allocation"),
        ("adakv", "allocation"),
    ],
)
def test_presets_in_the_snapkv_contract_differ_in_one_slot(name, slot):
    """Otherwise a comparison with SnapKV would not be a diagnostic pair (arXiv 2605.08234 section 3)."""
    assert differences(Contract.load("snapkv"), Contract.load(name)) == [slot]


def test_h2o_debiased_differs_from_h2o_in_the_access_slot():
    assert differences(Contract.load("h2o"), Contract.load("h2o_debiased")) == ["access"]


def test_sources_of_a_contract(tmp_path):
    snapkv = Contract.load("snapkv")
    path = tmp_path / "mine.yaml"
    path.write_text("ranking: mii\n")
    assert resolve(snapkv) is snapkv
    assert resolve({"ranking": "mii"}).ranking.kind == "mii"
    assert resolve(path).name == resolve(str(path)).name == "mine"
    assert resolve("snapkv", "10%").budget == parse_budget(0.1)
    assert resolve("snapkv", {"kind": "tokens", "value": 7}).budget == parse_budget("7tokens")
    assert resolve("snapkv", parse_budget("20MB")).budget.kind == "bytes"


# --- the id ------------------------------------------------------------------------------------------------------


OTHER = {
    "budget": {"kind": "fraction", "value": 0.26},
    "granularity": {"kind": "block", "size": 16},
    "query_law": {"kind": "tail", "window": 33},
    "access": {"kind": "aggregate", "head_reducer": "max"},
    "ranking": {"kind": "random", "seed": 1},
    "allocation": {"kind": "ada"},
    "retention": {"kind": "grouped_reserve"},
    "protection": {"kind": "standard", "spans": [[3, 5]]},
    "schedule": {"kind": "every_decode_steps", "n": 8},
}


def test_labels_do_not_enter_the_id():
    a = Contract.load("snapkv")
    b = a.swap(name="other", description="something else")
    assert a.id == b.id
    assert differences(a, b) == []


def test_defaults_written_out_give_the_same_id():
    short = Contract.build({"query_law": "tail", "ranking": "mass"})
    spelled = Contract.build({"query_law": {"kind": "tail", "window": 32}, "ranking": {"kind": "mass"}})
    assert short.id == spelled.id == Contract().id
    assert len(short.id) == 64


@pytest.mark.parametrize("slot", [slot for slot in OTHER if slot != "granularity"])
def test_any_change_of_a_slot_changes_the_id(slot):
    base = Contract()
    other = base.swap(**{slot: OTHER[slot]})
    assert differences(base, other) == [slot]
    assert other.id != base.id
    assert getattr(base, slot) != getattr(other, slot)
    assert other.swap(**{slot: getattr(base, slot)}) == base


def test_a_swap_of_two_slots_and_its_way_back():
    base = Contract.load("snapkv")
    blocks = base.swap(granularity=OTHER["granularity"], retention="strict_blocks")
    assert differences(base, blocks) == ["granularity", "retention"]
    assert blocks.swap(granularity="token", retention="top_k").id == base.id


def test_leverage_at_its_end_points_is_not_confused_with_the_named_rankings():
    """The same numbers under another kind are another contract: a record must say which one ran."""
    base = Contract.load("mii")
    assert base.swap(ranking={"kind": "alpha_leverage", "alpha": 1.0}).id != base.id


@settings(max_examples=40, deadline=None)
@given(
    value=st.floats(0.001, 1.0),
    window=st.integers(1, 512),
    seed=st.integers(0, 2**31 - 1),
    spans=st.lists(st.tuples(st.integers(0, 50), st.integers(1, 50)).map(lambda s: (s[0], s[0] + s[1])), max_size=3),
)
def test_any_contract_survives_yaml_with_its_id(value, window, seed, spans):
    contract = Contract.build(
        {
            "budget": {"kind": "fraction", "value": value},
            "query_law": {"kind": "tail_anchors", "window": window, "spans": spans},
            "ranking": {"kind": "random", "seed": seed},
            "protection": {"kind": "standard", "spans": [list(span) for span in spans]},
        }
    )
    again = Contract.build(yaml.safe_load(contract.to_yaml()))
    assert again == contract
    assert again.id == contract.id


def test_contracts_and_choices_are_frozen():
    contract = Contract.load("snapkv")
    with pytest.raises(ValidationError, match="frozen"):
        contract.ranking = Contract.load("mii").ranking
    with pytest.raises(ValidationError, match="frozen"):
        contract.query_law.window = 5
    spans = [[1, 2]]
    protected = contract.swap(protection={"kind": "standard", "spans": spans})
    spans[0][0] = 0
    assert protected.protection.spans == ((1, 2),)  # the caller's list is not kept


# --- refusals ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"rankng": "mass"}, "did you mean 'ranking'?"),
        ({1: "mass"}, "unknown slot '1'"),
        ({"ranking": "nolevv"}, "did you mean 'nolev'?"),
        ({"ranking": {"kind": "random", "sed": 1}}, "did you mean 'seed'?"),
        ({"ranking": {"seed": 1}}, "needs a mapping with 'kind'"),
        ({"ranking": None}, "needs a mapping with 'kind'"),
        ({"ranking": {"kind": ["mass"]}}, "needs a mapping with 'kind'"),
        ({"budget": {"kind": "fraction", "value": 1.5}}, "less than or equal to 1"),
        ({"budget": {"kind": "fraction", "value": float("nan")}}, "finite"),
        ({"budget": {"kind": "tokens"}}, "Field required"),
        ({"granularity": {"kind": "block", "size": 1}}, "greater than or equal to 2"),
        ({"query_law": {"kind": "tail", "window": "wide"}}, "field 'window'"),
        ({"access": {"kind": "aggregate", "pooling": "avg"}}, "'kernel' above 1"),
        ({"access": {"kind": "aggregate", "pooling": "avg", "kernel": 4}}, "must be odd"),
        ({"access": {"kind": "aggregate", "debias": True, "query_reducer": "max"}}, "no meaning"),
        ({"access": {"kind": "aggregate", "layers": [1]}}, "scope 'model'"),
        ({"access": {"kind": "aggregate", "scope": "model", "layers": [1], "layer_weights": [1, 2]}}, "one weight"),
        ({"access": {"kind": "aggregate", "scope": "model", "layers": [1, 1]}}, "each named once"),
        ({"access": {"kind": "aggregate", "scope": "model", "layers": [-1]}}, "counted from 0"),
        ({"access": {"kind": "aggregate", "band": [0.5, 1]}}, "scope 'model'"),
        ({"access": {"kind": "aggregate", "scope": "model", "layers": [1], "band": [0.5, 1]}}, "in place of 'layers'"),
        ({"access": {"kind": "aggregate", "scope": "model", "band": [0.5, 0.5]}}, "part of the depth"),
        ({"query_law": {"kind": "tail_anchors", "spans": [[4, 4]]}}, "span [4, 4)"),
        ({"protection": {"kind": "standard", "recent": 4, "recent_share": 0.5}}, "not both"),
        ({"protection": {"kind": "standard", "spans": [[5, 3]]}}, "span [5, 3)"),
        ({"retention": {"kind": "greedy_set", "proxies": 2**12, "max_units": 2**12}}, "gigabytes"),
        ({"allocation": {"kind": "file", "weights": [[1, 2], [3]]}}, "table"),
        ({"allocation": {"kind": "file", "weights": [[0, 0]]}}, "positive sum"),
        ({"name": 3}, "field 'name'"),
    ],
)
def test_wrong_fields(fields, says):
    assert says in refusal(Contract.build, fields)


LAST_QUERIES = {"kind": "tail_anchors"}


@pytest.mark.parametrize(
    ("slots", "says"),
    [
        ({"query_law": "first_decode_steps"}, "needs schedule 'after_decode_steps' with the same n"),
        (
            {"query_law": {"kind": "first_decode_steps", "n": 4}, "schedule": {"kind": "after_decode_steps", "n": 8}},
            "the same n",
        ),
        ({"query_law": "reconstruction", "schedule": "every_decode_steps"}, "needs schedule 'end_of_prefill'"),
        ({"query_law": "oracle", "schedule": "per_prefill_chunk"}, "needs schedule 'end_of_prefill'"),
        ({"query_law": "tail_anchors", "schedule": "every_decode_steps"}, "give 'spans', or anchors 0"),
        ({"ranking": "criticalkv", "access": {"kind": "aggregate", "scope": "model"}}, "two stages"),
        ({"schedule": "per_prefill_chunk", "allocation": "global"}, "needs all layers first"),
        (
            {"schedule": "per_prefill_chunk", "access": {"kind": "aggregate", "scope": "model"}},
            "needs all layers first",
        ),
        ({"granularity": "block"}, "picks single tokens"),
        ({"retention": "strict_blocks"}, "picks blocks"),
        ({"retention": "greedy_set", "ranking": "position"}, "uses none"),
        ({"retention": "grouped_reserve", "query_law": "all"}, "only adds them up"),
        ({"retention": "blocks_token_fill", "granularity": "block", "query_law": "all"}, "only adds them up"),
        ({"access": {"kind": "aggregate", "debias": True}, "ranking": "random"}, "uses no queries"),
        (
            {"access": {"kind": "aggregate", "pooling": "avg", "kernel": 3}, "ranking": "key_norm"},
            "leave pooling at 'none'",
        ),
        ({"access": {"kind": "aggregate", "query_reducer": "max"}, "query_law": LAST_QUERIES}, "ignores the weights"),
        ({"access": {"kind": "aggregate", "scope": "layer"}, "allocation": "ada"}, "nothing to divide"),
        ({"access": {"kind": "aggregate", "scope": "model"}, "allocation": "pyramid"}, "needs allocation 'uniform'"),
        ({"access": {"kind": "aggregate", "scope": "layer"}, "retention": "greedy_set"}, "use access scope 'head'"),
        (
            {
                "access": {"kind": "aggregate", "scope": "model"},
                "retention": "blocks_token_fill",
                "granularity": "block",
            },
            "use access scope 'head' or 'layer'",
        ),
        ({"budget": {"kind": "fraction", "value": 1}, "schedule": "every_decode_steps"}, "below 1"),
    ],
)
def test_impossible_combinations(slots, says):
    sentence = refusal(Contract.build, {"name": "mine", **slots})
    assert says in sentence
    assert "contract 'mine'" in sentence


def test_a_swap_is_checked_like_a_new_contract():
    assert "picks single tokens" in refusal(Contract.load("snapkv").swap, granularity="block")
    assert "did you mean 'ranking'" in refusal(Contract.load("snapkv").swap, rankings="mass")


def test_unknown_preset():
    sentence = refusal(resolve, "snapvk")
    assert "did you mean 'snapkv'?" in sentence
    assert ".yaml file" in sentence
    for odd in ("", "../snapkv", None, 3):
        assert "unknown preset" in refusal(resolve, odd)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("ranking: [", "no valid YAML at line 1"),
        ("ranking: mass\nbudget: *x", "line 2"),
        ("\x00", "no valid YAML"),
        ("", "no mapping"),
        ("- ranking", "no mapping"),
        ("rankin: mass", "did you mean 'ranking'?"),
        ("!!python/object/apply:os.system ['echo']", "tag"),
        ("ranking: !!python/name:os.system", "tag"),
        ("[" * 20_000, "nested too deeply"),
        ("#" * 300_000, "256 KiB"),
        (b"\xff\xfe\x00", "cannot be read"),
    ],
    ids=["syntax", "alias", "control", "empty", "list", "slot", "call", "name", "deep", "large", "binary"],
)
def test_corrupt_files(text, says, tmp_path):
    path = tmp_path / "wrong.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    sentence = refusal(read_yaml, path)
    assert says in sentence
    assert str(path) in sentence


def test_missing_file_and_folder(tmp_path):
    assert "does not exist" in refusal(resolve, tmp_path / "none.yaml")
    assert "cannot be read" in refusal(resolve, tmp_path)


def test_aliases_that_multiply_are_not_written_out(tmp_path):
    """A 1 KB file whose aliases stand for 10^9 items must not become an error message of that size."""
    levels = "".join(f"  - &{new} [{', '.join([f'*{old}'] * 10)}]\n" for old, new in pairwise("abcdefghi"))
    path = tmp_path / "many.yaml"
    path.write_text(f"budget:\n  - &a [x, x, x, x, x, x, x, x, x, x]\n{levels}")
    assert "needs a mapping with 'kind'" in refusal(read_yaml, path)


def test_budgets_from_a_file(tmp_path):
    path = tmp_path / "weights.yaml"
    path.write_text("weights: [[1, 2], [3, 4]]")
    from_path = Contract.build({"allocation": {"kind": "file", "path": str(path)}})
    assert from_path.id == Contract.build({"allocation": {"kind": "file", "weights": [[1, 2], [3, 4]]}}).id
    for wrong in ({"path": str(tmp_path / "none")}, {"path": 3}, {"path": str(path), "floor": 1}):
        assert "allocation" in refusal(Contract.build, {"allocation": {"kind": "file", **wrong}})
    path.write_text("[" * 20_000)
    assert "cannot be read" in refusal(Contract.build, {"allocation": {"kind": "file", "path": str(path)}})


# --- the short forms of a budget -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "kind", "value"),
    [
        (0.25, "fraction", 0.25),
        ("0.25", "fraction", 0.25),
        ("25%", "fraction", 0.25),
        (" 12.5 % ", "fraction", 0.125),
        (1, "fraction", 1.0),
        (1.0, "fraction", 1.0),
        ("1", "fraction", 1.0),
        ("100%", "fraction", 1.0),
        (512, "tokens", 512),
        ("512", "tokens", 512),
        ("512tokens", "tokens", 512),
        ("512 Tokens", "tokens", 512),
        ("1tokens", "tokens", 1),
        ("4096B", "bytes", 4096),
        ("20MB", "bytes", 20_000_000),
        ("20MiB", "bytes", 20 * 2**20),
        ("1.5 gb", "bytes", 1_500_000_000),
        ("3kib", "bytes", 3072),
    ],
)
def test_short_forms_of_a_budget(text, kind, value):
    budget = parse_budget(text)
    assert (budget.kind, budget.value) == (kind, value)


MEANINGLESS = (
    0, -1, 1.5, True, None, "", "abc", "%", "b", "0%", "101%", "nan", "inf", "1e400MB", "infMB", "12.5tokens", "0tokens",
    "-3tokens", "0B", "0.1B", [1], {"kind": "tokens"}, "tokens", "five MB", "1,000tokens",
)  # fmt: skip


@pytest.mark.parametrize("text", MEANINGLESS, ids=str)
def test_budgets_that_mean_nothing(text):
    refusal(parse_budget, text)


@settings(max_examples=100, deadline=None)
@given(st.one_of(st.text(max_size=12), st.floats(), st.integers()))
def test_a_short_form_is_understood_or_refused(text):
    try:
        budget = parse_budget(text)
    except ContractError:
        return
    assert budget.value > 0


def test_contracts_have_the_ids_that_committed_records_name():
    """Choices have got new fields since, all of them None by default."""
    records = Path(__file__).parents[2] / "docs" / "results" / "eval-small-2k" / "records.jsonl"
    named = {}
    with records.open() as file:
        for record in map(json.loads, islice(file, 40)):
            named[record["arm"]] = record["contract_id"]
    named.pop("full_repeat", None)  # transformers' own cache
    assert len(named) == 11
    for arm, known in named.items():
        name, _, budget = arm.partition("@")
        assert resolve(name, budget or None).id == known, name
