"""A row of ``dampr verify``, and how what a backend gives is held to the float64 reference."""

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

TF32 = "tf32"  # as a row's dtype: tensors of float32, their products in TF32
_REDRAWN = 3  # how often signs are drawn again to learn the size of what is added up
_SMALL = 2**16  # in problems of more elements than this not everything cancels


@dataclass
class Row:
    """One line of the table: an op on a backend in a dtype (or :data:`TF32`), over all its cases."""

    op: str
    backend: names.Backend
    device: str
    dtype: str
    cases: int = 0
    worst: Comparison | None = None
    worst_case: str = ""
    failures: list[str] = field(default_factory=list)
    part: tuple[int, int] = (0, 1)  # which of how many: every so many-th case

    @property
    def ok(self) -> bool:
        return not self.failures

    @property
    def tf32(self) -> bool:
        return self.dtype == TF32

    def add(self, case: str, result: Comparison) -> None:
        self.cases += 1
        if not result.ok:
            self.failures.append(f"{case}: {result}")
        if self.worst is None or result.share > self.worst.share:
            self.worst, self.worst_case = result, case

    def has(self, index: int) -> bool:
        """Whether a case belongs to this part of a row."""
        return index % self.part[1] == self.part[0]

    def join(self, other: Row) -> None:
        """Add another part of the same row."""
        self.cases += other.cases
        self.failures += other.failures
        if self.worst is None or (other.worst is not None and other.worst.share > self.worst.share):
            self.worst, self.worst_case = other.worst, other.worst_case
        self.part = (0, 1)

    def as_dict(self) -> dict[str, Any]:
        return {**{key: value for key, value in asdict(self).items() if key != "part"}, "ok": self.ok}


def exact(name: str, out: Tensor, expected: Tensor) -> Comparison:
    """A comparison that only equality passes."""
    same = out.shape == expected.shape and bool((out.cpu() == expected.cpu()).all())
    return Comparison(name, 0.0 if same else float("inf"), 0.0, 0.0, 0.0)


def rounded(row: Row, data: dict[str, Tensor], dy: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """What the baseline of a row gets: in TF32 its factors as a tensor core reads them."""
    if not row.tf32:
        return data, dy
    return {name: as_tf32(t) if name in ("x", "weight") else t for name, t in data.items()}, as_tf32(dy)


def other_signs(
    data: dict[str, Tensor], dy: Tensor, keep: tuple[str, ...] = ()
) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
    """The same problem a few times with signs drawn again, but for gates and what is named, if it is small."""
    if dy.numel() + sum(t.numel() for t in data.values()) > _SMALL:
        return
    generator = torch.Generator().manual_seed(5)

    def signed(t: Tensor) -> Tensor:
        return t * (2 * torch.randint(0, 2, t.shape, generator=generator) - 1).to(t.dtype)

    for _ in range(_REDRAWN):
        yield {name: t if name in keep or name.endswith("gate") else signed(t) for name, t in data.items()}, signed(dy)


class Expected:
    """What the reference gives for a problem: in float64, in the dtype of a row and, when it is asked for, in float64
    with other signs.

    ``once(dtype, data, dy)`` computes outputs and gradients by name.
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
        return [self._once(torch.float64, *other) for other in other_signs(*self._problem)]


def upstream(dy: Tensor, dtype: torch.dtype, device: str) -> Tensor:
    """The gradient of an output for a backward; one that is a single 1, expanded, stays that.

    (Converting would make it dense.)
    """
    expanded = dy.numel() > 0 and not any(dy.stride())
    return torch.ones((), dtype=dtype, device=device).expand(dy.shape) if expanded else dy.to(device, dtype)


def on_backend(backend: names.Backend | None) -> AbstractContextManager[None]:
    return nullcontext() if backend is None else ops.backend(backend)


def compare_all(row: Row, case: str, out: dict[str, Tensor], expected: Expected, dtype: torch.dtype) -> None:
    """Add every tensor of a case to its row.

    What else the signs could give is looked at where a bound is passed: it only raises bounds.
    """
    for name, o in out.items():
        against = expected.truth[name], expected.baseline[name], dtype
        result = compare(name, o, *against, tf32=row.tf32)
        if not result.ok:
            result = compare(name, o, *against, alike=[other[name] for other in expected.alike], tf32=row.tf32)
        row.add(f"{case}: {name}", result)
