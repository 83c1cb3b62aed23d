"""Replayed decode steps: the same tokens as eager ones, and a stated reason wherever a step cannot be replayed.

No device here: the "capture" keeps the step and runs it again, which is what a replay does, while everything that the
host knows of lengths is hidden, which is what a graph does.
"""

import contextlib
import functools
from types import SimpleNamespace

import pytest
import torch
from generation_support import BlindCapture, kept, small
from tiny_models import prompts, tiny

import kvpress
import kvpress.graphs

GREEDY = {"do_sample": False, "pad_token_id": 0}
TRITON = kvpress.BackendRequest("triton", page_size=16)
GRAPHS = kvpress.BackendRequest("triton", page_size=16, graphs=True)


@pytest.fixture
def replays(monkeypatch):
    real = kvpress.graphs.graphed_decode
    monkeypatch.setattr(kvpress.graphs, "graphed_decode", functools.partial(real, capture=BlindCapture()))


def generate(model, contract, backend, n=10, **inputs):
    with kvpress.compress(model, contract, backend=backend) as session:
        tokens = model.generate(max_new_tokens=n, **GREEDY, **inputs)
    return tokens, session


@pytest.mark.usefixtures("replays")
@pytest.mark.parametrize("name", ["full", "adakv"])
def test_replayed_steps_give_the_same_tokens(name):
    model, contract = tiny("llama", layers=1), kvpress.Contract.load("full") if name == "full" else small(name)
    inputs = {"input_ids": prompts(1, 40)[0], "n": 20}
    expected, eager = generate(model, contract, "torch", **inputs)
    tokens, session = generate(model, contract, GRAPHS, **inputs)
    assert torch.equal(tokens, expected)
    assert kept(session) == kept(eager)
    record = session.cache.plan.graphs
    assert record.replayed == 19
    assert record.captured <= 3, "once, and where a row outgrew the table"
    assert record.eager == {}
    assert session.report().to_dict()["decode"].startswith("CUDA graph, 19 steps replayed")


@pytest.mark.usefixtures("replays")
def test_beams_are_replayed():
    model = tiny("llama", layers=1)
    ids, mask = prompts(2, 30, [9, 0])
    inputs = {"input_ids": ids, "attention_mask": mask, "num_beams": 2, "n": 4}
    expected, _ = generate(model, "full", "torch", **inputs)
    tokens, session = generate(model, "full", GRAPHS, **inputs)
    assert torch.equal(tokens, expected)
    assert session.cache.plan.graphs.replayed == 3


@pytest.mark.usefixtures("replays")
def test_a_second_turn_and_what_comes_after_a_replay():
    """Host and device agree after replays: later turns append behind them."""
    model = tiny("llama", layers=1)
    ids, more = prompts(1, 30)[0], prompts(1, 6, seed=3)[0]

    def two_turns(backend):
        with kvpress.CompressedCache(model, "full", backend=backend) as cache:
            first = model.generate(input_ids=ids, past_key_values=cache, max_new_tokens=3, **GREEDY)
            turn = torch.cat([first, more], 1)
            return model.generate(input_ids=turn, past_key_values=cache, max_new_tokens=3, **GREEDY)

    assert torch.equal(two_turns("torch"), two_turns(GRAPHS))


@pytest.mark.usefixtures("replays")
@pytest.mark.parametrize(
    ("family", "contract", "reason"),
    [
        ("gemma3", "full", "sliding-window layers"),
        ("llama", small("snapkv", schedule={"kind": "every_decode_steps", "n": 4}), "evicts while decoding"),
    ],
)
def test_what_cannot_be_replayed_runs_eagerly_and_says_why(family, contract, reason):
    model, (ids, _) = tiny(family, layers=2 if family == "gemma3" else 1), prompts(1, 48)
    expected, _ = generate(model, contract, "torch", n=4, input_ids=ids)
    tokens, session = generate(model, contract, GRAPHS, n=4, input_ids=ids)
    assert torch.equal(tokens, expected)
    assert session.cache.plan.graphs.replayed == 0
    report = session.report()
    assert report.to_dict()["decode"].startswith("3 steps eager: ")
    assert reason in report.to_dict()["decode"]
    assert reason in str(report)


@pytest.mark.usefixtures("replays")
def test_torch_backend_cannot_be_replayed():
    request = kvpress.BackendRequest("auto", graphs=True)
    _, session = generate(tiny("llama", layers=1), "full", request, n=3, input_ids=prompts(1, 20)[0])
    assert "only the Triton backend over the paged store" in session.report().to_dict()["decode"]


def test_without_a_device_the_report_says_so():
    _, session = generate(tiny("llama", layers=1), "full", GRAPHS, n=3, input_ids=prompts(1, 20)[0])
    assert "CUDA graphs need a CUDA or ROCm device, and this is 'cpu'" in session.report().to_dict()["decode"]


def test_a_capture_that_fails_leaves_the_run_intact(monkeypatch):
    class Failing(BlindCapture):
        def capture(self, step, device):
            raise RuntimeError("operation not permitted when stream is capturing\nmore")

    real = kvpress.graphs.graphed_decode
    monkeypatch.setattr(kvpress.graphs, "graphed_decode", functools.partial(real, capture=Failing()))
    model, ids = tiny("llama", layers=1), prompts(1, 20)[0]
    expected, _ = generate(model, "full", "torch", n=5, input_ids=ids)
    tokens, session = generate(model, "full", GRAPHS, n=5, input_ids=ids)
    assert torch.equal(tokens, expected)
    told = session.report().to_dict()["decode"]
    assert told == "4 steps eager: capturing the step failed: operation not permitted when stream is capturing"


