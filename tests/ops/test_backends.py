"""Choosing a backend: names are checked, an explicit choice is honoured or refused with the reason, auto falls back on absence only."""

import pytest
import torch

import dampr
from dampr.ops import backends


def test_an_unknown_name_is_refused_before_any_work():
    with pytest.raises(ValueError, match="name='no-such-backend'.*'auto', 'triton', 'cpp', 'reference'"), dampr.backend("no-such-backend"):
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
