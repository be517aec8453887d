"""A row of the table of ``dampr verify``, and comparing a backend's results with the float64 reference."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from dampr import names, ops

from .tolerances import Comparison, as_tf32, compare

TF32 = "tf32"  # the "dtype" of a row with float32 tensors whose products are in TF32
_REDRAWN = 3  # how many times signs are drawn again, to find the size of the terms of sums
_SMALL = 2**16  # larger problems keep their signs, because among so many results some do not cancel anyway


@dataclass
class Row:
    """One line of the table: all cases of one operator on one backend in one dtype (or :data:`TF32`).

    Attributes:
        op: the name of the operator.
        backend, device, dtype: where and in which dtype it ran.
        cases: how many tensors were compared.
        worst: the comparison nearest to, or furthest beyond, its bound.
        worst_case: the name of its case.
        failures: the cases beyond their bound.
        part: (i, n): the row has every n-th case, from case i on.
    """

    op: str
    backend: names.Backend
    device: str
    dtype: str
    cases: int = 0
    worst: Comparison | None = None
    worst_case: str = ""
    failures: list[str] = field(default_factory=list)
    part: tuple[int, int] = (0, 1)  # (i, n): the row has every n-th case, from case i on

    @property
    def ok(self) -> bool:
        return not self.failures

    @property
    def tf32(self) -> bool:
        return self.dtype == TF32

    def add(self, case: str, result: Comparison) -> None:
        """Count the comparison of one tensor; ``case``: a name for it."""
        self.cases += 1
        if not result.ok:
            self.failures.append(f"{case}: {result}")
        if self.worst is None or result.share > self.worst.share:
            self.worst, self.worst_case = result, case

    def has(self, index: int) -> bool:
        """Whether the case of this index belongs to the row's part."""
        return index % self.part[1] == self.part[0]

    def join(self, other: Row) -> None:
        """Merge another part of the same row into this one."""
        self.cases += other.cases
        self.failures += other.failures
        if self.worst is None or (other.worst is not None and other.worst.share > self.worst.share):
            self.worst, self.worst_case = other.worst, other.worst_case
        self.part = (0, 1)

    def as_dict(self) -> dict[str, Any]:
        return {**{key: value for key, value in asdict(self).items() if key != "part"}, "ok": self.ok}


def exact(name: str, out: Tensor, expected: Tensor) -> Comparison:
    """A comparison that passes only if all elements are equal."""
    same = out.shape == expected.shape and bool((out.cpu() == expected.cpu()).all())
    return Comparison(name, 0.0 if same else float("inf"), 0.0, 0.0, 0.0)


def rounded(row: Row, data: dict[str, Tensor], dy: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """(data, dy) for the baseline of a row: in TF32, x, weight and dy are rounded as a tensor core reads them."""
    if not row.tf32:
        return data, dy
    return {name: as_tf32(t) if name in ("x", "weight") else t for name, t in data.items()}, as_tf32(dy)


def other_signs(
    data: dict[str, Tensor], dy: Tensor, keep: tuple[str, ...] = ()
) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
    """Yield a small problem a few times with random signs of the tensors and of ``dy``; nothing for a large one.

    Sums that nearly cancel are small and hide how large their terms are, which bounds the rounding error. With other
    signs, other sums cancel, so the largest results show the size of the terms. Gates, which are not negative, and the
    tensors named in ``keep`` keep their signs.
    """
    if dy.numel() + sum(t.numel() for t in data.values()) > _SMALL:
        return
    generator = torch.Generator().manual_seed(5)

    def signed(t: Tensor) -> Tensor:
        """t with random signs."""
        return t * (2 * torch.randint(0, 2, t.shape, generator=generator) - 1).to(t.dtype)

    for _ in range(_REDRAWN):
        yield {name: t if name in keep or name.endswith("gate") else signed(t) for name, t in data.items()}, signed(dy)


class Expected:
    """What a result is compared with.

    Args:
        row: the row that the case belongs to.
        dtype: the dtype of the row.
        once: computes outputs and gradients by name with the reference, from (dtype, data, dy).
        data: the inputs by name.
        dy: the gradient of the output.
        keep: inputs whose signs must not change.

    Attributes:
        truth: the results in float64.
        baseline: the results of the reference in ``dtype``.
        alike: the results for other signs, see there.
    """

    def __init__(
        self,
        row: Row,
        dtype: torch.dtype,
        once: Callable[[torch.dtype, dict[str, Tensor], Tensor], dict[str, Tensor]],
        data: dict[str, Tensor],
        dy: Tensor,
        keep: tuple[str, ...] = (),
    ) -> None:
        self.truth, self.baseline = once(torch.float64, data, dy), once(dtype, *rounded(row, data, dy))
        self._once, self._problem = once, (data, dy, keep)

    @functools.cached_property
    def alike(self) -> list[dict[str, Tensor]]:
        """The float64 results of the same problem with random signs, a dict for each try; computed on first access.

        Where terms cancel, the true result is small although its terms are large. The results with other signs show the
        size of the terms, to which rounding errors are proportional.
        """
        return [self._once(torch.float64, *other) for other in other_signs(*self._problem)]


def upstream(dy: Tensor, dtype: torch.dtype, device: str) -> Tensor:
    """The gradient of an output, converted for a backward.

    A gradient that is one number, expanded, stays expanded; a conversion would make it dense.
    """
    expanded = dy.numel() > 0 and not any(dy.stride())
    return torch.ones((), dtype=dtype, device=device).expand(dy.shape) if expanded else dy.to(device, dtype)


def on_backend(backend: names.Backend | None) -> AbstractContextManager[None]:
    """A context in which operators run on ``backend``; None changes nothing."""
    return nullcontext() if backend is None else ops.backend(backend)


def compare_all(row: Row, case: str, out: dict[str, Tensor], expected: Expected, dtype: torch.dtype) -> None:
    """Compare every output and gradient of a case and add the results to its row.

    Other signs (:attr:`Expected.alike`) are computed only if a bound is exceeded, because they can only raise a bound.
    """
    for name, o in out.items():
        against = expected.truth[name], expected.baseline[name], dtype
        result = compare(name, o, *against, tf32=row.tf32)
        if not result.ok:
            result = compare(name, o, *against, alike=[other[name] for other in expected.alike], tf32=row.tf32)
        row.add(f"{case}: {name}", result)
