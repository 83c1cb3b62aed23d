"""Training: only the bases move, it helps, it goes on where it stopped, and it stops where numbers end."""

import copy
import json

import pytest
import torch
from conftest import byte_tokenizer
from matryoshka_support import HEAD_DIM, bases_of, small_model, some_windows
from transformers import LlamaForCausalLM

from kvpress.errors import InputError, KvpressError
from kvpress.matryoshka.bases import Ranks
from kvpress.matryoshka.judge import judge_all
from kvpress.matryoshka.make import train_projection
from kvpress.matryoshka.recipe import Start, load_recipe
from kvpress.matryoshka.schedule import EIGHTHS, Schedule
from kvpress.matryoshka.train import Trainer, TrainSettings
from kvpress.matryoshka.training_state import points

SHAPES = [(2, HEAD_DIM, HEAD_DIM)] * 2
SETTINGS = TrainSettings(
    steps=6, windows=2, window=24, learning_rate=0.03, mean_learning_rate=0.01, warmup=1, shares=(0.25, 0.5, 1.0),
    judge_every=2, judge_windows=2,
)  # fmt: skip


class Windows:
    """What the trainer reads of a text."""

    def __init__(self, ids):
        self.ids = ids

    def shuffled(self, seed):
        while True:
            yield from self.ids

    def some(self, n, seed=0):
        return self.ids[:n]


def trainer(folder, settings=SETTINGS, model=None, identity=None, watch=lambda point: None, start="random"):
    model = model or small_model(torch.float32)
    start = bases_of(model, start)
    text, judged = Windows(some_windows(5, 24)), Windows(some_windows(2, 24, seed=1))
    return Trainer(model, start, settings, text, judged, folder, identity or {"model": "small"}, watch)


def test_training_brings_the_bases_nearer_to_the_model_and_moves_nothing_else(tmp_path):
    model = small_model(torch.float32)
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    watched = []
    # the text is random, so imitating it would lead away from the model
    settings = SETTINGS.model_copy(update={"steps": 30, "kl_weight": 1.0, "ce_weight": 0.0})
    training = trainer(tmp_path, settings, watch=watched.append)
    start = training.trained()
    found = training.run()
    assert all(torch.equal(weight, before[name]) for name, weight in model.named_parameters())
    assert all(weight.requires_grad and weight.grad is None for weight in model.parameters())
    assert found.orthogonality_error() < 1e-6
    windows, ranks = some_windows(5, 24), Ranks.uniform(SHAPES, 0.5)
    old, new = judge_all(model, windows, [(start, ranks), (found, ranks)])
    assert new.kl.mean() < 0.8 * old.kl.mean()
    assert [point.step for point in watched] == list(range(31))
    assert points(tmp_path / "curve.jsonl") == watched
    assert [point.step for point in watched if point.judge_kl is not None] == list(range(0, 31, 2))


def test_a_training_that_was_stopped_goes_on_as_if_it_had_not(tmp_path):
    unbroken = trainer(tmp_path / "one").run()

    class Stop(Exception):
        pass

    def stop_at_five(point):
        if point.step == 5:
            raise Stop

    with pytest.raises(Stop):
        trainer(tmp_path / "two", watch=stop_at_five).run()
    with (tmp_path / "two" / "curve.jsonl").open("a") as file:
        file.write('{"step": 6, "lo')  # killed while writing
    second = trainer(tmp_path / "two")
    assert second.step == 4
    resumed = second.run()
    for a, b in zip([*unbroken.keys, *unbroken.means], [*resumed.keys, *resumed.means], strict=True):
        assert torch.equal(a, b)
    one, two = (points(tmp_path / name / "curve.jsonl") for name in ("one", "two"))
    assert [(p.step, p.loss, p.judge_kl) for p in one] == [(p.step, p.loss, p.judge_kl) for p in two]


def test_a_finished_training_is_only_read(tmp_path):
    found = trainer(tmp_path).run()
    again = trainer(tmp_path)
    assert again.step == 6
    assert all(torch.equal(a, b) for a, b in zip(found.keys, again.run().keys, strict=True))


def test_another_training_is_refused(tmp_path):
    trainer(tmp_path)
    with pytest.raises(InputError, match=r"holds another training \(it differs in model\)"):
        trainer(tmp_path, identity={"model": "large"})


def test_a_damaged_state_is_told(tmp_path):
    trainer(tmp_path).run()
    state = tmp_path / "state.safetensors"
    state.write_bytes(state.read_bytes()[:100])
    with pytest.raises(InputError, match=r"state.safetensors' is damaged .*: delete it to begin again"):
        trainer(tmp_path)


