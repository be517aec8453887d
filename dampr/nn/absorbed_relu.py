"""AbsorbedReLU: replaces an ``nn.ReLU`` that the gated batch norm before it computes."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class AbsorbedReLU(nn.ReLU):
    """``nn.ReLU`` after a gated batch norm that already computes the ReLU.

    It returns what the norm has rectified as it is, and rectifies every other input. :func:`dampr.convert` puts it in
    the place of an ``nn.ReLU``; :func:`dampr.compact` restores that.
    """

    def forward(self, input: Tensor) -> Tensor:
        """``input`` itself if a norm has marked it as rectified and nothing has changed it in place since then, else
        its ReLU.
        """
        version = None if torch.compiler.is_compiling() else getattr(input, "_dampr_rectified", None)
        return input if type(version) is int and version == input._version else super().forward(input)
