"""save and load: tensors in safetensors, everything else as JSON in its header. No pickle is written or read.

A file is not believed: its digest, the form of its manifest and the fit of every tensor
are checked before a model is touched.
"""

from __future__ import annotations

import contextlib
import hashlib
import inspect
import json
import math
import os
import warnings
from dataclasses import dataclass
from typing import Any, overload

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from dampr import _checks
from dampr import nn as dampr_nn
from dampr._version import __version__
from dampr._writing import whole_or_nothing
from dampr.nn import GatedLayer

from . import composites, inputs
from .inputs import Model
from .modules import by_name
from .unit_compact import sizes_of
from .units.sizes import number_of, set_number
from .wrapped import check_bare, sees_through

_FORMAT = 1
_KEY = "dampr"
_WIDTHS = (
    *(
        "in_features",
        "out_features",
        "in_channels",
        "out_channels",
        "groups",
        "num_features",
        "num_parameters",
        "embedding_dim",
    ),
    *(
        "input_size",
        "hidden_size",
        "proj_size",
        "embed_dim",
        "num_heads",
        "head_dim",
        "kdim",
        "vdim",
        "d_model",
        "normalized_shape",
    ),
    *(
        "num_groups",
        "num_channels",
        "num_attention_heads",
        "all_head_size",
        "split_size",
        "nf",
        "nx",
    ),  # of transformers' attention and Conv1D
)
_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
_MAY_GAIN_BIAS = (nn.Linear, nn.modules.conv._ConvNd)
_AFFINE = {nn.modules.batchnorm._NormBase: "affine", nn.LayerNorm: "elementwise_affine"}  # what a norm says of its gain
_SIZED = (
    *_MAY_GAIN_BIAS,
    nn.modules.batchnorm._NormBase,
    nn.LayerNorm,
    nn.GroupNorm,
    nn.PReLU,
    nn.Embedding,
    nn.MultiheadAttention,
    nn.RNNBase,
)


class FileError(RuntimeError):
    """A file is not what it should be, or does not fit the model."""


@dataclass(frozen=True)
class _Content:
    """What a file says, in the right form; whether it fits a model is for :func:`_fit` to find out."""

    where: str
    state: dict[str, Tensor]
    widths: dict[str, dict[str, int]]
    architecture: dict[str, Any] | None
    leftovers: dict[str, Any]
    compaction: dict[str, Any] | None


