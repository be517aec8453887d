"""Every private part of torch (and one of Python) that :mod:`dampr.ops` and :mod:`dampr.nn` use, by its purpose.

A later torch may lack one of them. Then the stand-in beside it is used: results stay the same, and what is lost is time
or memory. tests/ops/test_torch_corners.py checks each part, and each stand-in, against its comment here.

What a training step calls is bound to a name here once. In a tiny layer one Python call, or one lookup of an attribute,
takes as long as the computation.
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
    """The attribute of ``torch`` at a dotted path, or ``stand_in`` if there is none."""
    found: Any = torch
    for name in path.split("."):
        found = getattr(found, name, None)
    return stand_in if found is None else found


# Does something (a compiler, a mode, a transform) have to see operators? Each stand-in answers yes; every call then
# goes through operators and plain PyTorch, which is slower.

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
    """``function.apply`` without the wrapper in Python.

    ``Function.apply`` binds its arguments to a signature before it calls the ``apply`` of its base class; this takes 60
    us, as long as a small layer. Stand-in: ``function.apply``.
    """
    return getattr(super(Function, function), "apply", function.apply)


# What autograd knows about tensors and graphs.

# (tensor) -> whether it is a view of another tensor; autograd forbids changing such a result in place. Stand-in: yes.
is_view: Callable[[Tensor], bool] = part("Tensor._is_view", lambda _: True)
# (tensor, shape) -> the same values, not marked as a view. Stand-in: a copy.
as_no_view: Callable[[Tensor, Sequence[int]], Tensor] = part(
    "ops.aten._unsafe_view", lambda t, shape: t.reshape(shape).clone()
)
# (tensors) -> None: tells autograd that C++ code has changed these tensors. Stand-in: the public function, slower.
count_as_written: Callable[[Sequence[Tensor]], None] = part(
    "_C._increment_version", lambda tensors: torch.autograd.graph.increment_version(tensors)
)
# () -> the hooks that see what autograd saves, or None. Stand-in: (), which is not None, so saved tensors are never
# overwritten.
hooks_on_saved: Callable[[], Any] = partial(
    part("_C._autograd._top_saved_tensors_default_hooks", lambda ignore_is_tracing: ()), False
)
# () -> whether the graph is kept after this backward. Stand-in: yes, so saved tensors are never overwritten.
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
    """Decorator: torch.compile runs ``function`` while it traces, and treats the result as a constant.

    ``torch.compiler.assume_constant_result`` does the same, but imports all of dynamo. A later torch without this mark
    traces the function.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def environment_entry(name: str) -> tuple[MutableMapping[Any, Any], Any]:
    """(mapping, key) so that ``mapping.get(key)`` is None if the environment variable ``name`` is not set.

    The mapping is the dictionary inside of ``os.environ``. ``os.environ.get`` raises and catches an exception for a
    variable that is not set, which takes 1 us. Stand-in: ``os.environ`` and ``name``.
    """
    inside = getattr(os.environ, "_data", None)
    return (os.environ, name) if inside is None else (inside, os.environ.encodekey(name))
