"""Failures planted in one stage are attributed to that stage, on a model that answers with the full cache."""

from dataclasses import replace
from typing import ClassVar

import pytest
import torch
from induction_model import FACTS, WORDS, induction_model, induction_tokenizer, lookup_sample

from kvpress.slots import QueryLaw, Ranking, Retention
from kvpress.slots.retention import best
from kvpress_eval.diagnostic import replay as replay_module
from kvpress_eval.diagnostic.attribution import verdict_of
from kvpress_eval.diagnostic.finding import Finding, Replay, unpack_counts
from kvpress_eval.diagnostic.replay import distinct, read_sets
from kvpress_eval.prompt import render
from kvpress_eval.sweep import parse_sweep

SAMPLES = 20
HOST = {
    "name": "host",
    "query_law": {"kind": "tail", "window": 8},
    "access": {"kind": "aggregate", "pooling": "avg", "kernel": 7},
    "protection": {"kind": "standard", "recent": 8},
}
CONTENT = torch.tensor([word in {w for fact in FACTS for w in fact[1:]} for word in WORDS])


@pytest.fixture(scope="module", autouse=True)
def planted():
    """Three faulty choices, known for the length of these tests."""

    class ShiftedWindow(QueryLaw, kind="planted_shifted_window"):
        """A window of queries far in front of the question."""

        source: ClassVar[str] = "planted"

        def weights(self, positions, n_seen):
            return ((positions >= n_seen - 40) & (positions < n_seen - 32)).double()

    class BlindToValues(Ranking, kind="planted_blind_to_values"):
        """Mass times the norm of values that are zeroed in it for the words that answer."""

        source: ClassVar[str] = "planted"

        @property
        def statistics(self):
            return frozenset({"mass"})

        def exposure(self, statistics, features):
            return statistics["mass"]

        def weigh(self, pooled, features):
            # the value of a token of this model is its word, one-hot in the steady dimensions of the head
            values = torch.cat([group.values for group in features.groups])
            if features.layer == 0:
                return pooled
            return pooled * ~_content(values)

    class Splitting(Retention, kind="planted_splitting"):
        """The best tokens, but of neighbours only every second one: what belongs together is torn apart."""

        source: ClassVar[str] = "planted"

        def units(self, view, budget):
            odd = torch.arange(view.scores.numel()) % 2 == 1
            return best(view.scores, view.eligible & odd, budget)

    yield
    for base, kind in (
        (QueryLaw, "planted_shifted_window"),
        (Ranking, "planted_blind_to_values"),
        (Retention, "planted_splitting"),
    ):
        del base.registry[kind]


def _content(values):
    """[H, N] bool: tokens whose value is that of a word of a fact, its key apart; the second head has no values."""
    from induction_model import slots

    word = values[0][:, slots(len(WORDS))].argmax(-1)
    return CONTENT[word].expand(values.shape[0], -1)


def study(**swaps):
    fields = {"model": "m", "tasks": [{"task": "toy/one"}], "budgets": ["20%"], "host": HOST, "swaps": swaps}
    return parse_sweep(fields, "test")


@pytest.fixture(scope="module")
def examined():
    """Findings of all arms on all samples."""
    chosen = study(
        shifted={"swap": {"query_law": "planted_shifted_window"}},
        blind={"swap": {"ranking": "planted_blind_to_values"}},
        splitting={"swap": {"retention": "planted_splitting"}},
        newest={"transfer": "access", "swap": {"ranking": "position", "access": "aggregate"}},
    )
    model, tokenizer = induction_model(), induction_tokenizer()
    engine, found = chosen.engine(model, tokenizer, chosen.arms()), []
    for index in range(SAMPLES):
        sample = lookup_sample(index)
        prompt = render(tokenizer, sample)
        answers = engine.answer([prompt], [sample], True)[0]
        found.append(
            (sample, prompt, {
                arm.name.partition("@")[0]: (answer, Finding.model_validate(answer.measures))
                for arm, answer in zip(chosen.arms(), answers, strict=True)
            })
        )  # fmt: skip
    return found


def verdicts(examined, arm):
    return [arms[arm][1].verdict for _, _, arms in examined]


def test_the_full_cache_and_the_host_answer(examined):
    for sample, _, arms in examined:
        for arm in ("full", "host", "null", "oracle"):
            assert arms[arm][0].text == sample.answers[0]
        assert arms["host"][1].verdict == "none"
        assert arms["full"][1].verdict is None


@pytest.mark.parametrize(("arm", "stage"), [("shifted", "access"), ("blind", "value"), ("splitting", "fit")])
def test_a_planted_failure_is_attributed_to_its_stage(examined, arm, stage):
    found = verdicts(examined, arm)
    assert found.count("none") == 0, "the planted fault must break the answer"
    assert found.count(stage) >= 0.9 * SAMPLES, found


def test_an_arm_that_looks_at_nothing_fails_in_access(examined):
    assert verdicts(examined, "newest").count("access") >= 0.9 * SAMPLES