@sees_through
def save(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Write a plain (compacted) model: one safetensors file whose header holds the manifest.

    Models made of ``nn.Sequential``, ``nn.ModuleList``, ``nn.ModuleDict``, ``torch.nn`` layers (attention, transformer
    layers and stacks of them too) and the plain ones of ``dampr.nn`` can be loaded by the path alone, if building them
    anew from what the manifest says of them gives the same (tried here); any other needs its dense original at loading
    time. The file appears whole or not at all.

    Raises: TypeError for a model that still has gates (compact it first); FileError for a layer whose tensors are not
    of the size that its attributes (``in_features``, ...) say.
    """
    from safetensors.torch import save_file

    check_plain(model)
    _checks.path("path", path)
    own = sizes_of(getattr(model, "dampr_manifest", None))
    widths = {
        n: {a: _width(m, a) for a in (*_WIDTHS, *own.get(n, {})) if _is_width(m, a)} for n, m in model.named_modules()
    }
    for name, module in model.named_modules():
        if isinstance(module, nn.RNNBase) and not module.proj_size:
            del widths[name]["proj_size"]  # no argument of nn.GRU and nn.RNN
    compaction = getattr(model, "dampr_manifest", None)
    content = _Content(
        "model", _unshared(model), {n: a for n, a in widths.items() if a}, None, _describe_leftovers(model), compaction
    )
    _fit(model, content)
    manifest = {
        "format": _FORMAT,
        "version": __version__,
        "torch": torch.__version__,
        "widths": content.widths,
        "architecture": _describe_whole(model, content),
        "leftovers": content.leftovers,
        "compaction": content.compaction,
    }
    manifest["sha256"] = _digest(manifest, content.state)
    with whole_or_nothing(path) as partial:
        save_file(content.state, partial, metadata={_KEY: json.dumps(manifest)})


@overload
def load(path: str | os.PathLike[str], model: Model) -> Model: ...
@overload
def load(path: str | os.PathLike[str], model: None = None) -> nn.Module: ...
def load(path: str | os.PathLike[str], model: nn.Module | None = None) -> nn.Module:
    """Read what :func:`save` wrote.

    Args:
        path: the file.
        model: the dense original, as it was before ``convert`` (its weights do not matter), in the dtypes of the file;
            it is narrowed in place and returned. A bias that compaction gave to a linear or conv layer is added, and
            the gain of a norm that had none; a layer of ``dampr.nn`` that it put in the place of another one is put
            there. None: the model is built from the file, in its dtypes, which works for containers and layers of
            ``torch.nn`` and those of ``dampr.nn``.

    Returns: the model in evaluation mode, on the CPU when built from the file.

    Raises: FileNotFoundError; FileError for a file that is truncated, damaged, changed, not from here, or that does not
    fit ``model``, which then is as it was. (The digest finds accidents; whoever changes a file on purpose can recompute
    it, so all else is checked too.)
    """
    if model is not None:
        check_bare(_checks.module("model", model), "its layers become narrower")
    content = _read(_checks.path("path", path))
    exact = model is None
    if model is None:
        if content.architecture is None:
            raise FileError(
                f"{content.where}: it holds layers that only their own code can build; pass the dense original as "
                "model="
            )
        model = _build(content.architecture, content)
    replaced = {} if exact else _put_leftovers(model, content)
    try:
        fitting = _fit(model, content, exact)
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
    for module, attribute, tensor in changes:  # no tensor was changed so far
        setattr(module, attribute, tensor)
    for name, attributes in content.widths.items():
        for attribute, value in attributes.items():
            set_number(model.get_submodule(name), attribute, (value,) if attribute == "normalized_shape" else value)
    for module in model.modules():
        if isinstance(module, nn.RNNBase):
            module.flatten_parameters()
        if (affine := _affine(module)) is not None and module.weight is not None:
            setattr(module, affine, True)
    model.dampr_manifest = content.compaction  # type: ignore[assignment]
    return model.eval()


def check_plain(model: nn.Module, by: str = "dampr.compact") -> None:
    """Raise TypeError that names the first layer with gates, and ``by`` which function they go."""
    _checks.module("model", model)
    gated = [name for name, module in by_name(model, GatedLayer).items()]
    if gated:
        raise TypeError(
            f"model: layer {gated[0]!r} still has gates; expected a compacted model ({by}); for checkpoints use "
            "state_dict()"
        )


def read_manifest(path: str | os.PathLike[str]) -> tuple[dict[str, Any], int]:
    """What compaction recorded in a file of :func:`save` ({} where it did not),
    and how many parameters and buffers the file holds.

    Raises FileNotFoundError and FileError like :func:`load`.
    """
    content = _read(path)
    return content.compaction or {}, sum(tensor.numel() for tensor in content.state.values())


def _read(path: str | os.PathLike[str]) -> _Content:
    """The content of a file: unchanged since it was written, and of the right form.

    safetensors opens a file by its name twice, for the header and for the tensors. Where another one took its place in
    between, that one is read.
    """
    where = f"path={os.fspath(path)!r}"
    while True:
        if not os.path.exists(path):
            raise FileNotFoundError(f"{where}: expected a file written by dampr.save")
        found = _identity(path)
        try:
            content = _read_once(path, where)
        except FileError:
            if _identity(path) == found:
                raise
            continue
        if _identity(path) == found:
            return content


def _identity(path: str | os.PathLike[str]) -> tuple[int, int, int]:
    stat = os.stat(path)
    return stat.st_dev, stat.st_ino, stat.st_mtime_ns


def _read_once(path: str | os.PathLike[str], where: str) -> _Content:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:  # type: ignore[no-untyped-call]
            metadata = file.metadata() or {}
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, ValueError, OSError) as error:
        raise FileError(f"{where}: not a whole safetensors file ({error})") from error
    try:
        manifest = json.loads(metadata[_KEY])
        digest = _digest(manifest, state) if isinstance(manifest, dict) else None
    except (KeyError, ValueError, RecursionError) as error:
        raise FileError(f"{where}: no dampr manifest in its header; expected a file written by dampr.save") from error
    if digest is None or manifest.get("format") != _FORMAT:
        found = manifest.get("format") if digest else manifest
        raise FileError(f"{where}: format {found!r}, expected {_FORMAT}; a newer dampr may have written it")
    if manifest.get("sha256") != digest:
        raise FileError(
            f"{where}: tensors and manifest do not match the recorded SHA-256; the file was changed after it was "
            "written"
        )
    widths, architecture, compaction = (manifest.get(key) for key in ("widths", "architecture", "compaction"))
    if not isinstance(widths, dict) or not all(
        isinstance(w, dict) and all(map(_is_size, w.values())) for w in widths.values()
    ):
        raise FileError(f"{where}: manifest: widths has to map names of layers to their sizes")
    for key, value in (("architecture", architecture), ("compaction", compaction)):
        if key not in manifest or not isinstance(value, dict | None):
            raise FileError(f"{where}: manifest: {key} has to be an object or null")
    left = manifest.get("leftovers", {})  # older files have none
    if not isinstance(left, dict):
        raise FileError(f"{where}: manifest: leftovers has to map names of layers to what they are")
    try:
        sizes_of(compaction)
    except ValueError as error:
        raise FileError(f"{where}: {error}") from error
    return _Content(where, state, widths, architecture, left, compaction)


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63


def _is_width(module: nn.Module, attribute: str) -> bool:
    """Whether a layer has its size in this attribute, and not one that follows from others."""
    return not isinstance(getattr(type(module), attribute.partition(".")[0], None), property) and _is_size(
        _width(module, attribute)
    )


def _width(module: nn.Module | None, attribute: str) -> Any:
    """What a layer has in this attribute; of a norm of one dimension its size. "shape.0" is a number in a tuple."""
    if "." in attribute:
        return None if module is None else number_of(module, attribute)
    value = getattr(module, attribute, None)
    return value[0] if attribute == "normalized_shape" and isinstance(value, tuple) and len(value) == 1 else value


def _unshared(model: nn.Module) -> dict[str, Tensor]:
    """The state of a model with each shared tensor under its first name only."""
    first: dict[int, str] = {}
    own = model.state_dict(keep_vars=True)
    return {name: t.detach().contiguous() for name, t in own.items() if first.setdefault(id(t), name) == name}


def _digest(manifest: dict[str, Any], state: dict[str, Tensor]) -> str:
    """SHA-256 over the manifest without its digest, and the names, dtypes, shapes and values of all tensors."""
    # keys as they come back
    rest = json.loads(json.dumps({key: value for key, value in manifest.items() if key != "sha256"}))
    total = hashlib.sha256(json.dumps(rest, sort_keys=True, separators=(",", ":")).encode())
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        total.update(f"\n{name}:{tensor.dtype}:{tuple(tensor.shape)}\n".encode())
        total.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return total.hexdigest()


def _fit(model: nn.Module, content: _Content, exact: bool = False) -> list[tuple[nn.Module, str, str, Tensor]]:
    """What goes where in a model, as (layer, attribute, name in the file, tensor it is to be like), after all checks;
    changes nothing.

    A tensor takes the place of one no smaller and of the same dtype, or, if the model was built for the file
    (``exact``), of one of the same shape; that model takes on the file's floating dtypes.
    """
    where, state = content.where, content.state
    modules = dict(model.named_modules(remove_duplicate=False))
    own: dict[str, Tensor] = dict(model.state_dict(keep_vars=True))
    # a shared tensor is in the file once, under its first name
    stored = {id(own[name]): name for name in reversed(own) if name in state}
    like = dict(own)
    for name in set(state) - set(own):
        layer = modules.get(name.rpartition(".")[0])
        if name.endswith("bias") and isinstance(layer, _MAY_GAIN_BIAS) and layer.bias is None:
            like[name] = layer.weight
        elif (
            name.endswith(("weight", "bias")) and _affine(layer) is not None and getattr(layer, "weight", None) is None
        ):
            known = next((t for t in layer.buffers() if t.is_floating_point()), None)  # type: ignore[union-attr]
            like[name] = nn.Parameter(torch.empty_like(state[name] if known is None else known))
    source = {n: n if n in state else stored.get(id(t), "") for n, t in like.items()}
    absent, missing = sorted(set(state) - set(like)), [n for n, found in source.items() if not found]
    if absent or missing:
        raise FileError(
            f"{where}: does not fit model; only in the file: {absent[:3]}, only in the model: {missing[:3]}"
        )
    for name, old in like.items():
        new = state[source[name]]
        if is_lazy(old) or (
            new.dtype != old.dtype and not (exact and new.is_floating_point() and old.is_floating_point())
        ):
            raise FileError(
                f"{where}: tensor {name!r} is {new.dtype}, but {old.dtype} in model; model.to(dtype) may help"
            )
        smaller = new.dim() == old.dim() and all(a <= b for a, b in zip(new.shape, old.shape, strict=True))
        if name in own and not (new.shape == old.shape if exact else smaller):
            raise FileError(
                f"{where}: tensor {name!r} has shape {tuple(new.shape)}, which cannot come from {tuple(old.shape)} in "
                "model"
            )
    _check_widths(modules, content, {name: tuple(state[found].shape) for name, found in source.items()}, exact)
    return [(modules[n.rpartition(".")[0]], n.rpartition(".")[2], found, like[n]) for n, found in source.items()]


def _affine(module: nn.Module | None) -> str | None:
    """The attribute of a norm that says whether it has a gain; None of other layers."""
    return next((attribute for kind, attribute in _AFFINE.items() if isinstance(module, kind)), None)


_Shapes = dict[str, tuple[int, ...]]


def _check_widths(modules: dict[str, nn.Module], content: _Content, shapes: _Shapes, exact: bool) -> None:
    """The widths name attributes that are there, and a layer built with them has tensors of the file's shapes.

    What was built from the file (``exact``: all of it) has these widths already.
    """
    for name, attributes in content.widths.items():
        for attribute, value in attributes.items():
            known = attribute in _WIDTHS or attribute in sizes_of(content.compaction).get(name, {})
            size = _width(modules.get(name), attribute)
            if not known or not _is_size(size):
                raise FileError(f"{content.where}: manifest: widths: model has no size {name}.{attribute}")
            built = not isinstance(modules[name], _SIZED) and (exact or composites.is_own(modules[name]))
            if size != value and built:
                what = f"{name}.{attribute}={value}, expected {size}, what the layer is built with"
                raise FileError(f"{content.where}: manifest: widths: {what}")
    names = {module: name for name, module in reversed(modules.items())}
    for module, name in names.items():
        if not isinstance(module, _SIZED):
            continue
        kind = next(k for k in type(module).__mro__ if getattr(nn, k.__name__, None) is k)
        prefix = f"{name}." if name else ""
        widths = content.widths.get(name, {})
        arguments = _arguments(module, kind) | {k: v for k, v in widths.items() if k in _parameters(kind)}
        if f"{prefix}bias" in shapes:
            arguments.pop("bias", None)
        if f"{prefix}weight" in shapes and (affine := _affine(module)) is not None:
            arguments[affine] = True
        twin = _construct(kind, arguments, f"{content.where}: layer {name!r}")
        if isinstance(twin, nn.modules.conv._ConvNd):
            dims = len(twin.kernel_size)
            several = (twin.stride, twin.padding, twin.dilation, twin.output_padding)
            if any(not isinstance(own, str) and len(own) != dims for own in several):
                raise FileError(f"{content.where}: layer {name!r}: {twin}, expected {dims} numbers of each argument")
        expected = {k: tuple(t.shape) for k, t in twin.state_dict(prefix=prefix).items()}
        wrong = [k for k in expected if shapes.get(k, expected[k]) != expected[k]] + [
            k for k, v in widths.items() if _width(twin, k) != v
        ]
        if wrong:
            raise FileError(
                f"{content.where}: layer {name!r}: its widths {widths} do not go with {wrong[0]} "
                f"{shapes.get(wrong[0], '')}"
            )


def _describe_whole(model: nn.Module, content: _Content) -> dict[str, Any] | None:
    """A model as data, or None if that does not lead back to the same: in text,
    in the attributes that constructors set, in its tensors.
    """
    try:
        description = _describe(model)
        twin = _build(json.loads(json.dumps(description)), content)
        _fit(twin, content, exact=True)
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


def _describe(module: nn.Module) -> dict[str, Any]:
    kind = type(module)
    parts = composites.parts_of(module)
    if parts is not None:
        return {
            "type": kind.__name__,
            "arguments": parts[0],
            "children": {name: _describe(child) for name, child in parts[1].items()},
        }
    if getattr(nn, kind.__name__, None) is not kind:
        raise TypeError(f"{kind.__name__} is not a class of torch.nn")
    if isinstance(module, _CONTAINERS):
        return {"type": kind.__name__, "children": {name: _describe(child) for name, child in module._modules.items()}}  # type: ignore[arg-type]
    if module._modules:
        raise TypeError(f"{kind.__name__} has layers in it")
    return {"type": kind.__name__, "arguments": _arguments(module, kind)}


def _describe_leftovers(model: nn.Module) -> dict[str, Any]:
    """The outermost layers of dampr.nn in a model by name, as far as data can tell what they are,
    and what stands for nothing at all.
    """
    found: dict[str, Any] = {}
    for name, module in model.named_modules():
        if not name or any(name.startswith(f"{outer}.") for outer in found):
            continue
        if type(module) is nn.Identity or composites.is_own(module):
            with contextlib.suppress(TypeError):
                found[name] = _describe(module)
    return found


def _put_leftovers(model: nn.Module, content: _Content) -> dict[nn.Module, nn.Module]:
    """Put the layers of dampr.nn that a file has into its dense original, empty; returns old and new ones.

    Or FileError, and no change.
    """
    modules = dict(model.named_modules())
    replaced: dict[nn.Module, nn.Module] = {}
    for name, description in content.leftovers.items():
        if not name or name not in modules:
            raise FileError(f"{content.where}: does not fit model; only in the file: [{name!r}]")
        new = _build(description, content)
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


def _parameters(kind: type[Any]) -> dict[str, Any]:
    """The constructor's parameters and their defaults; recurrent layers pass theirs on to nn.RNNBase."""
    recurrent = issubclass(kind, nn.RNNBase)
    signature = inspect.signature(nn.RNNBase if recurrent else kind)
    named = {n: p.default for n, p in signature.parameters.items() if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)}
    if recurrent:
        named = {k: v for k, v in named.items() if k != "mode"} | ({"nonlinearity": "tanh"} if kind is nn.RNN else {})
    return {name: default for name, default in named.items() if name not in ("device", "dtype", "process_group")}


