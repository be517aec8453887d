"""What every gated layer offers to penalties, summaries and compaction."""

from __future__ import annotations

from torch import Tensor, nn

from dampr.gates import Gate


class GatedLayer:
    """Mixin of the gated layers: one :class:`dampr.gates.Gate` in ``gate``, placed by ``granularity``."""

    gate: Gate
    granularity: str | tuple[int, int]
    per_sample: bool

    def penalty(self, lam: float = 1.0, prior_precision: float = 0.0) -> Tensor:
        """The layer's expected L0 penalty, a scalar; Louizos et al. 2018, eq. 9 and appendix A. See :func:`dampr.penalty`."""
        raise NotImplementedError

    def closed_channels(self) -> tuple[set[int], set[int]]:
        """Output and input channels that the closed gates switch off altogether."""
        raise NotImplementedError

    def to_dense(self) -> nn.Module:
        """A plain ``torch.nn`` layer that computes what this one computes in evaluation mode."""
        raise NotImplementedError