def test_measures_tell_the_same_story(examined):
    for _, prompt, arms in examined:
        full, host, shifted = (arms[name][1] for name in ("full", "host", "shifted"))
        assert full.margin.first_wrong is None
        assert full.margin.divergence == pytest.approx(0, abs=1e-6)
        assert host.margin.first_wrong is None
        assert shifted.margin.first_wrong is not None
        assert shifted.margin.lowest < 0 < host.margin.lowest
        assert host.access.kept_decode > shifted.access.kept_decode
        assert host.value.measured < shifted.value.measured
        counts = unpack_counts(host.kept, len(prompt.ids))
        assert host.heads == 4
        assert counts.max() <= 4
        assert counts.sum() == sum(min(int(0.2 * len(prompt.ids)), len(prompt.ids)) for _ in range(4))
        assert host.gold == prompt.facts


def test_values_that_were_stored_wrong_are_a_failure_of_value(monkeypatch):
    from kvpress_eval.diagnostic import examiner

    chosen = study()
    model, tokenizer = induction_model(), induction_tokenizer()
    engine = chosen.engine(model, tokenizer, chosen.arms())
    read = type(engine)._read

    def zeroing(self, *args):
        reads = read(self, *args)
        for one in reads:
            if one.arm.name.startswith("host"):
                for layer in one.cache.compressed_layers:
                    layer.storage.store.values.zero_()
        return reads

    monkeypatch.setattr(examiner.Examiner, "_read", zeroing)
    found = []
    for index in range(10):
        sample = lookup_sample(index)
        answers = engine.answer([render(tokenizer, sample)], [sample], True)[0]
        host = Finding.model_validate(answers[1].measures)
        found.append(host.verdict)
        assert host.replays[0].name == "stored"
    assert found.count("value") >= 9, found


def replay(name, repaired):
    return Replay(name=name, lowest=0.0, score=None, repaired=repaired, exchanged=0.1)


@pytest.mark.parametrize(
    ("repaired", "verdict"),
    [
        (["stored"], "value"),
        (["evidence", "ranking", "set"], "access"),
        (["ranking"], "value"),
        (["set", "facts"], "fit"),
        (["facts"], "undecided"),
        ([], "undecided"),
        (["evidence", "chance"], "undecided"),
        (["set", "chance"], "undecided"),
    ],
)
def test_the_first_replay_that_repairs_gives_the_verdict(repaired, verdict):
    names = ("stored", "evidence", "ranking", "set", "facts", "chance", "chance")
    assert verdict_of([replay(name, name in repaired) for name in names]) == verdict


def test_one_lucky_draw_changes_no_verdict():
    drawn = [replay("chance", True), replay("chance", False), replay("chance", False)]
    assert verdict_of([replay("evidence", True), *drawn]) == "access"
    assert verdict_of([replay("evidence", True), *drawn, replay("chance", True), replay("chance", True)]) == "undecided"


def test_what_was_not_looked_at_repairs_nothing():
    assert verdict_of([replay("evidence", False), replay("ranking", None), replay("set", True)]) == "fit"


def test_an_arm_that_goes_on_evicting_has_access_and_no_verdict():
    chosen = study(
        delayed={
            "transfer": "access",
            "swap": {
                "query_law": {"kind": "first_decode_steps", "n": 2},
                "schedule": {"kind": "after_decode_steps", "n": 2},
            },
        }
    )
    found = examine(chosen, lookup_sample(0))
    assert found["delayed"].access.tv_decode < found["host"].access.tv_decode
    assert (found["delayed"].value, found["delayed"].margin, found["delayed"].verdict) == (None, None, None)


def examine(chosen, sample, aware=True, model=None):
    """Findings of one sample, by contract."""
    tokenizer = induction_tokenizer()
    engine = chosen.engine(model or induction_model(), tokenizer, chosen.arms())
    answers = engine.answer([render(tokenizer, sample)], [sample], aware)[0]
    return {
        arm.name.partition("@")[0]: Finding.model_validate(one.measures)
        for arm, one in zip(chosen.arms(), answers, strict=True)
    }


@pytest.mark.parametrize("options", [{}, {"max_reference": 2}])
def test_a_query_agnostic_failure_is_decided_by_its_whole_answer(options):
    """The cache is cut before the question: nothing but the oracle's queries can know what will be asked."""
    chosen = study(
        blocks={"transfer": "fit", "swap": {"granularity": {"kind": "block", "size": 4}, "retention": "strict_blocks"}}
    )
    chosen = chosen.model_copy(update={"measure": chosen.measure.model_copy(update=options)})
    found = [examine(chosen, lookup_sample(index), aware=False) for index in range(8)]
    assert sum(one["host"].verdict == "access" for one in found) >= 7, [one["host"].verdict for one in found]
    # the first token too is chosen over the cut cache
    assert sum(one["host"].margin.first_wrong == 0 for one in found) >= 4
    for one in found:
        assert one["host"].margin.whole is not bool(options)
        chance = [replay for replay in one["host"].replays if replay.name == "chance"]
        assert len(chance) == 3


