"""The backend rule: what `auto` takes, what is refused and with which sentence, and that reports name it."""

from types import SimpleNamespace

import pytest
import torch
from tiny_models import prompts, tiny

import kvpress
import kvpress_kernels.launch
from kvpress.backend import BackendRequest
from kvpress.cache.formats import LayerFormat
from kvpress.cache.plan import Plan
from kvpress.errors import InputError

CPU, GPU = torch.device("cpu"), torch.device("cuda:0")
DIMS = (128, 128)


@pytest.fixture
def compiled(monkeypatch):
    """As in a process whose kernels are not interpreted."""
    monkeypatch.setattr(kvpress_kernels.launch, "INTERPRETED", False)


def chosen(device=GPU, dtype=torch.bfloat16, dims=DIMS, **request):
    found = BackendRequest(**request).resolve(device, dtype, dims)
    return found.name, found.store


@pytest.mark.usefixtures("compiled")
def test_auto_takes_the_kernels_where_they_can_run():
    assert chosen() == ("triton", "paged")
    assert chosen(CPU) == ("torch", "packed")
    assert chosen(dtype=torch.float64) == ("torch", "packed")
    assert chosen(dims=(512, 512)) == ("torch", "packed")
    assert chosen(store="packed") == ("torch", "packed")
    assert chosen(store="paged") == ("triton", "paged")
    assert chosen(CPU, store="paged") == ("torch", "paged")
    assert chosen(backend="torch") == ("torch", "packed")


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize(
    ("stored", "expected"),
    [(None, ("triton", "paged")), (torch.int8, ("triton", "paged")), (torch.float16, ("torch", "packed"))],
)
def test_auto_keeps_eight_bits_in_pages(stored, expected):
    plan = Plan(kvpress.Contract.load("full"), 1, formats=[LayerFormat(dtype=stored)])
    there = SimpleNamespace(device=GPU, dtype=torch.bfloat16, shape=(1, 2, 3, 128))
    backend = plan.backend_for(there, there)
    assert (backend.name, backend.store) == expected


def test_another_dtype_in_pages_is_refused():
    plan = Plan(kvpress.Contract.load("full"), 1, request=BackendRequest("torch", "paged"))
    plan.formats = [LayerFormat(dtype=torch.float16)]
    there = torch.zeros(1, 2, 3, 128)
    with pytest.raises(InputError, match="the paged store keeps the model's dtype or int8"):
        plan.backend_for(there, there)


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize(
    ("request_", "words"),
    [
        ({"device": CPU}, "the kernels need a CUDA or ROCm device, and this is 'cpu'"),
        ({"dtype": torch.float64}, "bfloat16, float16 and float32, not float64"),
        ({"dims": (512, 64)}, "up to 256, not 512"),
    ],
)
def test_triton_by_name_is_refused_where_it_cannot_run(request_, words):
    with pytest.raises(InputError, match="backend 'triton' cannot be used") as error:
        chosen(backend="triton", **request_)
    assert words in str(error.value)
    assert "use backend 'auto' or 'torch'" in str(error.value)


def test_triton_without_the_package_is_refused(monkeypatch):
    monkeypatch.setattr("kvpress_kernels.dispatch.find_spec", lambda name: None)
    with pytest.raises(InputError, match="pip install triton"):
        chosen(backend="triton")
    assert chosen() == ("torch", "packed")


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"backend": "trition"}, "did you mean 'triton'"),
        ({"store": "page"}, "did you mean 'paged'"),
        ({"page_size": 24}, "use 16, 32 or 64"),
        ({"backend": "triton", "store": "packed"}, "the Triton kernels read pages"),
    ],
)
def test_wrong_requests(wrong, words):
    with pytest.raises(InputError, match=words):
        BackendRequest(**wrong)


@pytest.mark.usefixtures("compiled")
def test_a_refusal_comes_before_anything_is_changed():
    model = tiny("llama")
    with pytest.raises(InputError, match="cannot be used"):
        kvpress.compress(model, "snapkv", backend="triton")
    with pytest.raises(InputError, match="cannot be used"):
        kvpress.CompressedCache(model, "snapkv", backend="triton")
    assert "generate" not in model.__dict__


def test_the_interpreter_is_never_taken_by_itself():
    assert chosen(CPU) == ("torch", "packed")
    assert chosen(CPU, backend="triton") == ("triton", "paged")


def test_reports_name_the_backend_and_the_reason():
    model = tiny("llama")
    for backend, name, store in (("auto", "torch", "packed"), (BackendRequest("torch", "paged"), "torch", "paged")):
        with kvpress.compress(model, "snapkv", budget=0.6, backend=backend) as session:
            model.generate(input_ids=prompts(1, 64)[0], max_new_tokens=2, do_sample=False, pad_token_id=0)
        report = session.report().to_dict()
        assert (report["backend"], report["store"]) == (name, store)
        assert report["page_size"] == (32 if store == "paged" else None)
        assert report["backend_reason"]
        assert f"backend {name} (" in str(session.report())
        assert f"{store} store" in str(session.report())


def test_kernels_launch_on_the_device_of_their_tensors(monkeypatch):
    """Triton takes the current device; the layers of a model may lie on others."""
    from kvpress_kernels.dispatch import _on_its_device

    events = []

    class Guard:
        def __init__(self, device):
            self.device = device

        def __enter__(self):
            events.append(self.device)

        def __exit__(self, *error):
            events.append("left")

    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "device", Guard)

    class Somewhere:
        def __init__(self, device):
            self.device = torch.device(device)

    launch = _on_its_device(lambda first, value=0: events.append(value))
    for device, value in (("cuda:1", 1), ("cuda:0", 2), ("cpu", 3)):
        launch(Somewhere(device), value=value)
    assert events == [torch.device("cuda:1"), 1, "left", 2, 3]
