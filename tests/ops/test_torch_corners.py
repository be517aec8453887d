"""The private parts of torch that dampr uses are there, and do what is said of them; so do their stand-ins."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.autograd import forward_ad, profiler
from torch.utils._python_dispatch import TorchDispatchMode

from dampr.ops import _torch


class Double(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return 2 * x

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return 2 * grads[0]


def test_a_part_that_torch_does_not_have_is_its_stand_in() -> None:
    assert _torch.part("nn.Linear", None) is torch.nn.Linear
    assert _torch.part("_C._of_no_torch", "stand-in") == _torch.part("nothing.at.all", "stand-in") == "stand-in"


def test_dispatch_modes_are_counted() -> None:
    class Mode(TorchDispatchMode):
        pass

    assert _torch.count_dispatch_modes() == 0
    with Mode():
        assert _torch.count_dispatch_modes() == 1


def test_a_transform_is_seen() -> None:
    seen = []
    torch.func.vmap(lambda x: seen.append(_torch.in_torch_func()) or x)(torch.ones(2))
    assert [*seen, _torch.in_torch_func()] == [True, False]


def test_a_batch_of_gradients_is_told_from_a_gradient() -> None:
    seen = []

    class Spy(Double):
        @staticmethod
        def backward(ctx: Any, *grads: Any) -> Any:
            seen.append(_torch.is_batch_of_gradients(grads[0]))
            return 2 * grads[0]

    x = torch.ones(2, requires_grad=True)
    y = Spy.apply(x)
    torch.autograd.grad(y, x, torch.eye(2), is_grads_batched=True, retain_graph=True)
    torch.autograd.grad(y, x, torch.ones(2))
    assert seen == [True, False]


def test_forward_mode_is_seen() -> None:
    assert _torch.forward_mode_level() == -1
    with forward_ad.dual_level():
        assert _torch.forward_mode_level() == 0
    assert hasattr(forward_ad, "_current_level")


def test_a_profiler_is_seen() -> None:
    assert _torch.is_profiled() is False
    with profiler.profile():
        assert _torch.is_profiled() is True
    assert hasattr(profiler, "_is_profiler_enabled")


def test_a_function_is_applied_without_the_step_in_python() -> None:
    x = torch.ones(2, requires_grad=True)
    apply = _torch.apply_of(Double)
    assert apply.__name__ == "apply"
    assert not hasattr(apply, "__code__")  # a function of C
    apply(x).sum().backward()
    assert torch.equal(x.grad, torch.full((2,), 2.0))


def test_a_view_is_known_and_can_be_one_no_longer() -> None:
    x = torch.ones(2, 3)
    view = x.view(6)
    assert (_torch.is_view(x), _torch.is_view(view)) == (False, True)
    own = _torch.as_no_view(view, view.shape)
    assert not _torch.is_view(own)
    assert torch.equal(own, view)


def test_a_write_by_address_is_counted() -> None:
    x, y = torch.ones(2), torch.ones(2)
    _torch.count_as_written([x, y])
    assert (x._version, y._version) == (1, 1)


def test_hooks_on_what_is_saved_are_seen() -> None:
    assert _torch.hooks_on_saved() is None
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t):
        assert _torch.hooks_on_saved() is not None


def test_a_graph_that_is_kept_is_told_from_one_that_is_not() -> None:
    seen = []

    class Spy(Double):
        @staticmethod
        def backward(ctx: Any, *grads: Any) -> Any:
            seen.append(_torch.is_graph_kept())
            return 2 * grads[0]

    y = Spy.apply(torch.ones((), requires_grad=True))
    y.backward(retain_graph=True)
    y.backward()
    assert seen == [True, False]


@pytest.mark.skipif(_torch.onednn_linear is None, reason="torch without oneDNN")
def test_a_product_of_onednn_is_a_linear_map() -> None:
    x, weight, bias = torch.randn(5, 4), torch.randn(3, 4), torch.randn(3)
    assert _torch.onednn_linear is not None
    for b in (bias, None):
        torch.testing.assert_close(_torch.onednn_linear(x, weight, b), torch.nn.functional.linear(x, weight, b))


@pytest.mark.filterwarnings("ignore:TF32 acceleration")
def test_whether_onednn_is_enabled_follows_its_flags() -> None:
    for enabled in (False, True):
        with torch.backends.mkldnn.flags(enabled=enabled):
            assert _torch.is_onednn_enabled() is enabled


def test_a_constant_to_compilers_is_not_traced() -> None:
    seen = []

    @_torch.constant_to_compilers
    def asked() -> int:
        seen.append(os.getpid())  # more than dynamo would trace
        return 3

    compiled = torch.compile(lambda x: x * asked(), fullgraph=True, backend="eager")
    assert torch.equal(compiled(torch.ones(2)), torch.full((2,), 3.0))
    assert seen


def test_an_environment_variable_is_read_as_it_is_now(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DAMPR_TEST", raising=False)
    mapping, key = _torch.environment_entry("DAMPR_TEST")
    assert mapping is not os.environ
    assert mapping.get(key) is None
    monkeypatch.setenv("DAMPR_TEST", "set")
    assert mapping.get(key) in ("set", b"set")


# What a torch without any of these parts would compute, in a process of its own: the module is loaded first, and finds
# nothing where it looks.
WITHOUT = """
import importlib.util, sys, types