def test_an_answer_of_one_token_is_measured_and_written():
    sample = replace(lookup_sample(3), answers=("zz",))
    one_word = replace(sample, answers=(lookup_sample(3).answers[0].split()[0],), max_new_tokens=1)
    for aware in (True, False):
        found = examine(study(), one_word, aware)
        for finding in found.values():
            assert Finding.model_validate_json(finding.model_dump_json()) == finding
            assert finding.margin.lowest > -1e4


def test_every_arm_of_the_standard_set_can_be_replayed():
    """All of them fail when their window of queries is shifted away; the replays of each must run, W_O or not."""
    fields = {"model": "m", "tasks": [{"task": "toy/one"}], "budgets": ["20%"], "swaps": "standard"}
    shifted = {**HOST, "query_law": "planted_shifted_window"}
    chosen = parse_sweep({**fields, "host": shifted}, "test")
    found = examine(chosen, lookup_sample(1))
    looked_into = {name: one for name, one in found.items() if one.replays}
    assert {"host", "vatp", "nolev", "mii", "mii_output", "criticalkv", "additive_ac", "adakv", "pyramid"} <= set(
        looked_into
    )
    for name, one in looked_into.items():
        names = [replay.name for replay in one.replays]
        assert ("set" in names) is (name in {"adakv", "pyramid", "blocks", "filled", "greedy", "reserve"}), name
        repair = next((replay for replay in one.replays if replay.repaired and replay.name != "chance"), None)
        drawn = [replay for replay in one.replays if replay.name == "chance"]
        assert all(replay.exchanged == repair.exchanged for replay in drawn)


def test_facts_that_only_force_brings_back_are_no_failure_of_fit(monkeypatch):
    """Where even the oracle's ranking puts other tokens first, nothing is said about the set."""
    from kvpress_eval.diagnostic import attribution

    contracts = attribution.oracle_contracts

    def misled(contract):
        found = contracts(contract)
        blind = {"kind": "planted_blind_to_values"}
        return {**found, **{name: found[name].swap(ranking=blind) for name in ("evidence", "ranking", "set")}}

    monkeypatch.setattr(attribution, "oracle_contracts", misled)
    found = [
        examine(study(blind={"swap": {"ranking": "planted_blind_to_values"}}), lookup_sample(i))["blind"]
        for i in range(4)
    ]
    for one in found:
        assert [replay.name for replay in one.replays if replay.repaired][:1] in (["facts"], [])
        assert one.verdict == "undecided"
    assert any(replay.name == "facts" and replay.repaired for one in found for replay in one.replays)


def test_null_follows_a_random_host_and_oracle_is_more_than_a_blind_one():
    random = {"name": "dice", "ranking": "random"}
    chosen = parse_sweep(
        {"model": "m", "tasks": [{"task": "toy/one"}], "budgets": ["20%"], "host": random, "swaps": {}}, "test"
    )
    found = examine(chosen, lookup_sample(2))
    assert found["null"].kept == found["dice"].kept
    assert found["oracle"].access.kept_decode > found["dice"].access.kept_decode


def test_a_sample_that_the_full_cache_fails_is_measured_and_not_attributed():
    """There is no right answer of the model to look for, so nothing is replayed."""
    chosen = study(shifted={"swap": {"query_law": "planted_shifted_window"}})
    model, tokenizer = induction_model(), induction_tokenizer()
    right = lookup_sample(0)
    other = next(lookup_sample(index) for index in range(1, SAMPLES) if lookup_sample(index).answers != right.answers)
    sample = replace(right, answers=other.answers)
    prompt = render(tokenizer, sample)
    engine = chosen.engine(model, tokenizer, chosen.arms())
    for answer in engine.answer([prompt], [sample], True)[0]:
        finding = Finding.model_validate(answer.measures)
        assert finding.verdict in (None, "none")
        assert finding.replays == ()


def test_sets_that_are_the_same_are_read_once(monkeypatch):
    """Arms that differ in what an oracle replaces have the same replays; each gets the answer of its own set, in its place."""
    draw = torch.Generator().manual_seed(0)
    one, other = ({index: torch.rand(2, 9, generator=draw) > 0.5 for index in (0, 3)} for _ in range(2))
    again = {3: one[3].clone(), 0: one[0].clone()}
    different, places = distinct([other, one, other, again])
    assert places == [0, 1, 0, 1]
    assert [any(found is known for known in (one, other)) for found in different] == [True, True]

    read = []

    class Closed:
        def close(self):
            pass

    monkeypatch.setattr(replay_module, "with_sets", lambda full, some: read.append(len(some)) or Closed())
    monkeypatch.setattr(replay_module, "rows_at_once", lambda full, rows: rows)
    monkeypatch.setattr(
        replay_module, "read_reference", lambda model, cache, witness, first, tail: [f"{len(read)}", "b"][: len(first)]
    )
    found = read_sets(None, None, None, torch.zeros(1, 5), [], [one, other, again, one], rows=2)
    assert (read, found) == ([2], ["1", "b", "1", "1"])