def _arguments(module: nn.Module, kind: type[Any]) -> dict[str, Any]:
    """The constructor's arguments, from the attributes of the same names,
    as far as there are any and they are not the defaults.
    """
    arguments: dict[str, Any] = {}
    for name, default in _parameters(kind).items():
        if hasattr(module, name):
            value = getattr(module, name)
            value = value is not None if name == "bias" and not isinstance(value, bool) else value
            if type(value) is not type(default) or value != default:
                arguments[name] = value
    return arguments


def _build(description: Any, content: _Content, depth: int = 0) -> nn.Module:
    """A model from its description, with tensors that take no memory."""
    where = f"{content.where}: architecture"
    if not isinstance(description, dict) or not isinstance(description.get("type"), str):
        raise FileError(f"{where}: {description!r} has to be an object with a type")
    if description["type"] in composites.BUILDERS:
        return _build_composite(description, content, depth)
    kind = getattr(nn, description["type"], None)
    if not (isinstance(kind, type) and issubclass(kind, nn.Module) and kind is not nn.Module):
        raise FileError(f"{where} names {description['type']!r}: expected a class of torch.nn")
    parts = description.get("children" if issubclass(kind, _CONTAINERS) else "arguments")
    if not isinstance(parts, dict):
        raise FileError(f"{where}: torch.nn.{kind.__name__} comes without children or arguments")
    if issubclass(kind, _CONTAINERS):
        container = kind()
        for name, child in parts.items():
            if not name or "." in name or hasattr(container, name) or depth > 100:
                raise FileError(f"{where}: {name!r} cannot be in torch.nn.{kind.__name__}")
            container.add_module(name, _build(child, content, depth + 1))
        return container
    # a count that takes time even without memory
    layers = [value for name, value in parts.items() if name.endswith("_layers")]
    if set(parts) - set(_parameters(kind)) or not all(_is_size(n) and n <= len(content.state) for n in layers):
        raise FileError(f"{where}: torch.nn.{kind.__name__} does not take {parts}")
    given = {k: tuple(v) if isinstance(v, list) else v for k, v in parts.items()}
    _check_kinds(_parameters(kind), given, f"{where}: torch.nn.{kind.__name__}")
    return _construct(kind, given, where)


