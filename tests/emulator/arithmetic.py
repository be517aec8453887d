"""Arithmetic of the emulated GPU on numpy arrays of register contents, and the names of PTX's types."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

f4, f8, i1, i2, i4, i8 = np.float32, np.float64, np.int8, np.int16, np.int32, np.int64
u1, u2, u4, u8, f2 = np.uint8, np.uint16, np.uint32, np.uint64, np.float16

# numpy has no bfloat16: an array of bfloat16 is kept as uint16 bits.
DTYPES: dict[str, Any] = {
    "b8": u1, "u8": u1, "s8": i1, "b16": u2, "u16": u2, "s16": i2, "b32": u4, "u32": u4, "s32": i4, "b64": u8,
    "u64": u8, "s64": i8,
    "f32": f4, "f64": f8, "f32x2": u8, "f16": f2, "bf16": u2, "f16x2": u4, "bf16x2": u4,
}  # fmt: skip
WIDTH = {name: np.dtype(kind).itemsize for name, kind in DTYPES.items()}
RAW: dict[int, Any] = {1: u1, 2: u2, 4: u4, 8: u8}  # the type in which a register of so many bytes is kept
SHORT = {f2: "f2", f4: "f4", f8: "f8", i1: "i1", i2: "i2", i4: "i4", i8: "i8", u1: "u1", u2: "u2", u4: "u4", u8: "u8"}
BITS = {1: "b8", 2: "b16", 4: "b32", 8: "b64"}
# Documented largest relative errors of the approximate instructions; that of div.full is two units in the last place.
ERRORS = {"sqrt": 2.0**-23, "ex2": 2.0**-22, "lg2": 2.0**-22, "rcp": 2.0**-23, "rsqrt": 2.0**-22.4}


def bf16_to_f32(x: Any) -> Any:
    """float32 values of an array of bfloat16 bits (uint16)."""
    return (x.astype(u4) << u4(16)).view(f4)


def f32_to_bf16(x: Any) -> Any:
    """bfloat16 bits (uint16) of float32 values: rounded to nearest, ties to even; NaN becomes 0x7FFF."""
    bits = x.view(u4)
    rounded = ((bits + u4(0x7FFF) + ((bits >> u4(16)) & u4(1))) >> u4(16)).astype(u2)
    return np.where(np.isnan(x), u2(0x7FFF), rounded)


def tf32(x: Any) -> Any:
    """float32 values with the lowest 13 bits cleared: a tensor core reads only the upper 19 bits of a float32."""
    return (x.view(u4) & u4(0xFFFFE000)).view(f4)


def to_integer(x: Any, kind: Any, how: str) -> Any:
    """Floats ``x`` as integers of the numpy type ``kind``, rounded as PTX's suffix ``how`` (rzi, rni, ...) says. Values
    beyond the type's range are clamped; NaN becomes 0.
    """
    x = {"rzi": np.trunc, "rni": np.rint, "rmi": np.floor, "rpi": np.ceil}[how](x.astype(f8))
    limits = np.iinfo(kind)
    inside = np.where(
        np.isnan(x), 0.0, np.clip(x, float(limits.min), float(limits.max) if limits.max < 2**53 else 2.0**62)
    )
    return inside.astype(kind)


def divide(a: Any, b: Any) -> Any:
    """Integer quotient, rounded towards zero."""
    return ((a - np.fmod(a, b)) // b) if a.dtype.kind == "i" else a // b


def fma32(a: Any, b: Any, c: Any) -> Any:
    """a b + c of float32, rounded once from float64, in which the product of two float32 is exact."""
    return (a.astype(f8) * b.astype(f8) + c.astype(f8)).astype(f4)


def pairs(function: Callable[..., Any], *values: Any) -> Any:
    """Apply ``function`` to both float32 halves of 64 bit registers."""
    out = function(*(np.ascontiguousarray(np.atleast_1d(v)).view(f4).reshape(-1, 2) for v in values))
    out = np.ascontiguousarray(out).reshape(-1).view(u8)
    return out[0] if all(np.ndim(v) == 0 for v in values) else out


def when(mask: Any, new: Any, old: Any) -> Any:
    """``new`` in the lanes of ``mask`` and ``old`` in the others; ``new`` everywhere for a register without an old
    value.
    """
    return new if old is None else np.where(mask, new, old)


def permute_bytes(a: Any, b: Any, selector: Any) -> Any:
    """prmt: each byte of the result is one of the eight bytes of ``a`` and ``b``, or that byte's sign repeated eight
    times.
    """
    both = a.astype(u8) | (b.astype(u8) << u8(32))
    out: Any = u4(0)
    for i in range(4):
        pick = (selector >> u4(4 * i)) & u4(15)
        byte = ((both >> ((pick & u4(7)).astype(u8) * u8(8))) & u8(0xFF)).astype(u4)
        sign = np.where((byte & u4(0x80)) != 0, u4(0xFF), u4(0))
        out = out | (np.where((pick & u4(8)) != 0, sign, byte) << u4(8 * i))
    return out


def inexact(x: Any, operation: str, seed: int | None) -> Any:
    """The float64 result ``x`` of an approximate instruction, as float32: rounded, or with an error of up to the
    documented one.

    Without a seed the result is rounded. With a seed the error is a function of seed and value, so that equal values
    get equal errors. Zeros, infinities and NaN are never changed.
    """
    if seed is None:
        return x.astype(f4)
    if operation == "div":
        step = 2.0 * np.spacing(np.abs(x).astype(f4)).astype(f8)
    else:
        step = np.abs(x) * ERRORS[operation]
    mixed = ((x.view(u8) ^ u8(seed)) * u8(0x9E3779B97F4A7C15)) >> u8(33)
    return np.where(np.isfinite(x) & (x != 0), x + step * ((mixed % u8(3)).astype(f8) - 1.0), x).astype(f4)