def test_the_model_is_as_before():
    model = tiny("llama", layers=1)
    generate(model, "full", GRAPHS, n=2, input_ids=prompts(1, 20)[0])
    assert "forward" not in model.__dict__


@pytest.mark.parametrize("error", [RuntimeError("out of memory"), KeyboardInterrupt()])
@pytest.mark.parametrize("when", ["warm_up", "replay"])
def test_an_aborted_step_leaves_host_and_device_agreed(monkeypatch, when, error):
    """Half of the layers have stored the token when it happens; nothing may be stored twice, or counted by one side."""
    model, ids = tiny("llama", layers=2), prompts(1, 20)[0]
    mlp, failing = model.model.layers[1].mlp, [False]
    real = type(mlp).forward

    def forward(self, x):
        if self is mlp and failing[0]:
            failing[0] = False
            raise error
        return real(self, x)

    monkeypatch.setattr(type(mlp), "forward", forward)

    class Aborting(BlindCapture):
        def warm_up(self, step, device):
            failing[0] = when == "warm_up"
            super().warm_up(step, device)

        def capture(self, step, device):
            replay = super().capture(step, device)

            def aborted():
                failing[0] = when == "replay"
                replay()

            return aborted

    original = kvpress.graphs.graphed_decode
    monkeypatch.setattr(kvpress.graphs, "graphed_decode", functools.partial(original, capture=Aborting()))
    expected, _ = generate(model, "full", "torch", n=4, input_ids=ids)
    with kvpress.CompressedCache(model, "full", backend=GRAPHS) as cache:
        if isinstance(error, KeyboardInterrupt):
            with pytest.raises(KeyboardInterrupt):
                model.generate(input_ids=ids, past_key_values=cache, max_new_tokens=4, **GREEDY)
        else:
            tokens = model.generate(input_ids=ids, past_key_values=cache, max_new_tokens=4, **GREEDY)
            assert torch.equal(tokens, expected)
            assert "capturing the step failed: out of memory" in cache.report().to_dict()["decode"]
        for layer in cache.compressed_layers:
            store = layer.storage.store
            assert store.device_lengths.tolist() == store.lengths == [layer.seen] * 2
            assert store.segment(0)[2].tolist() == list(range(layer.seen))
            assert layer._pending is None


@pytest.mark.usefixtures("replays")
def test_more_than_logits_is_not_replayed():
    model, ids = tiny("llama", layers=1), prompts(1, 20)[0]
    with kvpress.compress(model, "full", backend=GRAPHS) as session:
        out = model.generate(
            input_ids=ids, max_new_tokens=3, return_dict_in_generate=True, output_hidden_states=True, **GREEDY
        )
    assert all(step is not None and len(step) == 2 for step in out.hidden_states)
    assert "output_hidden_states was asked for" in session.report().to_dict()["decode"]


@pytest.mark.usefixtures("replays")
def test_scores_of_earlier_steps_are_not_overwritten():
    model, ids = tiny("llama", layers=1), prompts(1, 20)[0]
    found = []
    for backend in ("torch", GRAPHS):
        with kvpress.compress(model, "full", backend=backend):
            wanted = {"return_dict_in_generate": True, "output_logits": True, "prompt_lookup_num_tokens": 2}
            found.append(model.generate(input_ids=ids, max_new_tokens=5, **wanted, **GREEDY).logits)
    torch.testing.assert_close(*found)


def test_a_capture_runs_on_its_device_and_puts_everything_back(monkeypatch):
    """The order of calls, with a stand-in for torch.cuda; what a device does with them is not tested here."""
    calls = []

    @contextlib.contextmanager
    def device(where):
        calls.append(f"on {where}")
        yield
        calls.append("off")  # not reached where a step fails: the real one always leaves

    @contextlib.contextmanager
    def graph(made, stream, capture_error_mode):
        calls.append(f"capture on {stream}")
        yield
        calls.append("captured")

    cuda = torch.cuda
    monkeypatch.setattr(cuda, "CUDAGraph", lambda: SimpleNamespace(replay=lambda: calls.append("replay")))
    monkeypatch.setattr(cuda, "device", device)
    monkeypatch.setattr(cuda, "graph", graph)
    monkeypatch.setattr(cuda, "Stream", lambda where: f"own stream of {where}")
    monkeypatch.setattr(cuda, "current_stream", lambda where: "the old stream")
    monkeypatch.setattr(cuda, "set_stream", lambda stream: calls.append(f"back to {stream}"))
    monkeypatch.setattr(cuda, "get_sync_debug_mode", lambda: 0)
    monkeypatch.setattr(cuda, "set_sync_debug_mode", lambda mode: calls.append(f"sync {mode}"))

    def failing():
        raise RuntimeError("a step that waits")

    capture, where = kvpress.graphs.CudaCapture(), torch.device("cuda:1")
    assert capture.obstacle(where) is None
    capture.warm_up(lambda: calls.append("step"), where)
    assert calls == ["sync error", "on cuda:1", "step", "off", "sync 0"]
    calls.clear()
    capture.capture(lambda: calls.append("step"), where)()
    begun = ["on cuda:1", "capture on own stream of cuda:1"]
    assert calls == [*begun, "step", "captured", "back to the old stream", "off", "replay"]
    for run, expected in (
        (capture.warm_up, ["sync error", "on cuda:1", "sync 0"]),
        (capture.capture, [*begun, "back to the old stream"]),
    ):
        calls.clear()
        with pytest.raises(RuntimeError):
            run(failing, where)
        assert calls == expected