def without(path):
    import torch
    fakes = {name: types.ModuleType(name) for name in ("torch", "torch.autograd")}
    fakes["torch"].Tensor = fakes["torch.autograd"].Function = type("Function", (), {})
    for name in ("forward_ad", "profiler"):
        setattr(fakes["torch.autograd"], name, types.ModuleType(name))
    kept = {name: sys.modules[name] for name in fakes}
    spec = importlib.util.spec_from_file_location("dampr.ops._torch", path)
    corners = importlib.util.module_from_spec(spec)
    sys.modules.update(fakes)
    spec.loader.exec_module(corners)
    sys.modules.update(kept)
    corners.torch = torch
    corners.apply_of = lambda function: function.apply
    sys.modules[spec.name] = corners
    return corners
"""
STEPS = """
import torch
from dampr import nn

def steps():
    found = []
    for layer, shape in (
        (nn.GatedLinear(6, 5), (3, 6)),
        (nn.GatedLinear(512, 512), (64, 512)),
        (nn.GatedLinear(6, 5, per_sample=True, granularity="input"), (3, 2, 6)),
        (nn.GatedLinear(6, 5, granularity="weight"), (3, 6)),
        (nn.GatedConv2d(4, 8, 3), (2, 4, 7, 7)),
        (nn.GatedBatchNorm2d(4, per_sample=True, activation="relu"), (2, 4, 7, 7)),
        (nn.GatedBatchNorm2d(4), (2, 4, 7, 7)),
        (nn.GatedLayerNorm(6), (3, 6)),
    ):
        torch.manual_seed(3)
        for p in layer.parameters():
            p.data.uniform_(-0.5, 0.5)
        layer, x = layer.double(), torch.randn(shape, dtype=torch.float64, requires_grad=True)
        y = layer(x)
        y.square().sum().backward()
        found += [y.detach(), x.grad, *(p.grad for p in layer.parameters())]
    return found
"""


def test_a_torch_without_any_of_them_computes_the_same(tmp_path: Path) -> None:
    space: dict[str, Any] = {}
    exec(STEPS, space)
    path, out = _torch.__file__, tmp_path / "found.pt"
    program = f"{WITHOUT}\ncorners = without({path!r})\n{STEPS}\ntorch.save(steps(), {str(out)!r})\n"
    program += "assert corners.count_dispatch_modes() == 1 and corners.onednn_linear is None and corners.is_profiled()"
    subprocess.run([sys.executable, "-c", program], check=True, timeout=300)
    for found, right in zip(torch.load(out), space["steps"](), strict=True):
        torch.testing.assert_close(found, right)


def test_each_stand_in_is_on_the_safe_side() -> None:
    space: dict[str, Any] = {}
    exec(WITHOUT, space)
    kept = sys.modules["dampr.ops._torch"]
    try:
        less = space["without"](_torch.__file__)
    finally:
        sys.modules["dampr.ops._torch"] = kept
    x = torch.ones(2, 3)
    assert all((less.in_torch_func(), less.is_profiled(), less.is_batch_of_gradients(x), less.is_view(x)))
    assert less.count_dispatch_modes() == 1
    assert less.forward_mode_level() == 0
    assert less.hooks_on_saved() is not None
    assert less.is_graph_kept()
    assert not less.is_onednn_enabled()
    assert torch.equal(less.as_no_view(x.view(6), (6,)), x.view(6))
    less.count_as_written([x])
    assert x._version == 1
