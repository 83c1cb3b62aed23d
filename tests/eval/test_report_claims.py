"""What a report claims: noise labels, verdicts beside other arms, macro retention and intervals; cases computed by hand."""

import pytest
from record_factory import scores, small_run

from kvpress_eval.records import FULL, FULL_REPEAT
from kvpress_eval.report import summarize
from kvpress_eval.report.export import to_json
from kvpress_eval.report.text import verdict_words

ARM = "snapkv@25%"


def row_of(found, task="made/one"):
    return next(row for row in found.rows if (row.task, row.arm) == (task, ARM))


def macro_of(found):
    return next(row for row in found.macro if row.arm == ARM and row.scope == "all")


def test_two_repeats_with_a_flip_do_not_hide_a_loss():
    full = scores("made/one", FULL, [1.0] * 100)
    arm = scores("made/one", ARM, [0.0] * 40 + [1.0] * 60)
    found = summarize(full + arm + scores("made/one", FULL_REPEAT, [0.0, 1.0]), {})
    assert found.noise[0].mean_abs == 50
    for row in (row_of(found), macro_of(found)):
        assert (row.verdict, bool(row.within_noise)) == ("loss", False)


def test_a_loss_is_never_in_noise_even_where_the_repeat_lost_as_much():
    full = scores("made/one", FULL, [1.0] * 100)
    arm = scores("made/one", ARM, [0.0] * 40 + [1.0] * 60)
    found = summarize(full + arm + scores("made/one", FULL_REPEAT, [0.0] * 8 + [1.0] * 12), {})
    assert found.noise[0].delta_low < row_of(found).delta < found.noise[0].delta_high
    for row in (row_of(found), macro_of(found)):
        assert (row.verdict, row.within_noise) == ("loss", False)


def test_a_small_difference_is_in_noise_even_where_no_repeat_flipped():
    full, repeat = scores("made/one", FULL, [1.0] * 100), scores("made/one", FULL_REPEAT, [1.0] * 20)
    near = summarize(full + repeat + scores("made/one", ARM, [0.0] + [1.0] * 99), {})
    assert row_of(near).within_noise is True
    assert macro_of(near).within_noise is True
    far = summarize(full + repeat + scores("made/one", ARM, [0.0] * 20 + [1.0] * 80), {})
    assert row_of(far).within_noise is False  # 20 points; of 20 repeats without a flip, 16 may


def test_repeats_of_all_tasks_count_together_for_the_macro_row():
    records = []
    for task in ("made/one", "made/two"):
        records += scores(task, FULL, [1.0] * 40) + scores(task, ARM, [0.0] + [1.0] * 39)
        records += scores(task, FULL_REPEAT, [1.0] * 10)
    assert row_of(summarize(records, {})).within_noise is None
    assert macro_of(summarize(records, {})).within_noise is True
    fewer = [one for one in records if (one.arm, one.sample) != (FULL_REPEAT, "9")]
    assert macro_of(summarize(fewer, {})).within_noise is None


def test_one_of_many_equal_arms_is_not_enough_for_no_loss():
    """128 items without a change: p of a loss of 3 points or more is 0.97^128 = 0.020."""
    full, plan = scores("made/one", FULL, [1.0] * 128), {"margins": {"task": 0.03, "macro": 0.03}}
    alone = macro_of(summarize(full + scores("made/one", ARM, [1.0] * 128), plan))
    assert (alone.verdict, alone.p_no_loss) == ("no loss", pytest.approx(0.97**128, rel=0.02))
    many = [one for name in "abcdefghi" for one in scores("made/one", f"{name}@25%", [1.0] * 128)]
    found = summarize(full + scores("made/one", ARM, [1.0] * 128) + many, plan)
    beside = macro_of(found)
    assert (beside.verdict, beside.p_no_loss) == ("undecided", pytest.approx(10 * alone.p_no_loss))
    assert beside.lower_bound == alone.lower_bound > -3
    assert "beside so many arms" in verdict_words(beside, 0.03)
    # equal p values stay what they are under Benjamini and Hochberg
    assert row_of(found).verdict == "no loss"
    exported = to_json(found)
    assert {"p_no_loss"} <= exported["macro"][0].keys() & exported["rows"][0].keys()


def test_few_graded_items_get_the_bounded_lower_end():
    values = [0.99 + 0.001 * (index % 5) for index in range(29)]
    row = row_of(summarize(scores("made/one", FULL, [1.0] * 29) + scores("made/one", ARM, values), {}))
    assert row.interval == "bootstrap"
    assert row.ci_low > -1
    assert row.lower_bound < -100 * (1 - 0.05 ** (1 / 29))
    assert row.verdict == "loss"  # there is one; that it is small is not shown


def test_retention_of_a_macro_row_counts_tasks_and_not_items():
    many = scores("made/many", FULL, [1.0] * 20) + scores("made/many", ARM, [1.0] * 20)
    nothing = scores("made/nothing", FULL, [0.0] * 5) + scores("made/nothing", ARM, [1.0] * 5)
    row = macro_of(summarize(small_run() + many + nothing, {}))
    assert row.retention == pytest.approx((50 + 0 + 100) / 3)
    assert (row.kept, row.solved) == (22, 29)


def test_the_task_without_clusters_is_named():
    records = small_run() + [one.model_copy(update={"cluster": "x"}) for one in scores("made/qa_1", FULL, [1.0] * 5)]
    records += [one.model_copy(update={"cluster": "x"}) for one in scores("made/qa_1", ARM, [1.0] * 5)]
    found = summarize(records, {})
    assert macro_of(found).ci_low is None
    assert "macro rows of made have no interval: qa_1 has 1 cluster" in [problem.text for problem in found.problems]
