"""Argument checks that functions and layers share. Each error names the argument, its value and what was expected."""

from __future__ import annotations

import math
import operator
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dampr.spec import GateSpec

GATE_DTYPES = (torch.float32, torch.float64)


def tensor(name: str, value: Any) -> Tensor:
    """``value``, a dense tensor. Raises TypeError for anything else."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}={value!r:.80}: expected a torch.Tensor")
    if value.layout != torch.strided:
        raise TypeError(f"{name}.layout={value.layout}: expected torch.strided")
    return value


def module(name: str, value: Any) -> nn.Module:
    """``value``, a module. Raises TypeError for anything else."""
    if not isinstance(value, nn.Module):
        raise TypeError(f"{name}={value!r:.80}: expected a torch.nn.Module")
    return value


def path(name: str, value: Any) -> Path:
    """``value``, a str or os.PathLike, as a Path. Raises TypeError for anything else."""
    if not isinstance(value, (str, os.PathLike)):
        raise TypeError(f"{name}={value!r:.80}: expected a path, a str or os.PathLike")
    return Path(value)


def floating(name: str, value: Tensor) -> None:
    """Raise TypeError unless ``value`` has a floating-point dtype."""
    if not value.is_floating_point():
        raise TypeError(f"{name}.dtype={value.dtype}: expected a floating-point tensor")


def device(name: str, value: Any) -> torch.device | None:
    """The device on which tensors are made: None for the current default, or anything that ``torch.device`` takes.

    Raises: TypeError or ValueError for anything else.
    """
    if value is None or isinstance(value, torch.device):
        return value
    try:
        return torch.device(value)
    except (RuntimeError, TypeError, ValueError) as error:
        kind = TypeError if isinstance(error, TypeError) else ValueError
        raise kind(f"{name}={value!r:.80}: expected None or a device ({str(error).splitlines()[0]:.120})") from error


def same_device(name: str, value: Tensor, other_name: str, other: Tensor) -> None:
    """Raise ValueError unless the tensors ``value`` and ``other`` are on one device."""
    if value.device != other.device:
        raise ValueError(f"{name}.device={value.device}: expected {other.device}, the device of {other_name}")


def gate_parameter(name: str, value: Tensor, count: int, what: str, like: Tensor) -> Tensor:
    """Check the parameters of ``count`` gates and return them in the dtype in which the gates are computed.

    Args:
        name: the name of the argument.
        value: (count,), float32, or float64 beside a float64 ``like``; on the device of ``like``.
        count: the number of gates.
        what: what has one gate each, for the error.
        like: the tensor that the gates multiply.

    Raises: TypeError for a wrong type or dtype, ValueError for a wrong shape or device.
    """
    if not isinstance(value, Tensor) or value.layout != torch.strided:
        tensor(name, value)
    if value.dtype not in GATE_DTYPES:
        raise TypeError(
            f"{name}.dtype={value.dtype}: expected torch.float32 or torch.float64 (gate arithmetic is never done in "
            "half precision)"
        )
    if value.shape != (count,):
        raise ValueError(f"{name}.shape={tuple(value.shape)}: expected ({count},), one gate per {what}")
    if value.device != like.device:
        same_device(name, value, "x", like)
    if like.dtype == torch.float64:
        return value.double()
    if value.dtype == torch.float64:
        raise TypeError(
            f"{name}.dtype={value.dtype}: expected torch.float32 next to x of dtype {like.dtype} (gate parameters are "
            "never cast down)"
        )
    return value


def seed_tensor(name: str, value: int | Tensor | None, device: torch.device) -> Tensor:
    """A seed as an int64 tensor of shape (1,) on ``device``."""
    if value is None:
        raise ValueError(
            f"{name}=None: expected an int or an int64 tensor of shape (1,), because these gates are drawn"
        )
    if isinstance(value, Tensor):
        if value.dtype != torch.int64 or value.shape != (1,):
            raise ValueError(
                f"{name}: got {value.dtype} of shape {tuple(value.shape)}, expected an int64 tensor of shape (1,)"
            )
        if value.device != device:
            raise ValueError(f"{name}.device={value.device}: expected {device}, the device of the gates")
        return value
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 2**63:
        raise ValueError(f"{name}={value!r:.80}: expected an int in [0, 2**63) or an int64 tensor of shape (1,)")
    return torch.tensor([value], dtype=torch.int64, device=device)


def one_of(name: str, value: Any, allowed: Sequence[Any]) -> None:
    """Raise ValueError unless ``value`` is one of ``allowed``, in type too (True is not 1)."""
    if not any(value is one or (isinstance(value, type(one)) and value == one) for one in allowed):
        raise ValueError(f"{name}={value!r:.80}: expected one of {list(allowed)}")


def flag(name: str, value: Any) -> bool:
    """``value``, True, False, 0 or 1, as a bool.

    Raises: TypeError for anything else, because its truth value might not be what the caller meant (the string "False"
    is true).
    """
    if isinstance(value, int) and value in (0, 1):
        return bool(value)
    raise TypeError(f"{name}={value!r:.80}: expected True or False")


def number(name: str, value: Any, least: float = -math.inf, most: float = math.inf, above: bool = False) -> float:
    """``value``, a finite real number from ``least`` to ``most``, as a float; with ``above``, greater than ``least``.

    Raises: ValueError for anything else.
    """
    real = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not real or not abs(value) <= sys.float_info.max or not least <= value <= most or (above and value == least):
        if -math.inf < least and most < math.inf and not above:
            raise ValueError(f"{name}={value!r:.80}: expected a number in [{least:g}, {most:g}]")
        bounds = f" {'above' if above else 'of at least'} {least:g}" * (
            least > -math.inf
        ) + f" and at most {most:g}" * (most < math.inf)
        raise ValueError(f"{name}={value!r:.80}: expected a finite number{bounds}")
    return float(value)


def gate_spec(name: str, value: Any) -> GateSpec:
    """``value``, a GateSpec. Raises TypeError for anything else."""
    if not isinstance(value, GateSpec):
        raise TypeError(
            f"{name}={value!r:.80}: expected a gate function of dampr.spec, such as dampr.spec.hard_concrete()"
        )
    return value


def positive_int(name: str, value: Any, least: int = 1) -> int:
    """``value``, an integer of at least ``least``, as an int; NumPy integers and integer tensors are allowed too.

    Raises: ValueError for anything else.
    """
    whole = value if isinstance(value, int) else _index(value)
    if isinstance(value, bool) or whole is None or not least <= whole < 2**63:
        raise ValueError(f"{name}={value!r:.80}: expected an integer of at least {least}")
    return whole


def rows(value: Any) -> Any:
    """The number of draws that a caller asks of a gate: None for a single draw, or an integer of at least 0.

    A SymInt, which torch.compile uses for an unknown size, is returned as it is. Raises ValueError for anything else.
    """
    return value if value is None or isinstance(value, torch.SymInt) else positive_int("rows", value, least=0)


def _index(value: Any) -> int | None:
    """``value`` as an int; None if it is not an integer."""
    try:
        return operator.index(value)
    except Exception:  # value is not an integer, or a tensor on the meta device
        return None


def items(name: str, value: Any) -> list[Any]:
    """The items of an iterable, as a list. Raises TypeError for anything else."""
    try:
        return list(value)
    except TypeError as error:
        raise TypeError(f"{name}={value!r:.80}: expected an iterable") from error


def state(name: str, value: Any, own: Any) -> None:
    """Raise ValueError unless the state ``value`` has the keys, lengths, shapes and types of ``own``.

    ``own``: a state as this object would save it now. A None in ``own`` allows anything in its place.
    """
    if isinstance(own, Mapping):
        if not isinstance(value, Mapping) or own.keys() - value.keys():
            raise ValueError(f"{name}={value!r:.80}: expected the keys {sorted(own)}, what state_dict() gave")
        for key, part in own.items():
            state(f"{name}[{key!r}]", value[key], part)
    elif isinstance(own, list):
        if not isinstance(value, list | tuple) or len(value) != len(own):
            raise ValueError(f"{name}={value!r:.80}: expected a list of {len(own)}, as here")
        for i, part in enumerate(own):
            state(f"{name}[{i}]", value[i], part)
    elif isinstance(own, Tensor):
        if not isinstance(value, Tensor) or (value.dtype, value.shape) != (own.dtype, own.shape):
            found = f"{value.dtype} of shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"{value!r:.80}"
            raise ValueError(f"{name}: got {found}, expected {own.dtype} of shape {tuple(own.shape)}, as here")
    elif isinstance(own, bool):
        one_of(name, value, (False, True))
    elif isinstance(own, int):
        positive_int(name, value, least=0)
    elif own is not None:
        number(name, value)


def block_count(name: str, block: Any, rows: int, cols: int) -> int:
    """The number of blocks of size ``block`` in a (rows, cols) matrix, partial blocks at the edges included.

    Raises: ValueError unless ``block`` is a tuple of two positive integers.
    """
    r, c = block if isinstance(block, tuple) and len(block) == 2 else (None, None)
    if (
        not isinstance(r, int)
        or not isinstance(c, int)
        or isinstance(r, bool)
        or isinstance(c, bool)
        or r <= 0
        or c <= 0
    ):
        raise ValueError(f"{name}={block!r:.80}: expected a tuple of two positive integers, (rows, cols)")
    return -(rows // -r) * -(cols // -c)


def gate_index(name: str, index: Any, shape: Sequence[int]) -> int:
    """The number of gates that an index needs: its largest value plus 1.

    ``index``: the gate of each element, int64, of ``shape``. Raises TypeError or ValueError for anything else.
    """
    if tensor(name, index).dtype != torch.int64 or index.shape != tuple(shape):
        raise ValueError(
            f"{name}: got {index.dtype} of shape {tuple(index.shape)}, expected int64 of shape {tuple(shape)}"
        )
    if index.numel() and int(index.min()) < 0:
        raise ValueError(f"{name}: its smallest value is {int(index.min())}, expected 0 or more, the number of a gate")
    return int(index.max()) + 1 if index.numel() else 0
