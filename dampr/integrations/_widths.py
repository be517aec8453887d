"""The widths of a pruned transformers model as data in its config, and the stock model narrowed to them.

    config.dampr = { "format": 1, "heads": {"model.layers.0.self_attn": 3}, "linear": {"model.layers.0.mlp.up_proj":
    [64, 17]}, "biases": [], }

``heads``: the number of heads that are left of each pruned attention (sets of query heads, if they share a key);
``linear``: [in, out] of other pruned layers; ``biases``: the layers to which compaction gave a bias. Everything that is
not named has the size that the rest of the config says.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from dampr.prune import FileError, heads, transposed

FORMAT = 1
KEY = "dampr"


def stock(model: PreTrainedModel) -> PreTrainedModel:
    """The unpruned model that the config of ``model`` describes, on the meta device."""
    config = copy.deepcopy(model.config)
    if hasattr(config, KEY):
        delattr(config, KEY)
    with torch.device("meta"):
        return type(model)(config)


def describe(model: PreTrainedModel) -> dict[str, Any]:
    """The widths of a plain model without ``Conv1D`` layers that differ from the stock model, as in ``config.dampr``.

    Raises: TypeError for a difference of another kind.
    """
    whole = stock(model)
    transposed.to_linear(whole)
    before = {attention.name: attention.heads for attention in heads.find(whole)}
    own = {
        attention.name: attention.heads for attention in heads.find(model) if attention.heads != before[attention.name]
    }
    spec: dict[str, Any] = {"format": FORMAT, "heads": own, "linear": {}, "biases": []}
    of_heads = {layer for layer, attention in heads.parts(model).items() if attention.name in own}
    layers = dict(whole.named_modules())
    for name, layer in model.named_modules():
        other = layers.get(name)
        if isinstance(layer, nn.Linear) and isinstance(other, nn.Linear):
            if layer.bias is not None and other.bias is None:
                spec["biases"].append(name)
            if layer.weight.shape != other.weight.shape and layer not in of_heads:
                spec["linear"][name] = [layer.in_features, layer.out_features]
        elif _shapes(layer) != _shapes(other):
            raise TypeError(
                f"layer {name!r}, {type(layer).__name__}: expected that only linear layers and heads became smaller"
            )
    return spec


def _shapes(layer: nn.Module | None) -> dict[str, Any] | None:
    """name -> shape of the parameters of a layer; None for None."""
    tensors = layer if layer is None else dict(layer.named_parameters(recurse=False))
    return None if tensors is None else {name: tensor.shape for name, tensor in tensors.items()}


def narrow(model: nn.Module, spec: Any) -> None:
    """Make a stock model as narrow as ``spec`` says; its tensors keep their first rows and columns.

    Raises: FileError if ``spec`` has not the right form, or does not fit the model.
    """
    check(spec)
    conv1d = transposed.to_linear(model)
    _check_fit(model, spec)
    layers: dict[str, Any] = dict(model.named_modules())
    with torch.device("cpu"):  # transformers builds models with another default, and indices are wanted here
        heads.cut(model, {name: list(range(count)) for name, count in spec["heads"].items()})
        for name, (read, written) in spec["linear"].items():
            heads.narrow(layers[name], torch.arange(written), True)
            heads.narrow(layers[name], torch.arange(read), False)
    for name in spec["biases"]:
        weight = layers[name].weight
        layers[name].bias = nn.Parameter(weight.new_zeros(len(weight)))
    transposed.back(model, conv1d)


def _check_fit(model: nn.Module, spec: dict[str, Any]) -> None:
    """Raise FileError unless ``model`` has the layers that ``spec`` names, at least as wide as it says."""
    kind, layers = type(model).__name__, dict(model.named_modules())
    attentions = {attention.name: attention for attention in heads.find(model)}
    of_heads = {layer for layer, attention in heads.parts(model).items() if attention.name in spec["heads"]}
    for name, count in spec["heads"].items():
        if name not in attentions or count > attentions[name].heads:
            raise FileError(f"config.{KEY}: heads of {name!r}: {count}, expected an attention of {kind} with so many")
    for name, sizes in spec["linear"].items():
        layer = layers.get(name)
        if not isinstance(layer, nn.Linear) or layer in of_heads:
            raise FileError(
                f"config.{KEY}: linear {name!r}: expected a linear layer of {kind} beside its pruned attention"
            )
        whole = [layer.in_features, layer.out_features]
        if any(size > most for size, most in zip(sizes, whole, strict=True)):
            raise FileError(f"config.{KEY}: linear {name!r}: {sizes}, expected at most {whole}")
    for name in spec["biases"]:
        layer = layers.get(name)
        if not isinstance(layer, nn.Linear) or layer.bias is not None:
            raise FileError(f"config.{KEY}: biases: {name!r}, expected a linear layer of {kind} that has none")


def check(spec: Any) -> None:
    """Raise FileError unless ``spec`` has the form of what :func:`describe` returns."""
    if not isinstance(spec, dict) or spec.get("format") != FORMAT:
        raise FileError(
            f"config.{KEY}: {spec!r:.80}, expected widths in format {FORMAT}; a newer dampr may have written it"
        )
    counts, linear, biases = (spec.get(key) for key in ("heads", "linear", "biases"))
    if not isinstance(counts, dict) or not all(_is_size(n) for n in counts.values()):
        raise FileError(f"config.{KEY}: heads has to map names of attentions to numbers of heads")
    if not isinstance(linear, dict) or not all(
        isinstance(s, list) and len(s) == 2 and all(map(_is_size, s)) for s in linear.values()
    ):
        raise FileError(f"config.{KEY}: linear has to map names of layers to [in, out]")
    if not isinstance(biases, list) or not all(isinstance(name, str) for name in biases):
        raise FileError(f"config.{KEY}: biases has to be a list of names of layers")


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0
