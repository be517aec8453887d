"""A case: one call, what may come of it, and the verdict."""

from __future__ import annotations

import copy
import math
import re
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import dampr

DOCUMENTED = (
    ValueError,
    TypeError,
    dampr.BackendUnavailableError,
    dampr.BudgetError,
    dampr.CompactionError,
    dampr.ConversionError,
    dampr.FileError,
    dampr.PlanError,
)
TOLERANCE = {torch.float64: 1e-8, torch.float32: 2e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}


@dataclass
class Case:
    """One call ``function(*args, **kwargs)``.

    Attributes:
        names: what an error may name.
        valid: whether it has to succeed.
        truth: the same call by other means, in float64; its result is compared place by place where it is finite.
        baseline: the same by other means in the same precision; a result may be as far from the truth as a few times
            this one.
        like: the call of torch that this one takes the place of; where that raises, an error of the same type will do,
            and success will not.
    """

    function: Callable[..., Any]
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    names: tuple[str, ...] = ()
    valid: bool = False
    truth: Callable[[], Any] | None = None
    baseline: Callable[[], Any] | None = None
    like: Callable[[], Any] | None = None

    def __str__(self) -> str:
        shown = [_short(a) for a in self.args] + [f"{k}={_short(v)}" for k, v in self.kwargs.items()]
        return f"{getattr(self.function, '__qualname__', self.function)}({', '.join(shown)})"


def judge(case: Case) -> str | None:
    """What is wrong with what a call does; None where nothing is."""
    given = (case.args, case.kwargs)
    before = _snapshot(given)
    dense = _outcome(case.like) if case.like is not None else None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = _outcome(lambda: case.function(*case.args, **case.kwargs))
    if isinstance(found, Exception):
        complaint = _of_error(case, found, dense)
        if complaint is None and not _same(before, _snapshot(given)):
            complaint = f"{type(found).__name__} was raised, and arguments have changed"
        return complaint
    if isinstance(dense, Exception):
        return f"accepted, and torch raises {type(dense).__name__}: {dense}"
    if (case.truth is None and any(t.is_meta for t in _tensors(given))) or isinstance(found, nn.Module):
        return None  # torch itself makes something of a tensor on the meta device beside others
    expected = dense if case.truth is None else _outcome(case.truth)
    if isinstance(expected, Exception):
        return f"accepted, and the reference raises {type(expected).__name__}: {expected}"
    complaint = None if expected is None else _differs(found, expected, [])
    if complaint is not None and case.baseline is not None:
        complaint = _differs(found, expected, _tensors(_outcome(case.baseline)))
    return complaint


def _outcome(call: Callable[[], Any]) -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return call()
    except Exception as error:  # whatever it is, it is the outcome
        return error


def _of_error(case: Case, error: Exception, dense: Any) -> str | None:
    said = f"{type(error).__name__}: {error}"
    if isinstance(dense, Exception) and (type(error) is type(dense) or isinstance(error, (ValueError, TypeError))):
        return None
    if case.valid:
        return f"a valid call raises {said}"
    if "allocate memory" in said or "Storage size calculation overflowed" in said:
        return None
    if not isinstance(error, DOCUMENTED) or isinstance(error, UnicodeError):
        return f"raises {said}"
    if (
        error.__cause__ is None
        and error.__context__ is not None
        and not isinstance(error.__context__, (TypeError, ValueError, KeyError))
    ):
        return f"an error within an error: {said}"
    if not any(re.search(rf"(?<![A-Za-z_]){re.escape(name)}(?![A-Za-z_])", str(error)) for name in case.names):
        return f"names no argument: {said}"
    return None


def _snapshot(value: Any) -> list[Any]:
    found: list[Any] = []
    for leaf in pytree.tree_leaves(value):
        if isinstance(leaf, nn.Module):
            found += [type(m).__name__ for m in leaf.modules()] + [m.training for m in leaf.modules()]
            found += [
                leaf.state_dict(),
                *[p.grad is not None for p in leaf.parameters()],
                *[p.requires_grad for p in leaf.parameters()],
            ]
        found.append(leaf)
    return [copy.deepcopy(x.detach()) if isinstance(x, Tensor) else x for x in pytree.tree_leaves(found)]


def _same(a: list[Any], b: list[Any]) -> bool:
    return len(a) == len(b) and all(_equal(x, y) for x, y in zip(a, b, strict=True))


def _equal(x: Any, y: Any) -> bool:
    if isinstance(x, Tensor) and isinstance(y, Tensor):
        if x.is_meta or x.is_sparse or x.dtype != y.dtype or x.shape != y.shape:
            return x.dtype == y.dtype and x.shape == y.shape
        return torch.equal(x.nan_to_num(), y.nan_to_num()) and torch.equal(x.isnan(), y.isnan())
    return x is y or bool(x == y) or (isinstance(x, float) and isinstance(y, float) and math.isnan(x) and math.isnan(y))


def _differs(found: Any, expected: Any, baseline: list[Tensor]) -> str | None:
    """How a result is not the expected one, which may be in another precision."""
    a, b = (_tensors(value) for value in (found, expected))
    if len(a) != len(b):
        return f"{len(a)} tensors came out, expected {len(b)}"
    # a gradient in float32 is of what was rounded before
    rounded = max((TOLERANCE.get(out.dtype, 0.0) for out in a), default=0.0)
    for i, (out, truth) in enumerate(zip(a, b, strict=True)):
        if out.shape != truth.shape:
            return f"result {i} has shape {tuple(out.shape)}, expected {tuple(truth.shape)}"
        if out.is_meta or truth.is_meta or not (out.is_floating_point() and truth.is_floating_point()):
            continue
        truth = truth.detach().double()
        limit = torch.finfo(out.dtype).max / 1e6
        sure = truth.isfinite() & (truth.abs() < limit)
        if not bool(sure.any()):
            continue
        gap = (out.detach().double() - truth)[sure].abs()
        scale = max(1.0, float(truth[sure].abs().max()))
        own = (baseline[i].detach().double() - truth)[sure].abs().nan_to_num() if baseline else gap.new_zeros(())
        if not bool((gap <= rounded * scale + 8 * own.max()).all()):
            return f"result {i} is off by {float(gap.max()):.3g} at a size of {scale:.3g} ({out.dtype})"
    return None


def _tensors(value: Any) -> list[Tensor]:
    return [t for t in pytree.tree_leaves(value) if isinstance(t, Tensor)]


def _short(value: Any) -> str:
    if isinstance(value, Tensor):
        content = (
            " with NaN or inf"
            if value.is_floating_point()
            and not value.is_meta
            and not value.is_sparse
            and not bool(value.isfinite().all())
            else ""
        )
        how = (
            f"{value.dtype}, {tuple(value.shape)}, strides {value.stride() if not value.is_sparse else 'sparse'}, "
            f"{value.device}"
        )
        return f"<{how}{content}>"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{k!r}: {_short(v)}" for k, v in value.items()) + "}"
    if isinstance(value, nn.Module):
        return " ".join(str(value).split())[:160]
    return repr(value)[:120]
