"""Studies: one slot a diagnostic, several a transfer, and never by accident."""

import pytest

from kvpress.contract import differences
from kvpress.errors import InputError
from kvpress_eval.diagnostic.study import Failing, Study
from kvpress_eval.sweep import Sweep, parse_sweep

BLOCKS = {"granularity": {"kind": "block", "size": 16}, "retention": "strict_blocks"}


def study(**changes):
    fields = {"model": "m", "tasks": [{"task": "toy/one"}], "budgets": ["5%", "25%"], "host": "snapkv"}
    return parse_sweep({**fields, **changes}, "study 's'")


def test_a_sweep_with_a_host_is_a_study_and_survives_its_own_dump():
    found = study(swaps={"mii": {"swap": {"ranking": "mii"}}})
    assert isinstance(found, Study)
    again = parse_sweep(found.model_dump(mode="json"), "again")
    assert again == found
    assert again.comparisons == found.comparisons
    assert not isinstance(parse_sweep({"model": "m", "tasks": [{"task": "toy/one"}]}, "x"), Study)
    assert issubclass(Study, Sweep)


def test_each_arm_runs_at_each_budget_with_null_and_oracle_beside_them():
    names = [arm.name for arm in study(swaps={"mii": {"swap": {"ranking": "mii"}}}).arms()]
    assert names == [
        "full", "snapkv@5%", "snapkv@25%", "mii@5%", "mii@25%", "null@5%", "null@25%", "oracle@5%", "oracle@25%"
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("slot", "choice", "stage"),
    [
        ("ranking", "nolev", "value"),
        ("query_law", {"kind": "tail", "window": 8}, "access"),
        ("access", "aggregate", "access"),
        ("allocation", "ada", "fit"),
        ("protection", {"kind": "standard", "sinks": 4, "recent": 32}, "fit"),
    ],
)
def test_the_slot_decides_the_stage(slot, choice, stage):
    comparison = study(swaps={"arm": {"swap": {slot: choice}}}).comparisons[0]
    assert (comparison.slots, comparison.stage, comparison.label) == ((slot,), stage, "diagnostic")


def test_several_slots_are_refused_as_a_diagnostic():
    with pytest.raises(InputError, match=r"differs from 'snapkv' in 2 slots \(granularity, retention\)"):
        study(swaps={"blocks": {"swap": BLOCKS}})


def test_several_slots_are_a_transfer_when_that_is_said():
    found = study(
        swaps={
            "blocks": {"transfer": "fit", "swap": BLOCKS},
            "filled": {"base": "blocks", "swap": {"retention": "blocks_token_fill"}},
        }
    )
    blocks, filled = found.comparisons[:2]
    assert (blocks.label, blocks.stage, blocks.slots) == ("transfer", "fit", ("granularity", "retention"))
    assert (filled.label, filled.base, filled.slots) == ("diagnostic", "blocks", ("retention",))


@pytest.mark.parametrize(
    ("swaps", "sentence"),
    [
        ({"mii": {"transfer": "value", "swap": {"ranking": "mii"}}}, "leave 'transfer' out"),
        ({"same": {"swap": {"ranking": "mass"}}}, "the same contract as its base"),
        ({"null": {"swap": {"ranking": "mii"}}}, "arm 'null' is there twice"),
        ({"a": {"base": "b", "swap": {"ranking": "mii"}}}, "based on 'b'"),
        ({"a": {"swap": {"ranking": "nonsense"}}}, "nonsense"),
        ({"a": {}}, "either 'swap' or 'contract'"),
        ({"a": {"swap": {"ranking": "mii"}, "contract": "h2o"}}, "either 'swap' or 'contract'"),
    ],
)
def test_mistakes_are_one_sentence(swaps, sentence):
    with pytest.raises(InputError, match=sentence) as caught:
        study(swaps=swaps)
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith("study 's'")


def test_contracts_and_missing_budgets_are_refused():
    with pytest.raises(InputError, match="under 'swaps'"):
        study(contracts=["h2o"])
    with pytest.raises(InputError, match="budgets"):
        study(budgets=[])
    with pytest.raises(InputError, match=r"attribute names 'nobody'"):
        study(measure={"attribute": ["nobody"]})


def test_hosts_and_budgets_that_compare_nothing_are_refused():
    for changes, sentence in (
        ({"host": "full"}, "must evict something"),
        ({"budgets": ["20%", "100%"]}, "must evict something"),
        ({"budgets": ["20%", 0.2]}, "given twice"),
    ):
        with pytest.raises(InputError, match=sentence):
            study(**changes)


def test_null_differs_from_the_host_in_the_ranking_alone_and_oracle_in_its_queries():
    found = study()
    host = found.contract("snapkv")
    assert differences(host, found.contract("null")) == ["ranking"]
    assert differences(host, found.contract("oracle")) == ["query_law"]
    assert {one.role for one in found.comparisons} == {"null", "oracle"}


@pytest.mark.parametrize(
    ("full", "arm", "fails"),
    [(1, 0, True), (1, 1, False), (1, 0.5, True), (1, 0.6, False), (0.4, 0, False), (0.6, 0.3, True)],
)
def test_what_counts_as_a_failure(full, arm, fails):
    assert Failing().fails(full, arm) is fails
