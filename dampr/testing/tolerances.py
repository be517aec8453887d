"""The tolerance rules that dampr's kernels are tested with, as assertions for any kernel.

An output is right if, against a float64 truth, (1) its largest error is at most twice that of plain PyTorch in the same
dtype, plus 1e-6 of the largest true value, and (2) its RMS error is at most a fixed share of the true RMS, by dtype.
Noise and masks are compared exactly, not by these rules.

In half precision, 1e-6 is far less than one rounding (2^-9 in bfloat16), a result is rounded several times, and for a
few elements plain PyTorch may be exact by chance. There, one unit in the last place of the largest true value takes the
place of 1e-6. The same holds for float32 whose products are in TF32, which has the 11 significant bits of float16;
plain PyTorch then gets rounded data.

If a sum cancels, its value says nothing about the size of its terms, to which rounding errors are proportional; with
few elements, no other element may show it. ``alike`` takes the truths of the same problem with other signs, and the
largest value is searched in all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor

# (M, K, N) of a linear layer: empty, ones, primes, one more and one less than a tile, K smaller than a tile
HARD_SHAPES = ((0, 5, 3), (1, 1, 1), (5, 7, 3), (1, 129, 65), (33, 8, 16), (127, 257, 63))

# whole tiles of a small GEMM, of a large one, and of one that is too large to draw gates inside
TILED_SHAPES = ((64, 48, 80), (256, 512, 384), (1056, 512, 1024))

RMS_BOUND = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 8e-3}


@dataclass(frozen=True)
class Comparison:
    """One tensor against its truth: its largest error and the bound of that, its RMS error relative to the true RMS and
    the bound of that.

    ``ok``: both are within their bounds, and no value is NaN.
    """

    name: str
    error: float
    bound: float
    rms: float
    rms_bound: float

    @property
    def ok(self) -> bool:
        return self.error <= self.bound and self.rms <= self.rms_bound

    @property
    def share(self) -> float:
        """The larger of the two errors as a share of its bound; above 1 fails."""
        parts = [e / b if b else float(e > 0) for e, b in ((self.error, self.bound), (self.rms, self.rms_bound))]
        return max(parts) if all(p == p for p in parts) else float("inf")

    def __str__(self) -> str:
        return (
            f"{self.name}: max error {self.error:.3g} (bound {self.bound:.3g}), RMS ratio {self.rms:.3g} (bound "
            f"{self.rms_bound:.3g})"
        )


def compare(
    name: str,
    out: Tensor,
    truth: Tensor,
    baseline: Tensor,
    dtype: torch.dtype | None = None,
    *,
    alike: Sequence[Tensor] = (),
    tf32: bool = False,
) -> Comparison:
    """Measure the errors of ``out`` by the two rules at the top of this module.

    Args:
        name: for the message.
        out: the tensor under test, any floating dtype.
        truth: float64, the same shape.
        baseline: the result of plain PyTorch in the same dtype.
        dtype: the dtype whose bounds apply; None: that of ``out``. (A float32 gate gradient of a bfloat16 layer has the
            bounds of bfloat16.)
        alike: float64, the truths of the same problem with other signs of the data; they show the size of a sum that
            cancels.
        tf32: float32 products were in TF32, and ``baseline`` comes from data that :func:`as_tf32` has rounded.

    If the RMS error of the baseline exceeds its fixed bound (as in a long half-precision sum), the bound is twice that
    error. Differences below the smallest normal float32 do not count.

    Raises: AssertionError if shapes differ.
    """
    if out.shape != truth.shape or baseline.shape != truth.shape:
        raise AssertionError(
            f"{name}: shape {tuple(out.shape)}, baseline {tuple(baseline.shape)}, truth {tuple(truth.shape)}"
        )
    if not truth.numel():
        return Comparison(name, 0.0, 0.0, 0.0, 0.0)
    truth = truth.detach().double().cpu()
    gap, own = (out.detach().double().cpu() - truth).abs(), (baseline.detach().double().cpu() - truth).abs()
    sizes = [t.detach().double().cpu() for t in (truth, *alike)]
    scale, rms_truth = max(t.abs().max() for t in sizes), max(t.square().mean().sqrt() for t in sizes)
    dtype = out.dtype if dtype is None else dtype
    if tf32 and dtype != torch.float32:
        raise ValueError(f"tf32=True with dtype={dtype}: expected float32")
    precise = torch.float16 if tf32 else dtype
    slack = 1e-13 if precise == torch.float64 else max(1e-6, torch.finfo(precise).eps if precise.itemsize == 2 else 0.0)
    bound = 2 * own.max() + slack * scale + torch.finfo(torch.float32).tiny
    ratio, own_ratio = (
        float(e.square().mean().sqrt() / rms_truth) if rms_truth else float(e.max()) for e in (gap, own)
    )
    return Comparison(name, float(gap.max()), float(bound), ratio, max(RMS_BOUND[precise], 2 * own_ratio))


def as_tf32(t: Tensor) -> Tensor:
    """float32 cut off to the bits that a TF32 product reads: 8 of exponent, 10 of mantissa."""
    return (t.contiguous().view(torch.int32) & ~0x1FFF).view(torch.float32)


def assert_close(
    name: str,
    out: Tensor,
    truth: Tensor,
    baseline: Tensor,
    dtype: torch.dtype | None = None,
    *,
    alike: Sequence[Tensor] = (),
    tf32: bool = False,
) -> None:
    """Raise AssertionError with the numbers unless ``out`` passes :func:`compare`."""
    result = compare(name, out, truth, baseline, dtype, alike=alike, tf32=tf32)
    if not result.ok:
        raise AssertionError(str(result))


def layouts(t: Tensor) -> Iterator[tuple[str, Tensor]]:
    """``t`` in memory layouts that break kernels which trust strides: as it is, transposed, a slice of a wider matrix,
    an offset view.
    """
    yield "contiguous", t
    yield "transposed", t.t().contiguous().t()
    wide = torch.cat((t, torch.full_like(t, float("nan"))), dim=1)
    yield "sliced", wide[:, : t.shape[1]]
    flat = torch.cat((t.new_full((1,), float("nan")), t.reshape(-1)))
    yield "offset", flat[1:].view(t.shape)


@contextmanager
def poisoned_empty() -> Iterator[None]:
    """Fill what ``torch.empty``, ``torch.empty_like`` and ``Tensor.new_empty`` return with NaN,
    so that an unwritten element shows.
    """

    def poisoned(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def wrapper(*args: Any, **kwargs: Any) -> Tensor:
            out = function(*args, **kwargs)
            return out.fill_(float("nan")) if out.is_floating_point() and not out.is_meta else out

        return wrapper

    with (
        mock.patch.object(torch, "empty", poisoned(torch.empty)),
        mock.patch.object(torch, "empty_like", poisoned(torch.empty_like)),
        mock.patch.object(Tensor, "new_empty", poisoned(Tensor.new_empty)),
    ):
        yield
