"""The step bench: what it returns, and that wrong results get no time. Speed itself is not asserted."""

import io

import pytest
import torch
from generation_support import BlindCapture
from rich.console import Console

import kvpress
from kvpress.bench import step
from kvpress.bench.step import print_step_bench, run_step_bench
from kvpress.cache.paged import PagedStore
from kvpress.errors import InputError, KvpressError

SMALL = {"shape": "tiny", "batch": 2, "context": 64, "steps": 2, "dtype": "float32", "static": False}


@pytest.mark.parametrize("request_", [kvpress.BackendRequest(), kvpress.BackendRequest("torch", "paged", 16)])
def test_ratios_and_table(request_):
    result = run_step_bench(**SMALL, request=request_)
    assert result["eager_vs_floor"] == result["seconds"]["eager"] / result["floor_seconds"]
    assert result["seconds"]["captured"] is None
    assert result["captured_note"] == "eager" or "only the Triton backend" in result["captured_note"]
    assert result["setting"]["kept_tokens"] == 16
    assert result["bytes"]["kept_cache"] >= 2 * 2 * 2 * 16 * (2 * 8 * 4 + 4)
    text = io.StringIO()
    print_step_bench(result, Console(file=text, width=200))
    assert "not measured" in text.getvalue()
    assert "TB/s measured here" in text.getvalue()


def test_captured_steps_are_timed(monkeypatch):
    """With a stand-in for the capture the arm runs, on the kernels in the interpreter."""
    real = step.graphed_decode
    monkeypatch.setattr(step, "graphed_decode", lambda model, cache: real(model, cache, capture=BlindCapture()))
    result = run_step_bench(**SMALL, request=kvpress.BackendRequest("triton", page_size=16))
    assert result["captured_vs_floor"] == result["seconds"]["captured"] / result["floor_seconds"]
    assert result["captured_note"].startswith("CUDA graph")


def test_wrong_results_get_no_time(monkeypatch):
    real = PagedStore.decode
    calls = []

    def wrong_from_the_second_step_on(self, query, **options):
        calls.append(self)
        return real(self, query, **options) * (1 if len(calls) <= 2 else 2)

    monkeypatch.setattr(PagedStore, "decode", wrong_from_the_second_step_on)
    with pytest.raises(KvpressError, match="no time is reported"):
        run_step_bench(**SMALL, request=kvpress.BackendRequest("torch", "paged", 16))


def test_refusals():
    with pytest.raises(InputError, match=r"did you mean 'llama-3\.1-8b'"):
        run_step_bench(shape="llama-3.1")
    with pytest.raises(InputError, match="keeps none"):
        run_step_bench(**{**SMALL, "budget": 0.001})
    with pytest.raises(InputError, match="dtype"):
        run_step_bench(**{**SMALL, "dtype": "float64"})


def test_the_static_arm_runs(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda model, **options: model)
    result = run_step_bench(**{**SMALL, "static": True})
    assert result["tokens_per_second_vs_static_full"] == result["seconds"]["static_full"] / result["seconds"]["eager"]
