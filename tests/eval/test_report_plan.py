"""What a report reads of a manifest, and what it tells before the numbers."""

import pytest
from record_factory import RUN, record, scores, small_run

from kvpress.errors import InputError
from kvpress_eval.records import FULL
from kvpress_eval.report import summarize

ARM = "snapkv@25%"


@pytest.mark.parametrize("margin", ["a", -1, 3, 0, True, None, float("nan")])
def test_a_margin_that_is_none_is_refused(margin):
    with pytest.raises(InputError, match=r"the margin 'task' of the manifest is .*; it must be"):
        summarize(small_run(), {"margins": {"task": margin}})


def test_margins_that_are_no_mapping_are_refused():
    with pytest.raises(InputError, match="'margins' of the manifest is 3"):
        summarize(small_run(), {"margins": 3})


@pytest.mark.parametrize("field", ["n", "official"])
@pytest.mark.parametrize("n", ["six", -1, 2.5, True, []])
def test_a_number_of_samples_that_is_none_is_refused(field, n):
    with pytest.raises(InputError, match=f"'{field}' of the task 'made/one@2048' in the manifest is"):
        summarize(small_run(), {"tasks": {"made/one@2048": {"n": 5, field: n}}})


def test_records_of_another_run_are_refused():
    records = small_run()
    summarize(records, {"run": RUN})
    with pytest.raises(
        InputError, match=r"records of another run lie in the folder: .*'ffff'.*keep the records of one"
    ):
        summarize([*records[1:], records[0].model_copy(update={"run": "ffff"})], {})
    with pytest.raises(InputError, match=f"name the runs '{RUN}', the manifest 'ffff'"):
        summarize(records, {"run": "ffff"})


@pytest.mark.parametrize(
    ("sweep", "official", "told"),
    [
        ({"limit": None, "tasks": [{"task": "made", "length": None, "limit": None}]}, 200, True),
        ({"limit": None, "tasks": [{"task": "made/two", "length": None, "limit": 5}]}, 200, True),
        ({"limit": 5, "tasks": [{"task": "made", "length": None, "limit": None}]}, 200, False),
        ({"limit": None, "tasks": [{"task": "made", "length": None, "limit": 5}]}, 200, False),
        ({"limit": None, "tasks": [{"task": "made/one", "length": None, "limit": 5}]}, 200, False),
        ({"limit": None, "tasks": []}, None, False),
        ({"limit": None, "tasks": []}, 5, False),
        (None, 200, False),
    ],
)
def test_a_set_that_is_not_the_published_one_is_told(sweep, official, told):
    records = scores("made/one", FULL, [1.0] * 5, length=None)
    found = summarize(records, {"sweep": sweep, "tasks": {"made/one": {"n": 5, "official": official}}})
    assert ("made/one: 5 samples, the published set has 200" in [one.text for one in found.problems]) == told


def test_what_is_wrong_is_counted():
    flags = ("truncated", "evidence_cut", "stopped_by_length", "no_bos", "special_tokens_in_context", "odd")
    records = [record(n_cut=5, evidence_left=0.5, flags=flags)]
    told = {problem.sentence: problem.count for problem in summarize(records, {}).problems}
    assert told == {
        "records lost tokens to middle truncation": 1,
        "records lost evidence that the answer needs before the model saw it, so no cache could have answered": 1,
        "prompts do not begin with BOS: the tokenizer puts it in front of plain text, the chat template did not": 1,
        "contexts hold text that the tokenizer reads as control tokens, which the model may obey": 1,
        "answers were stopped by the length limit of their benchmark": 1,
        'records carry the flag "odd"': 1,
    }


@pytest.mark.parametrize("flag", ["truncated", "no_bos", "special_tokens_in_context", "odd"])
def test_evidence_is_spoken_of_only_where_it_was_cut(flag):
    found = summarize([record(flags=(flag,))], {})
    assert [problem.count for problem in found.problems] == [1]
    assert "evidence" not in found.problems[0].text
    assert found.rows[0].evidence_lost == 0


def test_margins_come_from_the_manifest():
    arm = [0.99 + 0.001 * (index % 5) for index in range(40)]
    records = scores("made/one", FULL, [1.0] * 40) + scores("made/one", ARM, arm)
    strict = {"margins": {"task": 0.001, "macro": 0.001}}
    assert next(row for row in summarize(records, {}).rows if row.arm == ARM).verdict == "no loss"
    assert next(row for row in summarize(records, strict).rows if row.arm == ARM).verdict == "loss"
