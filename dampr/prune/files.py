"""save and load: tensors in safetensors, everything else as JSON in its header. No pickle is written or read."""

from __future__ import annotations

import hashlib
import inspect
import json
import os
from typing import Any

import torch
from torch import nn

from dampr._version import __version__
from dampr.nn import GatedLayer

_FORMAT = 1
_KEY = "dampr"
_WIDTHS = ("in_features", "out_features", "in_channels", "out_channels", "num_features", "groups")
_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


class FileError(RuntimeError):
    """A file is not what it should be, or does not fit the model."""


def save(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Write a plain (compacted) model: one safetensors file whose header holds the manifest.

    Models made of ``nn.Sequential``, ``nn.ModuleList``, ``nn.ModuleDict`` and ``torch.nn`` layers can be loaded by the path alone; any
    other needs its dense original at loading time. The file appears whole or not at all.

    Raises TypeError for a model that still has gates (compact it first).
    """
    from safetensors.torch import save_file

    gated = [name for name, module in model.named_modules() if isinstance(module, GatedLayer)]
    if gated:
        raise TypeError(
            f"model: layer {gated[0]!r} still has gates; expected a compacted model (dampr.compact); for checkpoints use state_dict()"
        )
    widths = {
        name: {attribute: getattr(module, attribute) for attribute in _WIDTHS if isinstance(getattr(module, attribute, None), int)}
        for name, module in model.named_modules()
    }
    state = _unshared(model)
    manifest = {
        "format": _FORMAT,
        "version": __version__,
        "torch": torch.__version__,
        "widths": {name: attributes for name, attributes in widths.items() if attributes},
        "architecture": _describe(model),
        "compaction": getattr(model, "dampr_manifest", None),
        "sha256": _digest(state),
    }
    partial = f"{os.fspath(path)}.partial"
    try:
        save_file(state, partial, metadata={_KEY: json.dumps(manifest)})
        os.replace(partial, path)
    finally:
        if os.path.exists(partial):
            os.remove(partial)


def load(path: str | os.PathLike[str], model: nn.Module | None = None) -> nn.Module:
    """Read what :func:`save` wrote.

    Args:
        path: the file.
        model: the dense original, as it was before ``convert`` (its weights do not matter); it is narrowed in place and returned. None:
            the model is built from the file, which works for containers and layers of ``torch.nn``.

    Returns: the model in evaluation mode, on the CPU when built from the file.

    Raises: FileNotFoundError; FileError for a file that is truncated, tampered with, not from here, or that does not fit ``model``, which
    then is as it was.
    """
    from safetensors import SafetensorError, safe_open

    if not os.path.exists(path):
        raise FileNotFoundError(f"path={os.fspath(path)!r}: expected a file written by dampr.save")
    try:
        with safe_open(path, framework="pt") as file:  # type: ignore[no-untyped-call]
            metadata = file.metadata() or {}
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, ValueError, OSError) as error:
        raise FileError(f"path={os.fspath(path)!r}: not a whole safetensors file ({error})") from error
    manifest = _parse(metadata, path)
    if model is None:
        if manifest["architecture"] is None:
            raise FileError(
                f"path={os.fspath(path)!r}: it holds layers that only their own code can build; pass the dense original as model="
            )
        model = _build(manifest["architecture"])
    _narrow(model, state, manifest, path)
    model.dampr_manifest = manifest["compaction"]  # type: ignore[assignment]
    return model.eval()


def _parse(metadata: dict[str, str], path: str | os.PathLike[str]) -> dict[str, Any]:
    try:
        manifest: dict[str, Any] = json.loads(metadata[_KEY])
    except (KeyError, json.JSONDecodeError) as error:
        raise FileError(f"path={os.fspath(path)!r}: no dampr manifest in its header; expected a file written by dampr.save") from error
    if manifest.get("format") != _FORMAT:
        raise FileError(
            f"path={os.fspath(path)!r}: format {manifest.get('format')!r}, expected {_FORMAT}; a newer dampr may have written it"
        )
    return manifest


def _unshared(model: nn.Module) -> dict[str, torch.Tensor]:
    """The state of a model with each shared tensor under its first name only."""
    first: dict[int, str] = {}
    own = model.state_dict(keep_vars=True)
    return {name: t.detach().contiguous() for name, t in own.items() if first.setdefault(id(t), name) == name}


def _digest(state: dict[str, torch.Tensor]) -> str:
    """SHA-256 over names, dtypes, shapes and values."""
    total = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        total.update(f"{name}:{tensor.dtype}:{tuple(tensor.shape)}".encode())
        total.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return total.hexdigest()


def _narrow(model: nn.Module, state: dict[str, torch.Tensor], manifest: dict[str, Any], path: str | os.PathLike[str]) -> None:
    where = f"path={os.fspath(path)!r}"
    own = dict(model.state_dict(keep_vars=True))
    absent = sorted(set(state) - set(own))
    stored = {id(own[name]): name for name in reversed(own) if name in state}  # a shared tensor is in the file once, under its first name
    missing = [n for n, t in own.items() if n not in state and id(t) not in stored]
    if absent or missing:
        raise FileError(f"{where}: does not fit model; only in the file: {absent[:3]}, only in the model: {missing[:3]}")
    for name, tensor in state.items():
        if tensor.dim() != own[name].dim() or any(a > b for a, b in zip(tensor.shape, own[name].shape, strict=True)):
            raise FileError(
                f"{where}: tensor {name!r} has shape {tuple(tensor.shape)}, which cannot come from {tuple(own[name].shape)} in model"
            )
    if _digest(state) != manifest["sha256"]:
        raise FileError(f"{where}: the tensors do not match the recorded SHA-256; the file was changed after it was written")
    source = {n: n if n in state else stored[id(t)] for n, t in own.items()}
    replaced: dict[str, Any] = {}
    for name, old in own.items():
        new: Any = replaced.get(source[name])
        if new is None:
            data = state[source[name]].to(device=old.device if not old.is_meta else "cpu")
            new = nn.Parameter(data, requires_grad=old.requires_grad) if isinstance(old, nn.Parameter) else data
            replaced[source[name]] = new
        owner, _, attribute = name.rpartition(".")
        module = model.get_submodule(owner)
        if isinstance(old, nn.Parameter):
            module._parameters[attribute] = new
        else:
            module._buffers[attribute] = new
    for name, attributes in manifest["widths"].items():
        for attribute, value in attributes.items():
            setattr(model.get_submodule(name), attribute, value)


def _describe(module: nn.Module) -> dict[str, Any] | None:
    """A module as data: its torch.nn class, constructor arguments, children; None where that is not possible."""
    kind = type(module)
    if getattr(nn, kind.__name__, None) is not kind:
        return None
    if isinstance(module, _CONTAINERS):
        children = {name: _describe(child) for name, child in module.named_children()}
        return None if None in children.values() else {"type": kind.__name__, "children": children}
    if list(module.children()):
        return None
    arguments: dict[str, Any] = {}
    for name, parameter in inspect.signature(kind.__init__).parameters.items():
        if name in ("self", "device", "dtype"):
            continue
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD) or not hasattr(module, name):
            return None
        value = getattr(module, name)
        arguments[name] = (value is not None) if name == "bias" and not isinstance(value, bool) else value
    try:
        json.dumps(arguments)
    except TypeError:
        return None
    return {"type": kind.__name__, "arguments": arguments}


def _build(description: dict[str, Any]) -> nn.Module:
    kind = getattr(nn, str(description.get("type")), None)
    if not (isinstance(kind, type) and issubclass(kind, nn.Module)):
        raise FileError(f"architecture names {description.get('type')!r}: expected a class of torch.nn")
    if issubclass(kind, _CONTAINERS):
        container = kind()
        for name, child in description["children"].items():
            container.add_module(name, _build(child))
        return container
    arguments = {k: tuple(v) if isinstance(v, list) else v for k, v in description["arguments"].items()}
    try:
        return kind(**arguments)
    except (TypeError, ValueError) as error:
        raise FileError(f"architecture: torch.nn.{kind.__name__} does not take {arguments} ({error})") from error
