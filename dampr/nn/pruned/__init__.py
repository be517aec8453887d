"""Plain layers that :func:`dampr.compact` leaves where ``torch.nn`` has none of that form. They have no gates."""

from .attention import PrunedMultiheadAttention
from .residual import Residual
from .scale import Scale
from .scaled_rnn import ScaledRNN
from .stacked_rnn import StackedRNN
from .transformer import PrunedTransformerDecoderLayer, PrunedTransformerEncoderLayer

__all__ = [
    "PrunedMultiheadAttention",
    "PrunedTransformerDecoderLayer",
    "PrunedTransformerEncoderLayer",
    "Residual",
    "Scale",
    "ScaledRNN",
    "StackedRNN",
]
