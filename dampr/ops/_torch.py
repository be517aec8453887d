"""Every private part of torch (and one of Python) that :mod:`dampr.ops` and :mod:`dampr.nn` use, by what it is for.

A later torch may not have one of them. Then the stand-in beside it is used: the results stay the same, and what is lost
is time or memory. tests/ops/test_torch_corners.py holds each part, and each stand-in, to what is said of it here.

What a step calls is a function of C, bound once: beside a tiny layer a call of Python, or an attribute of an attribute,
takes as long as what it asks for.
"""

from __future__ import annotations

import os
from collections.abc import Callable, MutableMapping, Sequence
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.autograd import Function, forward_ad, profiler

AnyFunction = TypeVar("AnyFunction", bound=Callable[..., Any])


def part(path: str, stand_in: Any) -> Any:
    """What ``torch`` has at a dotted path, or ``stand_in`` where it has nothing there."""
    found: Any = torch
    for name in path.split("."):
        found = getattr(found, name, None)
    return stand_in if found is None else found


# Who has to see operators. Without these parts somebody always has to: every call goes by operators and plain PyTorch.

# () -> how many TorchDispatchModes are active
count_dispatch_modes: Callable[[], int] = part("_C._len_torch_dispatch_stack", lambda: 1)
# () -> whether torch.func transforms what runs here
in_torch_func: Callable[[], bool] = part("_C._are_functorch_transforms_active", lambda: True)
# (tensor) -> whether it is a batch of gradients, as is_grads_batched=True makes one
is_batch_of_gradients: Callable[[Tensor], bool] = part("_C._functorch.is_legacy_batchedtensor", lambda _: True)
# () -> how many levels of forward mode are active, less one
forward_mode_level: Callable[[], int] = partial(vars(forward_ad).get, "_current_level", 0)  # type: ignore[assignment]
# () -> whether a profiler records operators
is_profiled: Callable[[], bool] = partial(vars(profiler).get, "_is_profiler_enabled", True)  # type: ignore[assignment]


def apply_of(function: type[Function]) -> Callable[..., Any]:
    """``function.apply`` without its first step.

    ``Function.apply`` binds its arguments to a signature before it calls the ``apply`` of its base class, which alone
    takes as long as a small layer (60 us). Stand-in: ``function.apply``.
    """
    return getattr(super(Function, function), "apply", function.apply)


# What autograd remembers of tensors and graphs.

# (tensor) -> whether it is a view of another, which autograd lets nobody change in place. Stand-in: every tensor is.
is_view: Callable[[Tensor], bool] = part("Tensor._is_view", lambda _: True)
# (tensor, shape) -> the same values, which autograd takes for no view. Stand-in: a copy.
as_no_view: Callable[[Tensor, Sequence[int]], Tensor] = part(
    "ops.aten._unsafe_view", lambda t, shape: t.reshape(shape).clone()
)
# (tensors) -> None: tells autograd that they were written to by their addresses. Stand-in: the public, slower one.
count_as_written: Callable[[Sequence[Tensor]], None] = part(
    "_C._increment_version", lambda tensors: torch.autograd.graph.increment_version(tensors)
)
# () -> the hooks that see what a node saves, or None. Stand-in: there may be some, so what is saved is not overwritten.
hooks_on_saved: Callable[[], Any] = partial(
    part("_C._autograd._top_saved_tensors_default_hooks", lambda ignore_is_tracing: ()), False
)
# () -> whether the graph is kept after this backward. Stand-in: it is, so what is saved is not overwritten.
is_graph_kept: Callable[[], bool] = part("_C._autograd._get_current_graph_task_keep_graph", lambda: True)


# Products of oneDNN. Stand-in: none, so products are torch's own.

_pointwise = part("ops.mkldnn._linear_pointwise", None)
# (x, weight, bias) -> x W^T + b by oneDNN, or None
onednn_linear: Callable[[Tensor, Tensor, Tensor | None], Tensor] | None = (
    None if _pointwise is None else partial(_pointwise, attr="none", scalars=[], algorithm="")
)
# () -> whether torch.backends.mkldnn is enabled, which torch.backends.mkldnn.flags can change
is_onednn_enabled: Callable[[], bool] = part("_C._get_mkldnn_enabled", lambda: False)


def constant_to_compilers(function: AnyFunction) -> AnyFunction:
    """Have torch.compile run ``function`` while it traces, and take what it returns as a constant.

    ``torch.compiler.assume_constant_result`` does the same, and imports all of dynamo. A later torch that does not know
    the mark traces the function.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def environment_entry(name: str) -> tuple[MutableMapping[Any, Any], Any]:
    """A mapping and a key, so that ``mapping.get(key)`` is None where the environment variable ``name`` is not set.

    The mapping is the dictionary inside of ``os.environ``: for what is not set, ``os.environ.get`` raises and catches
    an exception, which takes 1 us. Stand-in: ``os.environ`` and ``name``.
    """
    inside = getattr(os.environ, "_data", None)
    return (os.environ, name) if inside is None else (inside, os.environ.encodekey(name))