def test_training_stops_at_nan_and_keeps_the_last_good_state(tmp_path):
    training = trainer(tmp_path)

    def poison(point):
        if point.step == 3:
            training.bases.keys[0].data[0, 5, 2] = torch.nan

    training.watch = poison
    with pytest.raises(
        KvpressError,
        match=r"training stopped at step 4: .* the state of step 2 in .* is good: start again in another folder",
    ):
        training.run()
    step, good = training.last_good()
    assert step == 2
    again = trainer(tmp_path)
    assert again.step == 2
    assert again.trained().orthogonality_error() < 1e-6
    assert all(torch.equal(a, b) for a, b in zip(good.keys, again.trained().keys, strict=True))


def test_a_training_that_goes_on_from_its_start_looks_at_it_once(tmp_path):
    class Stop(Exception):
        pass

    def stop(point):
        if point.step == 1:
            raise Stop

    training = trainer(tmp_path)
    training.watch = stop
    with pytest.raises(Stop):
        training.run()
    trainer(tmp_path).run()
    steps = [point.step for point in points(tmp_path / "curve.jsonl")]
    assert steps == list(range(len(steps)))


def test_a_training_goes_on_from_the_start_that_it_had(tmp_path):
    """Free numbers are relative to the start; another start must not slip in under them."""
    found = trainer(tmp_path, SETTINGS.model_copy(update={"steps": 2})).run()
    again = trainer(tmp_path, SETTINGS.model_copy(update={"steps": 2}), start="pca").run()
    assert all(torch.equal(a, b) for a, b in zip(found.keys, again.keys, strict=True))


def test_means_can_stay(tmp_path):
    settings = SETTINGS.model_copy(update={"train_means": False, "steps": 2})
    training = trainer(tmp_path, settings)
    before = [mean.clone() for mean in training.trained().means]
    found = training.run()
    assert all(torch.equal(a, b) for a, b in zip(before, found.means, strict=True))


def test_the_schedule_draws_every_entry_alone_and_repeats_itself():
    schedule = Schedule([(2, 64, 128)] * 3, EIGHTHS)
    drawn = [schedule.draw(1, step) for step in range(300)]
    assert drawn == [schedule.draw(1, step) for step in range(300)]
    assert drawn != [schedule.draw(2, step) for step in range(300)]
    keys = torch.tensor([one.keys for one in drawn])  # [300, 3, 2]
    assert set(keys.flatten().tolist()) == set(range(8, 65, 8))
    assert {rank for one in drawn for layer in one.values for rank in layer} == set(range(16, 129, 16))
    for entry in keys.flatten(1).T:
        counts = torch.bincount(entry // 8, minlength=9)[1:]
        assert (counts > 15).all()  # 37.5 expected each
    flat = keys.flatten(1).double()
    correlation = torch.corrcoef(flat.T) - torch.eye(6)
    assert correlation.abs().max() < 0.25


@pytest.mark.parametrize(
    ("shares", "sentence"),
    [
        ((0.5,), "a rank schedule must hold the share 1"),
        ((), "a rank schedule must hold the share 1"),
        ((0.3, 1.0), "the share 0.3 does not divide 64 dimensions into multiples of 8: use multiples of 0.125"),
        ((0.05, 1.0), "the share 0.05 does not divide"),
    ],
)
def test_schedules_that_do_not_divide(shares, sentence):
    with pytest.raises(InputError, match=sentence):
        Schedule([(2, 64, 64)], shares)


def test_the_rate_warms_up_and_falls_to_a_tenth():
    settings = TrainSettings(steps=110, warmup=10)
    assert settings.rate(0) == pytest.approx(0.1)
    assert settings.rate(9) == pytest.approx(1)
    assert settings.rate(60) == pytest.approx(0.55)
    assert settings.rate(110) == pytest.approx(0.1)


def test_the_folder_says_what_it_is(tmp_path):
    trainer(tmp_path, identity={"model": "small", "seed": 3})
    assert json.loads((tmp_path / "training.json").read_text()) == {"model": "small", "seed": 3}


def test_a_model_on_two_devices_is_refused_before_anything_is_read(tmp_path):
    model = copy.deepcopy(small_model(torch.float32))
    model.lm_head.to("meta")
    with pytest.raises(InputError, match=r"one device, and this one lies on cpu and meta: name one of them"):
        train_projection(model, byte_tokenizer(), load_recipe("python"), "small", tmp_path)
    assert not list(tmp_path.iterdir())


def test_planes_need_a_rotation_of_all_dimensions(tmp_path):
    recipe = load_recipe("python").model_copy(update={"start": Start(kind="planes")})
    config = copy.deepcopy(small_model(torch.float32).config)
    config.rope_parameters = {**config.rope_parameters, "partial_rotary_factor": 0.25}
    with pytest.raises(InputError, match=r"start 'planes' .* this model rotates 25% of them: use start 'query'"):
        train_projection(LlamaForCausalLM(config), byte_tokenizer(), recipe, "small", tmp_path)
