"""Drop-in gated layers.

Each takes the arguments of the ``torch.nn`` layer it replaces, in its order, then gate keywords.
"""

import sys

from . import pruned
from .absorbed_relu import AbsorbedReLU
from .activation import GatedActivation
from .attention import GatedMultiheadAttention
from .bank import GateBank
from .base import GatedLayer
from .batch_norm import GatedBatchNorm1d, GatedBatchNorm2d, GatedBatchNorm3d
from .conv import GatedConv1d, GatedConv2d, GatedConv3d
from .conv_transpose import GatedConvTranspose1d, GatedConvTranspose2d, GatedConvTranspose3d
from .embedding import GatedEmbedding
from .heads import GatedHeads
from .layer_norm import GatedLayerNorm
from .linear import GatedLinear
from .open_statistics import OpenStatistics, OpenWeight
from .parameter import GatedParameter
from .pruned import (
    PrunedMultiheadAttention,
    PrunedTransformerDecoderLayer,
    PrunedTransformerEncoderLayer,
    Residual,
    Scale,
    ScaledRNN,
    StackedRNN,
)
from .residual import GatedResidual
from .rnn import GatedGRU, GatedLSTM, GatedRNN
from .sync_norm import GatedSyncBatchNorm
from .transformer import GatedTransformerDecoderLayer, GatedTransformerEncoderLayer

Gate = GatedActivation  # the former names of these two
TakenReLU = AbsorbedReLU

__all__ = [
    "AbsorbedReLU",
    "Gate",
    "GateBank",
    "GatedActivation",
    "GatedBatchNorm1d",
    "GatedBatchNorm2d",
    "GatedBatchNorm3d",
    "GatedConv1d",
    "GatedConv2d",
    "GatedConv3d",
    "GatedConvTranspose1d",
    "GatedConvTranspose2d",
    "GatedConvTranspose3d",
    "GatedEmbedding",
    "GatedGRU",
    "GatedHeads",
    "GatedLSTM",
    "GatedLayer",
    "GatedLayerNorm",
    "GatedLinear",
    "GatedMultiheadAttention",
    "GatedParameter",
    "GatedRNN",
    "GatedResidual",
    "GatedSyncBatchNorm",
    "GatedTransformerDecoderLayer",
    "GatedTransformerEncoderLayer",
    "OpenStatistics",
    "OpenWeight",
    "PrunedMultiheadAttention",
    "PrunedTransformerDecoderLayer",
    "PrunedTransformerEncoderLayer",
    "Residual",
    "Scale",
    "ScaledRNN",
    "StackedRNN",
    "TakenReLU",
]

# Pickles of whole models name the module of each class; these are the modules in which classes once were.
_FORMER_MODULES = {
    "gate": sys.modules[__name__],
    "norm": sys.modules[__name__],
    "pruned_attention": pruned.attention,
    "pruned_transformer": pruned.transformer,
    "stacked_rnn": pruned.stacked_rnn,
}
sys.modules.update({f"{__name__}.{name}": module for name, module in _FORMER_MODULES.items()})
