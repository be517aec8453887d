"""What every gated layer offers to penalties, summaries and compaction."""

from __future__ import annotations

from torch import Tensor, nn

from dampr.gates import Gate


class GatedLayer:
    """Mixin of the gated layers: one :class:`dampr.gates.Gate` in ``gate``, placed by ``granularity``."""

    gate: Gate
    granularity: str
    per_sample: bool

    def group_size(self) -> int:
        """|g|: how many parameters one gate switches off, biases included where the gate reaches them."""
        raise NotImplementedError

    def group_sq_norm(self) -> Tensor:
        """||w_g||^2 of the weights of each gate, (num_gates,)."""
        raise NotImplementedError

    def penalty(self, lam: float = 1.0, prior_precision: float = 0.0) -> Tensor:
        """The layer's expected L0 penalty, a scalar; Louizos et al. 2018, eq. 9 and appendix A. See :func:`dampr.penalty`."""
        raise NotImplementedError

    def to_dense(self) -> nn.Module:
        """A plain ``torch.nn`` layer that computes what this one computes in evaluation mode."""
        raise NotImplementedError
