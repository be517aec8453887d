"""Saving and loading of compacted models: tensors as safetensors, everything else as JSON in the file's header. No
pickle is written or read.

A file is not trusted: its digest, the form of its manifest and the fit of every tensor are checked before a model is
changed.
"""

from __future__ import annotations

import json
import os
from typing import Any, overload

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from dampr import _checks
from dampr._version import __version__
from dampr._writing import whole_or_nothing
from dampr.nn import GatedLayer

from . import inputs
from .file_content import FORMAT, KEY, Content, FileError, digest, read
from .file_fit import WIDTHS, fit, is_width, width_of
from .file_layers import build, describe, describe_leftovers
from .inputs import Model
from .layers.registry import kind_of
from .modules import by_name
from .unit_compact import sizes_of
from .units.numbers import set_number
from .wrapped import check_bare, sees_through


@sees_through
def save(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Write a plain (compacted) model into one safetensors file, whose header holds the manifest.

    Some models can later be loaded by the path alone: those made of ``nn.Sequential``, ``nn.ModuleList``,
    ``nn.ModuleDict``, ``torch.nn`` layers (attention, transformer layers and stacks of them too) and the plain layers
    of ``dampr.nn``, if building the model from its description gives the same model, which is tried here. Any other
    model needs its dense original at loading time. The file appears whole or not at all.

    Raises: TypeError for a model that still has gates (compact it first), and for a state dict with anything but dense
    tensors with values; FileError for a layer whose tensors have other sizes than its attributes (``in_features``, ...)
    say.
    """
    from safetensors.torch import save_file

    check_plain(model)
    _checks.path("path", path)
    own = sizes_of(getattr(model, "dampr_manifest", None))
    widths = {
        n: {a: width_of(m, a) for a in (*WIDTHS, *own.get(n, {})) if is_width(m, a)} for n, m in model.named_modules()
    }
    for name, module in model.named_modules():
        if kind_of(module).recurrent and not module.proj_size:
            del widths[name]["proj_size"]  # nn.GRU and nn.RNN do not take this argument
    compaction = getattr(model, "dampr_manifest", None)
    content = Content(
        "model", _unshared(model), {n: a for n, a in widths.items() if a}, None, describe_leftovers(model), compaction
    )
    fit(model, content)
    manifest = {
        "format": FORMAT,
        "version": __version__,
        "torch": torch.__version__,
        "widths": content.widths,
        "architecture": _describe_whole(model, content),
        "leftovers": content.leftovers,
        "compaction": content.compaction,
    }
    manifest["sha256"] = digest(manifest, content.state)
    with whole_or_nothing(path) as partial:
        save_file(content.state, partial, metadata={KEY: json.dumps(manifest)})


@overload
def load(path: str | os.PathLike[str], model: Model) -> Model: ...
@overload
def load(path: str | os.PathLike[str], model: None = None) -> nn.Module: ...
def load(path: str | os.PathLike[str], model: nn.Module | None = None) -> nn.Module:
    """Read what :func:`save` wrote.

    Args:
        path: the file.
        model: the dense original, as it was before ``convert`` (its weights do not matter), in the dtypes of the file.
            It is narrowed in place and returned. What compaction added to the model is added here too: the bias of a
            linear or convolution layer, the weight of a norm, and layers of ``dampr.nn`` that replace others. None: the
            model is built from the file, in its dtypes, which works for containers, layers of ``torch.nn`` and those of
            ``dampr.nn``.

    Returns: the model in evaluation mode; on the CPU if it was built from the file.

    Raises: FileNotFoundError; FileError for a file that is truncated, damaged, changed, not written by dampr, or that
    does not fit ``model``, which then is as it was. (The digest finds accidents; whoever changes a file on purpose can
    recompute it, so everything else is checked too.)
    """
    if model is not None:
        check_bare(_checks.module("model", model), "its layers become narrower")
    content = read(_checks.path("path", path))
    exact = model is None
    if model is None:
        if content.architecture is None:
            raise FileError(
                f"{content.where}: it holds layers that only their own code can build; pass the dense original as "
                "model="
            )
        model = build(content.architecture, content)
    replaced = {} if exact else _put_leftovers(model, content)
    try:
        fitting = fit(model, content, exact)
    except BaseException:
        inputs.replace(model, {new: old for old, new in replaced.items()})
        raise
    made: dict[str, Tensor] = {}
    changes = []
    for module, attribute, name, old in fitting:
        if name not in made:
            data = content.state[name].to(device="cpu" if old.is_meta else old.device)
            made[name] = nn.Parameter(data, requires_grad=old.requires_grad) if isinstance(old, nn.Parameter) else data
        changes.append((module, attribute, made[name]))
    for module, attribute, tensor in changes:  # the model is changed only from here on, after all checks
        setattr(module, attribute, tensor)
    for name, attributes in content.widths.items():
        for attribute, value in attributes.items():
            set_number(model.get_submodule(name), attribute, (value,) if attribute == "normalized_shape" else value)
    layers: list[Any] = list(model.modules())
    for layer in layers:
        kind = kind_of(layer)
        if kind.recurrent:
            layer.flatten_parameters()
        if kind.affine is not None and layer.weight is not None:
            setattr(layer, kind.affine, True)
    model.dampr_manifest = content.compaction  # type: ignore[assignment]
    return model.eval()


def check_plain(model: nn.Module, by: str = "dampr.compact") -> None:
    """Raise TypeError, with the name of the first gated layer, if the model has gates. ``by`` is the function that
    would remove them, for the message.
    """
    _checks.module("model", model)
    gated = [name for name, module in by_name(model, GatedLayer).items()]
    if gated:
        raise TypeError(
            f"model: layer {gated[0]!r} still has gates; expected a compacted model ({by}); for checkpoints use "
            "state_dict()"
        )


def read_manifest(path: str | os.PathLike[str]) -> tuple[dict[str, Any], int]:
    """(the manifest of compaction in a file of :func:`save`, {} if there is none; the number of elements of all tensors
    in the file).

    Raises FileNotFoundError and FileError like :func:`load`.
    """
    content = read(path)
    return content.compaction or {}, sum(tensor.numel() for tensor in content.state.values())


def _unshared(model: nn.Module) -> dict[str, Tensor]:
    """The state of a model with each shared tensor only under its first name, and each tensor in memory of its own.

    Raises TypeError for anything but dense tensors with values.
    """
    first: dict[int, str] = {}
    state: dict[str, Tensor] = {}
    memory: set[int] = set()
    for name, t in model.state_dict(keep_vars=True).items():
        if not isinstance(t, Tensor) or is_lazy(t) or t.is_meta or t.layout != torch.strided:
            raise TypeError(f"model: {name!r} in its state dict is {_kind(t)}: expected a dense tensor with values")
        if first.setdefault(id(t), name) == name:
            place = t.untyped_storage().data_ptr()
            state[name] = t.detach().clone() if place in memory else t.detach().contiguous()
            memory.add(place)
    return state


def _kind(value: Any) -> str:
    """What a value in a state dict is, for the error message."""
    if not isinstance(value, Tensor) or is_lazy(value):
        return type(value).__name__
    return "on the meta device" if value.is_meta else str(value.layout)


def _describe_whole(model: nn.Module, content: Content) -> dict[str, Any] | None:
    """The model as data; None if a model built from that data would differ in its text, in its constructors' attributes
    or in its tensors.
    """
    try:
        description = describe(model)
        twin = build(json.loads(json.dumps(description)), content)
        fit(twin, content, exact=True)
    except (FileError, AttributeError, TypeError, ValueError):
        return None
    modules = dict(model.named_modules(remove_duplicate=False))
    plain = (bool, int, float, str, tuple, list, type(None))
    for name, module in twin.named_modules(remove_duplicate=False):
        for attribute, value in vars(module).items():
            if (
                attribute[0] != "_"
                and attribute != "training"
                and isinstance(value, plain)
                and vars(modules[name]).get(attribute) != value
            ):
                return None
    return description if str(twin) == str(model) else None


def _put_leftovers(model: nn.Module, content: Content) -> dict[nn.Module, nn.Module]:
    """Put the ``dampr.nn`` layers that a file describes into the dense original, without values yet. Returns old layer
    -> new layer.

    Raises FileError, and then changes nothing.
    """
    modules = dict(model.named_modules())
    replaced: dict[nn.Module, nn.Module] = {}
    for name, description in content.leftovers.items():
        if not name or name not in modules:
            raise FileError(f"{content.where}: does not fit model; only in the file: [{name!r}]")
        new = build(description, content)
        for part, t in new.state_dict(prefix=f"{name}.", keep_vars=True).items():
            stored = content.state.get(part)
            if stored is None or stored.shape != t.shape or stored.is_floating_point() != t.is_floating_point():
                found = "" if stored is None else f" {stored.dtype} {tuple(stored.shape)}"
                raise FileError(f"{content.where}: layer {name!r}: what it is does not go with {part}{found}")
            t.data = t.data.to(stored.dtype)
        device = next((t.device for t in (*modules[name].parameters(), *model.parameters())), None)
        replaced[modules[name]] = new.to_empty(device=device).train(modules[name].training)
    inputs.replace(model, replaced)
    return replaced
