"""Parts of a plan: checks of the model, hooks on the model's calls, and the distance of distillation."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .wrapped import check_bare

SEEN = 100  # a model counts as trained if one of its norms has seen that many batches


class _Uncompiled:
    """A hook that torch.compile calls without looking into it. Unlike the wrapper that torch makes for this, it can be
    pickled.
    """

    def __init__(self, hook: Callable[..., None]) -> None:
        self.hook, self._called = hook, torch.compiler.disable(hook)

    def __call__(self, *args: Any) -> None:
        self._called(*args)

    def __reduce__(self) -> Any:
        return _Uncompiled, (self.hook,)


def uncompiled(hook: Callable[..., None]) -> Callable[..., None]:
    """``hook``, hidden from torch.compile. If the process has not imported torch's compiler, which takes seconds, the
    hook is returned as it is.
    """
    return _Uncompiled(hook) if "torch._dynamo" in sys.modules else hook


def divergence(output: Any, taught: Any, temperature: float = 2.0) -> Tensor:
    """T^2 KL(softmax(taught / T) | softmax(output / T)) of logits (rows, classes), the mean over rows, a scalar (Hinton
    et al. 2015).

    Raises ValueError for outputs that are not such logits.
    """
    output, taught = (getattr(value, "logits", value) for value in (output, taught))
    if not isinstance(output, Tensor) or output.dim() != 2:
        shape = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
        raise ValueError(
            f"distill: the model's output is {shape}, expected logits (rows, classes); pass distill_loss for another"
        )
    student, teacher = (F.log_softmax(t.float() / temperature, 1) for t in (output, taught))
    return temperature**2 * F.kl_div(student, teacher, reduction="batchmean", log_target=True)


def check_model(model: Any) -> None:
    """Raise TypeError or ValueError for a model that a plan cannot change."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model={model!r:.80}: expected a torch.nn.Module")
    check_bare(model, "a plan changes its layers")


def is_trained(model: nn.Module) -> bool:
    """Whether a norm with running statistics has seen :data:`SEEN` batches."""
    seen = [count for m in model.modules() if isinstance(count := getattr(m, "num_batches_tracked", None), Tensor)]
    return any(not count.is_meta and int(count) >= SEEN for count in seen)
