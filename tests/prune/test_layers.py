"""What kinds of layers say of themselves agrees with the layers, and with each other."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

import dampr.nn
from dampr.prune.layers.registry import KINDS, OTHER, channel_count, kind_of

LAYERS: dict[str, Any] = {
    "linear": nn.Linear(4, 6),
    "conv": nn.Conv2d(4, 6, 3),
    "groups": nn.Conv1d(4, 6, 3, groups=2),
    "depthwise": nn.Conv2d(4, 4, 3, groups=4),
    "transposed": nn.ConvTranspose2d(4, 6, 3),
    "batch norm": nn.BatchNorm2d(4),
    "instance norm": nn.InstanceNorm2d(4, affine=True),
    "layer norm": nn.LayerNorm(4),
    "rms norm": nn.RMSNorm(4),
    "group norm": nn.GroupNorm(2, 4),
    "embedding": nn.Embedding(5, 4),
    "bag": nn.EmbeddingBag(5, 4),
    "lstm": nn.LSTM(3, 4, num_layers=2, bidirectional=True),
    "projected": nn.LSTM(3, 4, proj_size=2),
    "gru": nn.GRU(3, 4),
    "cell": nn.GRUCell(3, 4),
    "attention": nn.MultiheadAttention(8, 2),
    "prelu": nn.PReLU(4),
    "scale": dampr.nn.Scale(torch.ones(4)),
}
CUT = [  # a layer, and a side whose channels it can lose
    (name, side)
    for name, layer in LAYERS.items()
    for side, size in (("out", kind_of(layer).size_written), ("in", kind_of(layer).size_read))
    if size and kind_of(layer).resizes and name != "groups"
]
TWINS = [(kind, *pair) for kind in KINDS for pair in kind.twins]


def test_every_kind_that_is_not_of_one_library_has_a_layer_here() -> None:
    missing = {type(kind).__name__ for kind in KINDS} - {type(kind_of(layer)).__name__ for layer in LAYERS.values()}
    assert missing == {"Stacked", "PrunedAttention", "Activation", "TransposedLinear"}
    assert OTHER not in {kind_of(layer) for layer in LAYERS.values()}


def test_a_depthwise_convolution_is_no_other_convolution() -> None:
    kinds = {type(kind_of(LAYERS[name])).__name__ for name in ("conv", "groups")}
    assert kinds == {"Convolution"}
    assert type(kind_of(LAYERS["depthwise"])).__name__ == "Depthwise"


@pytest.mark.parametrize("thing", [nn.ReLU(), nn.Sequential(nn.Linear(2, 2)), nn.Parameter(torch.ones(2)), None])
def test_what_no_kind_fits_is_of_the_kind_of_all_others(thing: Any) -> None:
    kind = kind_of(thing)
    assert kind is OTHER
    assert not any((kind.reads, kind.passes, kind.resizes, kind.from_file, kind.one_node))


@pytest.mark.parametrize(("kind", "dense", "gated"), TWINS, ids=lambda value: getattr(value, "__name__", ""))
def test_a_layer_and_its_gated_twin_are_of_one_kind(kind: Any, dense: type, gated: type) -> None:
    assert kind.fits(dense)
    assert kind.fits(gated)
    assert issubclass(gated, dense) or dense is nn.SyncBatchNorm


@pytest.mark.parametrize("name", [name for name, layer in LAYERS.items() if hasattr(layer, "weight")])
def test_a_width_is_the_size_of_the_dimension_of_the_weight_that_has_it(name: str) -> None:
    layer, kind = LAYERS[name], kind_of(LAYERS[name])
    for writes in (True, False) if layer.weight.dim() > 1 else (True,):
        assert channel_count(layer, writes) == layer.weight.shape[kind.weight_dim(writes)]


@pytest.mark.parametrize(("name", "side"), CUT)
def test_sizes_follow_tensors_back_from_what_a_manifest_says(name: str, side: str) -> None:
    """Cut by ``tensors``, a layer has by ``follow`` the sizes that ``restored`` sets back."""
    layer, kind, writes = copy.deepcopy(LAYERS[name]), kind_of(LAYERS[name]), side == "out"
    size = kind.width(layer, writes)
    before = {key: value for key, value in vars(layer).items() if isinstance(value, (int, tuple))}
    entry = {side: {"before": size, "kept": list(range(0, size, 2))}}
    whole: dict[str, Any] = {}
    for own, places in kind.tensors(layer, entry).items():
        if getattr(layer, own) is None:
            continue
        whole[own] = getattr(layer, own)
        left = whole[own].detach()
        for dim, place in enumerate(places):
            left = left if place is None else left.index_select(dim, place[1])
        setattr(layer, own, nn.Parameter(left) if isinstance(whole[own], nn.Parameter) else left)
    kind.follow(layer)
    assert kind.width(layer, writes) == len(entry[side]["kept"])
    for own, tensor in whole.items():
        setattr(layer, own, tensor)
    restored = kind.restored(layer, entry)
    assert {key: value for key, value in vars(restored).items() if isinstance(value, (int, tuple))} == before


@pytest.mark.parametrize(("name", "side"), CUT)
def test_a_kind_says_of_every_tensor_of_a_side_which_dimension_goes(name: str, side: str) -> None:
    layer, kind, writes = LAYERS[name], kind_of(LAYERS[name]), side == "out"
    for own, dim in () if kind.recurrent else kind.axes(writes).items():
        tensor = getattr(layer, own, None)
        assert tensor is None or tensor.shape[dim] == kind.width(layer, writes)
