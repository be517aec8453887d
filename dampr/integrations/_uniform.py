"""Give every layer the same number of heads and of neurons, so that the config of a stock model can describe a pruned
one.

Layers with fewer open gates keep closed heads and neurons, with weights of 0.
"""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from dampr.gates import Fixed
from dampr.nn import GatedHeads, GatedLinear
from dampr.prune import gated_layers, heads, inputs


@dataclass(frozen=True)
class Family:
    """The entries of a model's config that describe its widths.

    Attributes:
        layers: a glob for the layers whose outputs are neurons.
        neurons: the entry with their number.
        heads: the entries that are proportional to the number of heads; empty if the width of a head follows from their
            number, so that no head can be removed.
    """

    layers: str
    neurons: str
    heads: tuple[str, ...] = ()


_LLAMA = Family("*.mlp.up_proj", "intermediate_size", ("num_attention_heads", "num_key_value_heads"))
FAMILIES = {
    "bert": Family("*.intermediate.dense", "intermediate_size"),
    "gpt2": Family("*.mlp.c_fc", "n_inner"),
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "roberta": Family("*.intermediate.dense", "intermediate_size"),
    "vit": Family("*.mlp.fc1", "intermediate_size", ("num_attention_heads",)),
}


def level(model: PreTrainedModel, round_to: int) -> tuple[PreTrainedModel, dict[str, str]]:
    """(a copy that computes the same, name -> why closed gates stay).

    In the copy every layer has as many open gates as the widest one, rounded up to a multiple of ``round_to``.

    Raises: ValueError for a model whose config is not known, or with gates elsewhere than on heads and linear layers.
    """
    kind = model.config.model_type
    if kind not in FAMILIES:
        raise ValueError(
            f"uniform=True: the config of model_type {kind!r} is not known, expected one of {sorted(FAMILIES)}"
        )
    family, trial = FAMILIES[kind], inputs.copied(model)
    gated = gated_layers(trial)
    neurons = [
        name
        for name, layer in trial.named_modules()
        if isinstance(layer, nn.Linear) and fnmatchcase(name, family.layers)
    ]
    attentions = [attention.written_name for attention in heads.find(trial)]
    together = {name: attentions if family.heads else [] for name in attentions} | dict.fromkeys(neurons, neurons)
    notes = {}
    masks = {name: layer.gate.is_open() for name, layer in gated.items()}
    for name, layer in gated.items():
        if not isinstance(layer, (GatedLinear, GatedHeads)):
            raise ValueError(
                f"uniform=True: layer {name!r} is a {type(layer).__name__}, expected gates of heads and linear layers "
                "alone"
            )
        others = together.get(name, [])
        whole = layer.gate.num_gates
        known = bool(others) and all(other in masks for other in others)
        count = max(int(masks[other].sum()) for other in others) if known else whole
        step = round_to if isinstance(layer, GatedLinear) and not isinstance(layer, GatedHeads) else 1
        kept = _keep(layer, masks[name], min(whole, -(-count // step) * step))
        if kept:
            why = "all layers have as many as the widest" if known else _why_whole(layer, model.config)
            notes[name] = f"{kept} closed gates stay: {why}"
    return trial, notes


def _why_whole(layer: GatedLinear, config: Any) -> str:
    """Why closed gates of this layer stay: the config has no entry for the layer's width."""
    said = type(config).__name__
    if isinstance(layer, GatedHeads) and not FAMILIES[config.model_type].heads:
        return (
            f"{said} has no width of a head but hidden_size / num_attention_heads, so none for fewer heads; "
            "uniform=False cuts them"
        )
    return f"{said} has no entry for this width; uniform=False cuts them"


@torch.no_grad()
def _keep(layer: GatedLinear, is_open: torch.Tensor, count: int) -> int:
    """Open closed gates until ``count`` are open, with weights of 0; returns how many were opened."""
    gate = layer.gate
    closed = (~is_open).nonzero().flatten()
    likely = gate.open_probability()[closed].argsort(descending=True, stable=True)
    chosen = closed[likely[: max(0, count - int(is_open.sum()))]]
    values = gate.deterministic().clone()
    values[chosen] = 1
    layer.gate = Fixed(values)
    if isinstance(layer, GatedHeads):
        layer.weight.data.view(layer.out_features, gate.num_gates, -1)[:, chosen] = 0
    else:
        layer.weight.data[chosen] = 0
        if layer.bias is not None:
            layer.bias.data[chosen] = 0
    return len(chosen)


def write(model: PreTrainedModel) -> None:
    """Set the entries of the config to the widths of a model that :func:`level` has made uniform."""
    family, config = FAMILIES[model.config.model_type], model.config
    for attention in heads.find(model)[:1] if family.heads else []:
        module: Any = attention.module
        shared = module.num_key_value_groups if attention.kind.sharing else 1
        config.head_dim = module.head_dim
        for entry in family.heads:
            setattr(config, entry, attention.heads * (1 if entry == "num_key_value_heads" else shared))
    layers = [m for name, m in model.named_modules() if isinstance(m, nn.Linear) and fnmatchcase(name, family.layers)]
    if layers:
        setattr(config, family.neurons, layers[0].out_features)
