"""Choosing a backend: names are checked, an explicit choice is honoured or refused with the reason,
auto falls back on absence only.
"""

import importlib
import warnings

import pytest
import torch

import dampr
from dampr import reference
from dampr.ops import GatePair, Window, backends, gated_conv2d
from dampr.spec import hard_concrete


def test_an_unknown_name_is_refused_before_any_work():
    with (
        pytest.raises(ValueError, match="name='no-such-backend'.*'auto', 'triton', 'cpp', 'reference'"),
        dampr.backend("no-such-backend"),
    ):
        pytest.fail("the block was entered")


def test_the_environment_variable_decides_and_is_checked(monkeypatch):
    monkeypatch.setenv("DAMPR_BACKEND", "reference")
    assert backends.choose(torch.device("cpu"), torch.float32)[0] == "reference"
    monkeypatch.setenv("DAMPR_BACKEND", "fast")
    with pytest.raises(ValueError, match="DAMPR_BACKEND='fast'"):
        dampr.nn.GatedLinear(4, 4)(torch.randn(2, 4))


def test_blocks_nest_and_end():
    with dampr.backend("reference"):
        with dampr.backend("auto"):
            pass
        assert backends.choose(torch.device("cpu"), torch.float32) == ("reference", "chosen by dampr.backend(...)")
    assert backends.choose(torch.device("cpu"), torch.float32)[0] in ("cpp", "reference")
    with pytest.raises(KeyError), dampr.backend("reference"):
        raise KeyError
    assert not backends._chosen


def test_a_backend_that_cannot_take_the_tensors_says_why():
    if backends.why_not("triton", torch.device("cpu"), torch.float32) is None:
        pytest.skip("the interpreter is on: triton runs CPU tensors")
    with pytest.raises(dampr.BackendUnavailableError, match="'triton'"), dampr.backend("triton"):
        dampr.nn.GatedLinear(4, 4)(torch.randn(2, 4))


def test_auto_falls_back_on_absence_and_never_after_a_failure(monkeypatch):
    monkeypatch.setitem(backends._modules, "cpp", (None, "ImportError: not built"))
    monkeypatch.setattr(backends, "_selected", {})
    name, reason = backends.choose(torch.device("cpu"), torch.float32)
    assert (name, reason) == ("reference", "cpp is not to be had: ImportError: not built")
    with pytest.raises(dampr.BackendUnavailableError, match="not built"), dampr.backend("cpp"):
        pytest.fail("the block was entered")

    class Broken:
        unavailable = staticmethod(lambda device, dtype: None)

        @staticmethod
        def sample_gates_fwd(*args):
            raise ArithmeticError("broken kernel")

    monkeypatch.setitem(backends._modules, "cpp", (Broken, ""))
    monkeypatch.setattr(backends, "_selected", {})
    with pytest.raises(ArithmeticError, match="broken kernel"):
        dampr.functional.sample_gates(torch.zeros(3), seed=1)


def test_backend_info_names_every_backend_and_the_reason_of_absence(monkeypatch):
    monkeypatch.setitem(backends._modules, "cpp", (None, "ImportError: no module named dampr._C"))
    monkeypatch.setattr(backends, "_selected", {})
    info = dampr.backend_info()
    assert info["reference"] == "available"
    assert info["cpp"] == "missing: ImportError: no module named dampr._C"
    assert info["torch"] == torch.__version__


@pytest.mark.parametrize("places", [("input",), ("output",), ("input", "output")], ids=str)
def test_the_convolution_of_live_blocks_runs_where_it_is_registered(places, cpu_backend):
    """Its own operator, which no route of the CPU takes, gives what the others give, to the second derivative."""
    generator = torch.Generator().manual_seed(2)
    shapes = {"x": (2, 4, 5, 4), "weight": (6, 2, 2, 3), "bias": (6,), "input": (4,), "output": (6,)}
    made = {name: torch.randn(shape, generator=generator).double().requires_grad_() for name, shape in shapes.items()}
    seed = torch.tensor([3])
    log_alphas = [made[name] if name in places else None for name in ("input", "output")]
    pair = GatePair(*log_alphas, *[None if t is None else seed for t in log_alphas], hard_concrete())
    leaves = [made[name] for name in ("x", "weight", "bias", *places)]
    window = Window((2, 1), (1, 0), (1, 1), 2)
    fused = gated_conv2d(*leaves[:3], pair, window)
    right = reference.gated_conv(*leaves[:3], *pair, **window._asdict())
    assert fused.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(fused, right)
    found = []
    for y in (fused, right):
        first = torch.autograd.grad(y.square().sum(), leaves, create_graph=True)
        alone = torch.autograd.grad(y.square().sum(), leaves, retain_graph=True)
        found.append([*first, *alone, *torch.autograd.grad(sum(g.square().sum() for g in first), leaves)])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)
    torch.testing.assert_close(torch.ops.dampr.gated_conv2d_fwd(*leaves[:3], *pair[:5], *window), right)


@pytest.mark.parametrize("name", ["reference", "cpp"])
def test_every_operator_registered_for_the_cpu_has_an_implementation(name):
    if dampr.backend_info()[name].startswith("missing"):
        pytest.skip("no extension")
    module = importlib.import_module(f"dampr.ops.backend_{name}")
    registered = {op.split("::")[1] for op in torch._C._dispatch_get_all_op_names() if op.startswith("dampr::")}
    assert registered
    registered.remove("next_seed")  # of dampr.gates.draws, the same on all backends
    assert [op for op in sorted(registered) if not hasattr(module, op)] == []


def test_a_missing_extension_is_said_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(backends._modules, "cpp", (None, "ImportError: no module named dampr._C"))
    monkeypatch.setattr(backends, "_warned", set())
    monkeypatch.delenv("DAMPR_BACKEND", raising=False)
    where = torch.device("cpu"), torch.float32
    with dampr.backend("reference"), warnings.catch_warnings():
        warnings.simplefilter("error")
        assert backends.choose(*where)[0] == "reference"
    with pytest.warns(RuntimeWarning, match="no fused kernels for cpu tensors .ImportError: no module named dampr._C"):
        assert backends.choose(*where)[0] == "reference"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert backends.choose(*where)[0] == "reference"
