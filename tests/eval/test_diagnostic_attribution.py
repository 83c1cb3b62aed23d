"""Failures planted in one stage are attributed to that stage, on a model that answers with the full cache."""

from typing import ClassVar

import pytest
import torch
from induction_model import FACTS, WORDS, induction_model, induction_tokenizer, lookup_sample

from kvpress.slots import QueryLaw, Ranking, Retention
from kvpress.slots.retention import best
from kvpress_eval.diagnostic.attribution import verdict_of
from kvpress_eval.diagnostic.finding import Finding, Replay, unpack_counts
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
        (["set"], "fit"),
        ([], "undecided"),
        (["evidence", "chance"], "undecided"),
        (["set", "chance"], "undecided"),
        (["chance"], "undecided"),
    ],
)
def test_the_first_replay_that_repairs_gives_the_verdict(repaired, verdict):
    names = ("stored", "evidence", "ranking", "set", "chance")
    assert verdict_of([replay(name, name in repaired) for name in names]) == verdict


def test_delayed_eviction_is_examined_too():
    chosen = study(
        delayed={
            "transfer": "access",
            "swap": {
                "query_law": {"kind": "first_decode_steps", "n": 2},
                "schedule": {"kind": "after_decode_steps", "n": 2},
            },
        }
    )
    model, tokenizer = induction_model(), induction_tokenizer()
    sample = lookup_sample(0)
    answers = chosen.engine(model, tokenizer, chosen.arms()).answer([render(tokenizer, sample)], [sample], True)[0]
    found = {
        arm.name.partition("@")[0]: Finding.model_validate(one.measures)
        for arm, one in zip(chosen.arms(), answers, strict=True)
    }
    assert found["delayed"].access.tv_decode < found["host"].access.tv_decode
    assert found["delayed"].margin.first_wrong is None
