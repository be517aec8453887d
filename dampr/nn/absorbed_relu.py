"""AbsorbedReLU: what stands in the place of a ReLU that a batch norm with gates computes."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class AbsorbedReLU(nn.ReLU):
    """``nn.ReLU`` behind a batch norm that computes it: it hands on what the norm has rectified, and rectifies
    everything else.

    :func:`dampr.convert` puts it in the place of an ``nn.ReLU``, :func:`dampr.compact` takes it out again.
    """

    def forward(self, input: Tensor) -> Tensor:
        version = None if torch.compiler.is_compiling() else getattr(input, "_dampr_rectified", None)
        return input if type(version) is int and version == input._version else super().forward(input)
