"""Which backend runs an op: triton on CUDA, cpp on the CPU, reference everywhere; by itself, by environment, or by
``with dampr.backend(...)``.

Auto falls back only on absence, with one warning, never after a failure. An explicit choice that cannot be honoured
raises and says why.
"""

from __future__ import annotations

import importlib
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any, get_args

import torch

from dampr import names

from ._torch import constant_to_compilers, environment_entry

NAMES = tuple(name for name in get_args(names.Backend) if name != "auto")
ENVIRONMENT = "DAMPR_BACKEND"
_chosen: list[list[names.Backend]] = []  # process-wide on purpose: the backward of CUDA ops runs in threads of its own


class BackendUnavailableError(RuntimeError):
    """A backend was asked for by name and is not there, or cannot run on these tensors."""


def _load(name: str) -> tuple[ModuleType | None, str]:
    try:
        return importlib.import_module(f"dampr.ops.backend_{name}"), ""
    except ImportError as error:
        return None, f"{type(error).__name__}: {error}"


_package = sys.modules[__package__ or ""]  # has every backend that was loaded as an attribute
_modules: dict[str, tuple[ModuleType | None, str]] = {}
_warned: set[str] = set()  # backends of which it was said that they are missing
# what select() found for (asked for, device, dtype)
_selected: dict[tuple[Any, torch.device, torch.dtype], ModuleType] = {}
_environment, _key = environment_entry(ENVIRONMENT)


def _module(name: str) -> tuple[ModuleType | None, str]:
    if name not in _modules:
        _modules[name] = _load(name)
    return _modules[name]


def _checked(name: str, source: str) -> str:
    if name not in (*NAMES, "auto"):
        raise ValueError(f"{source}={name!r}: expected one of {('auto', *NAMES)}")
    return name


def why_not(name: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """The reason why backend ``name`` cannot run tensors of this device and dtype, or None when it can."""
    module, missing = _module(name)
    if module is None:
        return missing
    reason: str | None = module.unavailable(device, dtype)
    return reason


@contextmanager
def backend(name: names.Backend) -> Iterator[None]:
    """Run every dampr op of the block on ``name``: ``"auto"``, ``"triton"``, ``"cpp"`` or ``"reference"``.

    Raises ValueError for an unknown name and BackendUnavailableError for one that is not installed; an op whose tensors
    the backend cannot take raises BackendUnavailableError when it is called. Without a block, the environment variable
    ``DAMPR_BACKEND`` decides, and then ``"auto"``.
    """
    if _checked(name, "name") != "auto" and _module(name)[0] is None:
        raise BackendUnavailableError(f"backend {name!r} is not there: {_module(name)[1]}")
    choice = [name]
    _chosen.append(choice)
    try:
        yield
    finally:
        _chosen[:] = [other for other in _chosen if other is not choice]  # blocks of several threads may overlap


def choose(device: torch.device, dtype: torch.dtype) -> tuple[str, str]:
    """The backend for tensors of this device and dtype, and the reason, in words."""
    if _chosen:
        name: str = _chosen[-1][0]
        source = "dampr.backend(...)"
    else:
        name = _checked(os.environ.get(ENVIRONMENT, "auto"), ENVIRONMENT)
        source = f"the environment variable {ENVIRONMENT}"
    if name != "auto":
        reason = why_not(name, device, dtype)
        if reason is not None:
            raise BackendUnavailableError(
                f"backend {name!r}, chosen by {source}, cannot run {dtype} on {device}: {reason}"
            )
        return name, f"chosen by {source}"
    preferred = "triton" if device.type == "cuda" else "cpp"
    reason = why_not(preferred, device, dtype)
    if reason is None:
        return preferred, f"the fused backend for {device.type} tensors"
    if _module(preferred)[0] is None and preferred not in _warned:
        _warned.add(preferred)
        warnings.warn(
            f"dampr has no fused kernels for {device.type} tensors ({reason}) and runs operators of torch instead, "
            "which is slower; dampr.backend_info() says more, and DAMPR_BACKEND=reference chooses this without a word",
            RuntimeWarning,
            stacklevel=3,
        )
    return "reference", f"{preferred} is not to be had: {reason}"


def select(device: torch.device, dtype: torch.dtype) -> ModuleType:
    """The module of the backend that :func:`choose` names."""
    asked = _chosen[-1][0] if _chosen else _environment.get(_key)
    if torch.compiler.is_compiling():
        traced: ModuleType = getattr(_package, f"backend_{_loaded_name(asked, device, dtype)}")
        return traced
    key = (asked, device, dtype)
    if key not in _selected:
        module, _ = _module(choose(device, dtype)[0])
        assert module is not None
        _selected[key] = module
    return _selected[key]


@constant_to_compilers
def _loaded_name(asked: str | None, device: torch.device, dtype: torch.dtype) -> str:
    """What :func:`choose` names, loaded. Not traced: the first call of a process may be compiled, and this imports and
    asks drivers.

    ``asked`` is what the answer depends on besides: dynamo guards what a constant was made of.
    """
    name, _ = choose(device, dtype)
    _module(name)
    return name


def backend_info() -> dict[str, str]:
    """What is there: for each backend ``"available"``, or the reason why it is missing;
    plus the versions that matter.
    """
    info = {"reference": "available"}
    cpp, missing = _module("cpp")
    info["cpp"] = f"available ({cpp.describe()})" if cpp is not None else f"missing: {missing}"
    triton, missing = _module("triton")
    if triton is None:
        info["triton"] = f"missing: {missing}"
    else:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        reason = why_not("triton", device, torch.float32)
        info["triton"] = "available" if reason is None else f"installed, not usable: {reason}"
    info["torch"] = torch.__version__
    info["cuda"] = torch.cuda.get_device_name() if torch.cuda.is_available() else "no CUDA device"
    return info
