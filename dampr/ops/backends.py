"""Choose the backend that runs an operator: triton on CUDA, cpp on the CPU, reference anywhere.

The choice is automatic, or made by the environment variable ``DAMPR_BACKEND``, or by ``with dampr.backend(...)``. The
automatic choice takes the reference only if the other backend is missing, with one warning, and never after a failure.
A backend that was named and cannot run raises an error with the reason.
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
# for the whole process and not for a thread, because autograd runs the backward of CUDA operators in its own threads
_chosen: list[list[names.Backend]] = []


class BackendUnavailableError(RuntimeError):
    """A backend was asked for by name, but is not installed or cannot run on these tensors."""


def _load(name: str) -> tuple[ModuleType | None, str]:
    """(the module of a backend, or None; why it cannot be imported)."""
    try:
        return importlib.import_module(f"dampr.ops.backend_{name}"), ""
    except ImportError as error:
        return None, f"{type(error).__name__}: {error}"


_package = sys.modules[__package__ or ""]  # the package dampr.ops; loaded backends are attributes of it
_modules: dict[str, tuple[ModuleType | None, str]] = {}
_warned: set[str] = set()  # missing backends for which the warning was given
# (backend asked for, device, dtype) -> the module that select() found
_selected: dict[tuple[Any, torch.device, torch.dtype], ModuleType] = {}
_environment, _key = environment_entry(ENVIRONMENT)


def _module(name: str) -> tuple[ModuleType | None, str]:
    """:func:`_load`, once per name."""
    if name not in _modules:
        _modules[name] = _load(name)
    return _modules[name]


def _checked(name: str, source: str) -> str:
    """``name``. Raises ValueError, naming its ``source``, unless it is a backend or "auto"."""
    if name not in (*NAMES, "auto"):
        raise ValueError(f"{source}={name!r}: expected one of {('auto', *NAMES)}")
    return name


def why_not(name: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """The reason why backend ``name`` cannot run tensors of this device and dtype; None if it can."""
    module, missing = _module(name)
    if module is None:
        return missing
    reason: str | None = module.unavailable(device, dtype)
    return reason


@contextmanager
def backend(name: names.Backend) -> Iterator[None]:
    """Run all operators of dampr in the block on ``name``: ``"auto"``, ``"triton"``, ``"cpp"`` or ``"reference"``.

    Without such a block, the environment variable ``DAMPR_BACKEND`` decides; if it is not set, ``"auto"``.

    Raises: ValueError for an unknown name; BackendUnavailableError for a backend that is not installed. An operator
    whose tensors the backend cannot take raises BackendUnavailableError when it is called.
    """
    if _checked(name, "name") != "auto" and _module(name)[0] is None:
        raise BackendUnavailableError(f"backend {name!r} is not there: {_module(name)[1]}")
    choice = [name]
    _chosen.append(choice)
    try:
        yield
    finally:
        # Remove this choice, not simply the last one, because blocks of several threads may overlap.
        _chosen[:] = [other for other in _chosen if other is not choice]


def choose(device: torch.device, dtype: torch.dtype) -> tuple[str, str]:
    """(the name of the backend for tensors of this device and dtype, the reason).

    Raises: BackendUnavailableError for a named backend that cannot run these tensors; ValueError for an unknown name in
    the environment variable.
    """
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
    """The name that :func:`choose` gives, with the backend loaded; torch.compile calls it and does not trace it.

    The first call in a process may be a compiled one, and loading imports modules and asks drivers. ``asked`` is not
    used: it is an argument because the answer depends on it, and dynamo guards the arguments that a constant was
    computed from.
    """
    name, _ = choose(device, dtype)
    _module(name)
    return name


def backend_info() -> dict[str, str]:
    """For each backend "available" or the reason why it is missing; also the version of torch and the CUDA device."""
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
