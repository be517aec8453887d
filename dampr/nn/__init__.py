"""Drop-in gated layers.

Each takes the arguments of the ``torch.nn`` layer it replaces, in its order, then gate keywords.
"""

from .attention import GatedMultiheadAttention
from .bank import GateBank
from .base import GatedLayer
from .conv import GatedConv1d, GatedConv2d, GatedConv3d
from .conv_transpose import GatedConvTranspose1d, GatedConvTranspose2d, GatedConvTranspose3d
from .gate import Gate, GatedEmbedding, GatedResidual, Residual, Scale
from .heads import GatedHeads
from .linear import GatedLinear
from .norm import GatedBatchNorm1d, GatedBatchNorm2d, GatedBatchNorm3d, GatedLayerNorm, TakenReLU
from .open_statistics import OpenStatistics
from .parameter import GatedParameter
from .pruned_attention import PrunedMultiheadAttention
from .pruned_transformer import PrunedTransformerDecoderLayer, PrunedTransformerEncoderLayer
from .rnn import GatedGRU, GatedLSTM, GatedRNN, ScaledRNN
from .stacked_rnn import StackedRNN
from .sync_norm import GatedSyncBatchNorm
from .transformer import GatedTransformerDecoderLayer, GatedTransformerEncoderLayer

__all__ = [
    "Gate",
    "GateBank",
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
    "PrunedMultiheadAttention",
    "PrunedTransformerDecoderLayer",
    "PrunedTransformerEncoderLayer",
    "Residual",
    "Scale",
    "ScaledRNN",
    "StackedRNN",
    "TakenReLU",
]