def _check_kinds(parameters: dict[str, Any], given: dict[str, Any], where: str) -> None:
    """Raise FileError for what is not of the kind of a constructor's default; those of torch look at few arguments."""
    for name, value in given.items():
        default = parameters.get(name)
        if isinstance(default, bool):
            fits = isinstance(value, bool)
        elif isinstance(default, float):
            fits = _is_number(value) or (value is None and name == "momentum")
        elif isinstance(default, int):
            whole = all(map(_is_whole, value)) if isinstance(value, tuple) else _is_whole(value)
            fits = whole or (isinstance(value, str) and name == "padding")
        else:
            fits = not isinstance(value, float) or _is_number(value)
        if not fits:
            raise FileError(f"{where} does not take {name}={value!r:.80}, expected something like {default!r}")


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**63


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < math.inf


def _build_composite(description: dict[str, Any], content: _Content, depth: int) -> nn.Module:
    arguments, children = description.get("arguments"), description.get("children")
    if (
        not isinstance(arguments, dict)
        or not isinstance(children, dict)
        or depth > 100
        or {"device", "dtype", *children} & set(arguments)
    ):
        raise FileError(
            f"{content.where}: architecture: {description['type']} comes without arguments and children of its own"
        )
    given = {k: tuple(v) if isinstance(v, list) else v for k, v in arguments.items()}
    build = composites.BUILDERS[description["type"]]
    layer: type[Any] = getattr(nn, description["type"], None) or getattr(dampr_nn, description["type"])
    _check_kinds(_parameters(layer), given, f"{content.where}: architecture: {description['type']}")
    parts = given | {name: _build(child, content, depth + 1) for name, child in children.items()}
    try:
        with torch.device("meta"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return build(**parts)
    except Exception as error:
        raise FileError(
            f"{content.where}: architecture: {description['type']} does not take {arguments} ({error})"
        ) from error


def _construct(kind: type[Any], arguments: dict[str, Any], where: str) -> nn.Module:
    try:
        with torch.device("meta"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return kind(**arguments)
    except Exception as error:  # whatever torch's constructors make of values that are not theirs
        raise FileError(f"{where}: torch.nn.{kind.__name__} does not take {arguments} ({error})") from error
