"""docs/diagnostic.md names arms, sweeps, measures and replays that exist, all of them."""

import re
from pathlib import Path

import yaml

from kvpress.contract import Contract
from kvpress_eval.diagnostic.attribution import VERDICTS
from kvpress_eval.diagnostic.finding import AccessMeasures, FitMeasures, Replay
from kvpress_eval.diagnostic.study import STAGE_OF_SLOT, Study, load_swaps, swaps_folder
from kvpress_eval.diagnostic.words import MEANING, REPLAYS
from kvpress_eval.sweep import load_sweep, parse_sweep, sweeps_folder

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "diagnostic.md").read_text(encoding="utf-8")


def rows(header):
    """Cells of the table with this first column."""
    lines = PAGE[PAGE.index(f"| {header} |") :].split("\n\n")[0].splitlines()[2:]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def names(cell):
    return re.findall(r"`([\w.]+)`", cell)


def test_every_arm_of_standard_is_in_the_table_with_its_base_stage_and_label():
    sweep = load_sweep("diagnostic-ruler-8k")
    assert isinstance(sweep, Study)
    described = {
        name: (base, stage, "(transfer)" in what) for cell, base, what, stage in rows("arm") for name in names(cell)
    }
    expected = {
        one.arm: ("host" if one.base == sweep.host_name else one.base, one.stage, not one.is_diagnostic)
        for one in sweep.comparisons
        if one.role == "arm"
    }
    assert described == expected


def test_every_sweep_and_set_of_swaps_is_named():
    missing = [path.stem for path in sweeps_folder().glob("diagnostic-*.yaml") if f"`{path.stem}`" not in PAGE]
    assert missing == []
    assert all(f"`swaps: {path.stem}`" in PAGE for path in swaps_folder().glob("*.yaml"))


def test_the_example_is_a_study():
    example = yaml.safe_load(PAGE.split("```yaml\n")[1].split("```")[0])
    study = parse_sweep(example, "example")
    assert isinstance(study, Study)
    assert [one.label for one in study.comparisons][:4] == ["diagnostic", "diagnostic", "diagnostic", "transfer"]


def test_every_measure_replay_and_verdict_is_explained():
    fields = [*AccessMeasures.model_fields, *FitMeasures.model_fields]
    assert [name for name in fields if name not in PAGE] == []
    assert [row[0] for row in rows("replay")] == list(Replay.model_fields["name"].annotation.__args__)
    assert set(REPLAYS) == set(Replay.model_fields["name"].annotation.__args__)
    for row in rows("replay"):
        assert row[2] == VERDICTS.get(row[0], "undecided")
    assert set(VERDICTS) == set(REPLAYS) - {"chance"}
    assert set(MEANING) == {"access", "value", "fit", "none", "undecided"}


def test_every_slot_but_the_budget_has_a_stage():
    assert set(STAGE_OF_SLOT) == set(Contract().choices) - {"budget"}


def test_the_small_set_is_part_of_the_standard_one():
    standard = load_swaps("standard")
    assert all(standard[name] == swap for name, swap in load_swaps("small").items())
