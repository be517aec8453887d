"""A drop-in layer is called as the layer that it replaces: what torch's forward is given by name,
the gated one takes.
"""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from torch import nn

from dampr import nn as gated

PAIRS: dict[type[nn.Module], type[nn.Module]] = {
    gated.GatedLinear: nn.Linear,
    gated.GatedConv1d: nn.Conv1d,
    gated.GatedConv2d: nn.Conv2d,
    gated.GatedConv3d: nn.Conv3d,
    gated.GatedConvTranspose1d: nn.ConvTranspose1d,
    gated.GatedConvTranspose2d: nn.ConvTranspose2d,
    gated.GatedConvTranspose3d: nn.ConvTranspose3d,
    gated.GatedBatchNorm1d: nn.BatchNorm1d,
    gated.GatedBatchNorm2d: nn.BatchNorm2d,
    gated.GatedBatchNorm3d: nn.BatchNorm3d,
    gated.GatedLayerNorm: nn.LayerNorm,
    gated.GatedEmbedding: nn.Embedding,
    gated.GatedLSTM: nn.LSTM,
    gated.GatedGRU: nn.GRU,
    gated.GatedRNN: nn.RNN,
    gated.GatedMultiheadAttention: nn.MultiheadAttention,
    gated.GatedTransformerEncoderLayer: nn.TransformerEncoderLayer,
    gated.GatedTransformerDecoderLayer: nn.TransformerDecoderLayer,
    gated.AbsorbedReLU: nn.ReLU,
}


@pytest.mark.parametrize("layer", PAIRS, ids=lambda layer: layer.__name__)
def test_forward_has_the_names_of_torchs(layer: Any) -> None:
    assert list(inspect.signature(layer.forward).parameters) == list(inspect.signature(PAIRS[layer].forward).parameters)


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (gated.GatedLinear(4, 3), (2, 4)),
        (gated.GatedConv1d(4, 3, 2), (2, 4, 5)),
        (gated.GatedConv2d(4, 3, 2), (2, 4, 5, 5)),
        (gated.GatedConv3d(4, 3, 2), (2, 4, 5, 5, 3)),
        (gated.GatedConvTranspose1d(4, 3, 2), (2, 4, 5)),
        (gated.GatedConvTranspose2d(4, 3, 2), (2, 4, 5, 5)),
        (gated.GatedConvTranspose3d(4, 3, 2), (2, 4, 5, 5, 3)),
        (gated.GatedBatchNorm1d(4), (2, 4)),
        (gated.GatedBatchNorm2d(4), (2, 4, 3, 3)),
        (gated.GatedBatchNorm3d(4), (2, 4, 3, 3, 2)),
        (gated.GatedLayerNorm(4), (2, 4)),
    ],
    ids=lambda value: type(value).__name__,
)
def test_an_input_may_be_given_by_name(layer: nn.Module, shape: tuple[int, ...]) -> None:
    x = torch.randn(shape)
    assert torch.equal(layer.eval()(input=x), layer(x))
