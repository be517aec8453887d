"""Checks whether the content of a file fits a model: names, sizes and dtypes of tensors, and widths of layers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from . import composites
from .file_content import Content, FileError, is_size
from .file_layers import arguments_of, construct, parameters_of
from .layers.registry import kind_of
from .unit_compact import sizes_of
from .units.numbers import number_of

WIDTHS = (
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


def is_width(module: nn.Module, attribute: str) -> bool:
    """Whether the layer stores a size in this attribute, rather than computing it from others (a property)."""
    return not isinstance(getattr(type(module), attribute.partition(".")[0], None), property) and is_size(
        width_of(module, attribute)
    )


def width_of(module: nn.Module | None, attribute: str) -> Any:
    """The value of an attribute; for the shape of a norm over one dimension its size. "shape.0" is the first number of
    a tuple.
    """
    if "." in attribute:
        return None if module is None else number_of(module, attribute)
    value = getattr(module, attribute, None)
    return value[0] if attribute == "normalized_shape" and isinstance(value, tuple) and len(value) == 1 else value


def fit(model: nn.Module, content: Content, exact: bool = False) -> list[tuple[nn.Module, str, str, Tensor]]:
    """Check that a file fits a model, and return where each tensor goes: (layer, attribute, name in the file, tensor
    that it replaces). Nothing is changed.

    A tensor must be no larger than the one that it replaces, and of the same dtype. If the model was built for the file
    (``exact``), the shapes must be equal, and floating dtypes are taken from the file. Raises FileError.
    """
    where, state = content.where, content.state
    modules = dict(model.named_modules(remove_duplicate=False))
    own: dict[str, Tensor] = dict(model.state_dict(keep_vars=True))
    # a shared tensor is in the file once, under its first name
    stored = {id(own[name]): name for name in reversed(own) if name in state}
    like = dict(own)
    for name in set(state) - set(own):
        layer: Any = modules.get(name.rpartition(".")[0])
        kind = kind_of(layer)
        if name.endswith("bias") and kind.reads and getattr(layer, "bias", False) is None:
            like[name] = layer.weight
        elif name.endswith(("weight", "bias")) and kind.affine is not None and getattr(layer, "weight", None) is None:
            known = next((t for t in layer.buffers() if t.is_floating_point()), None)
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


_Shapes = dict[str, tuple[int, ...]]


def _check_widths(modules: dict[str, nn.Module], content: Content, shapes: _Shapes, exact: bool) -> None:
    """Raise FileError unless the widths name existing attributes, and layers built with these widths have tensors of
    the file's shapes.

    With ``exact`` the model was built from the file, and all its layers already have these widths.
    """
    for name, attributes in content.widths.items():
        for attribute, value in attributes.items():
            known = attribute in WIDTHS or attribute in sizes_of(content.compaction).get(name, {})
            size = width_of(modules.get(name), attribute)
            if not known or not is_size(size):
                raise FileError(f"{content.where}: manifest: widths: model has no size {name}.{attribute}")
            built = not kind_of(modules[name]).from_file and (exact or composites.is_own(modules[name]))
            if size != value and built:
                what = f"{name}.{attribute}={value}, expected {size}, what the layer is built with"
                raise FileError(f"{content.where}: manifest: widths: {what}")
    names = {module: name for name, module in reversed(modules.items())}
    for module, name in names.items():
        if not kind_of(module).from_file:
            continue
        kind = next(k for k in type(module).__mro__ if getattr(nn, k.__name__, None) is k)
        prefix = f"{name}." if name else ""
        widths = content.widths.get(name, {})
        arguments = arguments_of(module, kind) | {k: v for k, v in widths.items() if k in parameters_of(kind)}
        if f"{prefix}bias" in shapes:
            arguments.pop("bias", None)
        if f"{prefix}weight" in shapes and (affine := kind_of(module).affine) is not None:
            arguments[affine] = True
        twin = construct(kind, arguments, f"{content.where}: layer {name!r}")
        if isinstance(twin, nn.modules.conv._ConvNd):
            dims = len(twin.kernel_size)
            several = (twin.stride, twin.padding, twin.dilation, twin.output_padding)
            if any(not isinstance(own, str) and len(own) != dims for own in several):
                raise FileError(f"{content.where}: layer {name!r}: {twin}, expected {dims} numbers of each argument")
        expected = {k: tuple(t.shape) for k, t in twin.state_dict(prefix=prefix).items()}
        wrong = [k for k in expected if shapes.get(k, expected[k]) != expected[k]] + [
            k for k, v in widths.items() if width_of(twin, k) != v
        ]
        if wrong:
            raise FileError(
                f"{content.where}: layer {name!r}: its widths {widths} do not go with {wrong[0]} "
                f"{shapes.get(wrong[0], '')}"
            )
