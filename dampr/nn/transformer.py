"""GatedTransformerEncoderLayer and GatedTransformerDecoderLayer: gates for heads, neurons and sublayers."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dampr import _checks, names
from dampr.gates import Gate as Family

from .activation import GatedActivation
from .attention import GatedMultiheadAttention
from .base import GatedWeight, fresh_values
from .computed import check_dense, computed, copied, settled, unwrap, wake
from .layer_norm import GatedLayerNorm
from .linear import GatedLinear
from .pruned.attention import PrunedMultiheadAttention
from .pruned.transformer import (
    PrunedTransformerDecoderLayer,
    PrunedTransformerEncoderLayer,
    RemovedPart,
    remove_sublayer,
)
from .residual import gated_sum
from .sublayers import BySublayers, DecoderBySublayers, EncoderBySublayers

PARTS = ("heads", "neurons", "sublayers")


class GatedTransformer(BySublayers):
    """The code that the gated encoder and decoder layers share.

    It is mixed in before :class:`EncoderBySublayers` or :class:`DecoderBySublayers`, which run the sublayers.
    """

    _dense: Any
    _pruned: Any

    def __init__(
        self,
        d_model: int,
        nhead: int,
        dim_feedforward: int = 2048,
        dropout: float = 0.1,
        activation: str | Callable[[Tensor], Tensor] = F.relu,
        layer_norm_eps: float = 1e-5,
        batch_first: bool = False,
        norm_first: bool = False,
        bias: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        gate: names.Family | type[Family] | Callable[..., Any] = "hard_concrete",
        parts: Sequence[str] = ("heads", "neurons"),
        per_sample: bool = False,
    ) -> None:
        arguments = (
            d_model,
            nhead,
            dim_feedforward,
            dropout,
            activation,
            layer_norm_eps,
            batch_first,
            norm_first,
            bias,
            device,
            dtype,
        )
        super().__init__(*arguments)
        self._put_gates(gate, parts, per_sample)

    def _put_gates(self, gate: Any, parts: Sequence[str], per_sample: bool) -> None:
        """Replace the parts of the dense layer that get gates by gated ones."""
        if isinstance(gate, Family):
            raise TypeError(
                f"gate={type(gate).__name__} instance: expected a family's name or a class, because each part gets "
                "its own"
            )
        parts = _checked_parts(parts)
        _checks.flag("per_sample", per_sample)
        counts = [_parameter_count(modules) for modules in self._by_sublayer()]
        if "heads" in parts:
            for name in self._attentions:
                setattr(self, name, GatedMultiheadAttention._around(getattr(self, name), gate, per_sample))
        if "neurons" in parts:
            self.linear1 = GatedLinear._around(self.linear1, gate, "output", per_sample)
        if "sublayers" in parts:
            device = self.linear2.weight.device
            gates = [GatedActivation(1, -1, gate=gate, per_sample=per_sample, device=device) for _ in self._sublayers]
            for own, count in zip(gates, counts, strict=True):
                own.weights_per_gate = float(count)
            self.sublayer_gates = nn.ModuleList(gates)
        self.train(self.training)

    def _by_sublayer(self) -> list[list[nn.Module]]:
        """For each sublayer the list of its modules with weights, without norms."""
        return [*([getattr(self, name)] for name in self._attentions), [self.linear1, self.linear2]]

    def _gate_of(self, index: int) -> GatedActivation | None:
        """The gate of the whole sublayer ``index``; None if sublayers have no gates."""
        gates: Any = self._modules.get("sublayer_gates")
        return None if gates is None else gates[index]

    def _sum(self, index: int, x: Tensor, branch: Callable[[], Tensor]) -> Tensor:
        """x + z * branch(), with z the gate of sublayer ``index``; x + branch() without a gate."""
        own = self._gate_of(index)
        if own is None:
            return x + branch()
        batch = 0 if getattr(self, self._attentions[0]).batch_first else 1
        return gated_sum(x, branch, own.gate, self.training, batch if own.per_sample and x.dim() == 3 else None, self)

    @classmethod
    def from_dense(
        cls,
        layer: Any,
        *,
        gate: names.Family | type[Family] | Callable[..., Any] = "hard_concrete",
        parts: Sequence[str] = ("heads", "neurons"),
        per_sample: bool = False,
    ) -> Any:
        """A gated layer that takes over the parameters of ``layer`` themselves, not copies.

        Where fresh gates are not 1, the weights that they multiply are divided by them, so that the layer computes the
        same.

        Raises: TypeError unless the type of ``layer`` is exactly the dense one; ValueError if a fresh gate is 0, and
        what the constructor raises.
        """
        if type(layer) is not cls._dense:
            raise TypeError(f"layer={type(layer).__name__}: expected exactly nn.{cls._dense.__name__}")
        _check_weights(layer, _checked_parts(parts))
        gated = _twin(layer)
        gated.__class__ = cls
        gated._put_gates(gate, parts, per_sample)
        gated._undo_fresh_gates()
        return gated

    @torch.no_grad()
    def _undo_fresh_gates(self) -> None:
        """Divide weights by fresh gates that are not 1, so that the layer computes what the dense layer computed.

        A gate is fresh when its parameters have their start values. Gates on heads and neurons divide the weights that
        they multiply; the gate of a sublayer divides the last linear layer of its sublayer.

        Raises: ValueError if a fresh gate is 0, or if the weight to divide is computed from other tensors
        (parametrized).
        """
        fresh = [
            part.gate
            for part in self.modules()
            if isinstance(part, (GatedMultiheadAttention, GatedWeight, GatedActivation))
        ]
        if not all(gate.starts_at_one() or bool((fresh_values(gate) != 0).all()) for gate in fresh):
            raise ValueError(
                f"gate={type(fresh[0]).__name__}: a fresh gate of it is 0, so what the layer computes could not be kept"
            )
        for part in self.modules():
            if isinstance(part, (GatedMultiheadAttention, GatedWeight)):
                part._undo_fresh_gates()
        for index, name in enumerate(self._sublayers):
            last = self.linear2 if name == "linear1" else getattr(self, name).out_proj
            own = self._gate_of(index)
            if own is not None and not own.gate.starts_at_one():
                if computed(last) is not None:
                    why = "and a weight that is computed from other tensors cannot make up for it"
                    raise ValueError(f"gate={type(own.gate).__name__}: fresh gates are not 1, {why}")
                _multiply(last, 1 / fresh_values(own.gate))

    def _value(self, index: int) -> Tensor | None:
        """The gate value of sublayer ``index`` in evaluation, (1,); None without a gate."""
        own = self._gate_of(index)
        return None if own is None else own.gate.deterministic()

    def to_dense(self) -> Any:
        """A ``torch.nn`` layer of the same size that computes what this layer computes in evaluation mode.

        Its parameters are copies.
        """
        return self._plain(cut=False)[0]

    def compacted(self) -> tuple[Any, dict[str, list[int]]]:
        """The smallest plain layer that computes what this layer computes in evaluation mode.

        Returns: ``(layer, kept)``. ``kept`` maps the name of each attention to the indices of the heads that are left,
        and "linear1" to the indices of the neurons that are left; an empty list says that the gate of the whole
        sublayer is closed. Every other sublayer keeps at least one head or neuron. ``layer`` is a ``torch.nn`` layer if
        all heads and sublayers are open, else a :class:`PrunedTransformerEncoderLayer` or
        :class:`PrunedTransformerDecoderLayer`.

        A closed neuron still outputs a constant, its activation at 0; the bias of ``linear2`` absorbs it. Neurons are
        not cut if the activation function is not elementwise. Gated norms keep their gates, because other layers share
        their width.
        """
        return self._plain(cut=True)

    @torch.no_grad()
    @settled
    def _plain(self, cut: bool) -> tuple[Any, dict[str, list[int]]]:
        """The layer without gates and ``kept``, as in :meth:`compacted`; ``cut``: leave out what is closed."""
        plain: Any = copied(self)
        plain._modules.pop("sublayer_gates", None)
        kept: dict[str, list[int]] = {}
        for index, name in enumerate(self._sublayers):
            z = self._value(index)
            if cut and z is not None and not bool(z):
                kept[name] = []
                remove_sublayer(plain, index, name)
                continue
            if name == "linear1":
                plain.linear1, plain.linear2, kept[name] = self._plain_feed_forward(cut)
                last = plain.linear2
            else:
                attention, kept[name] = _plain_attention(getattr(self, name), cut)
                setattr(plain, name, attention)
                last = attention.out_proj
            if z is not None:
                unwrap(last)
                _multiply(last, z)
        for name, norm in plain.named_children():
            if not cut and isinstance(norm, GatedLayerNorm):
                setattr(plain, name, norm.to_dense())
        pruned = any(isinstance(part, (RemovedPart, PrunedMultiheadAttention)) for part in plain.children())
        plain.__class__ = self._pruned if pruned else self._dense
        if pruned:
            plain.d_model, plain.nhead = self.linear1.in_features, getattr(self, self._attentions[0]).num_heads
        wake(plain)
        return plain, kept

    def _plain_feed_forward(self, cut: bool) -> tuple[nn.Linear, nn.Linear, list[int]]:
        """``linear1`` and ``linear2`` without gates, and the indices of the neurons that are left."""
        layers = self.linear1, self.linear2
        plain: list[Any] = [layer.to_dense() if isinstance(layer, GatedWeight) else copied(layer) for layer in layers]
        first, second = plain
        every = list(range(first.out_features))
        if not cut:
            return first, second, every
        closed = self.closed_neurons()
        kept = [i for i in every if i not in closed] or every[:1]
        if len(kept) == len(every) or not _is_elementwise(self.activation, first.weight, kept):
            return first, second, every
        unwrap(first)
        unwrap(second)
        cutting = sorted(set(every) - set(kept))
        bias = first.weight.new_zeros(len(every)) if first.bias is None else first.bias
        constant = second.weight[:, cutting] @ _evaluated(self.activation, bias[cutting])
        if bool(constant.any()):
            moved = constant if second.bias is None else second.bias + constant
            second.bias = nn.Parameter(moved, requires_grad=second.weight.requires_grad)
        return _rows(first, kept), _columns(second, kept), kept

    def closed_neurons(self) -> set[int]:
        """The indices of the feed-forward neurons whose gate is closed, in ``linear1`` or in ``linear2``."""
        written = self.linear1.closed_channels()[0] if isinstance(self.linear1, GatedWeight) else set()
        read = self.linear2.closed_channels()[1] if isinstance(self.linear2, GatedWeight) else set()
        return written | read


class GatedTransformerEncoderLayer(GatedTransformer, EncoderBySublayers):
    """``nn.TransformerEncoderLayer`` with learned gates for its heads, its feed-forward neurons and its sublayers.

    Args:
        d_model ... dtype: as in ``nn.TransformerEncoderLayer``.
        gate: a family's name, a :class:`dampr.gates.Gate` subclass, or a function of (number of gates, device) that
            makes one: each part gets gates of its own.
        parts: some of ``"heads"`` (``self_attn`` is a :class:`GatedMultiheadAttention`), ``"neurons"`` (``linear1`` is
            a :class:`GatedLinear` with gates on its outputs) and ``"sublayers"`` (x + z F(x), a gate for attention and
            one for feed-forward; as in :class:`GatedResidual`, a closed one is not run).
        per_sample: in training, draws for each sample of the batch (heads, sublayers) or each token (neurons) instead
            of one per call.

    It is called like ``nn.TransformerEncoderLayer``, also by ``nn.TransformerEncoder``, and returns the same. It never
    takes torch's fused path for inference, because that path reads weights without calling their layers. A nested
    tensor, which ``nn.TransformerEncoder`` makes of a padded batch for that path, is run as a padded one. Parameters
    have the names of the dense layer, and a dense ``state_dict`` loads. In evaluation mode, a fresh layer equals
    torch's Python path to the bit, and torch's fused path to rounding.

    The width of the residual stream belongs to the model around the layer. It can be cut if the norms are
    :class:`GatedLayerNorm` with statistics over the open channels, which :func:`dampr.convert` inserts with
    ``residual=True``.

    Raises: ValueError or TypeError that names the argument, and what ``nn.TransformerEncoderLayer`` raises.
    """

    _dense = nn.TransformerEncoderLayer
    _pruned = PrunedTransformerEncoderLayer


class GatedTransformerDecoderLayer(GatedTransformer, DecoderBySublayers):
    """``nn.TransformerDecoderLayer`` with learned gates for the heads of both attentions, its feed-forward neurons and
    its three sublayers.

    Everything as in :class:`GatedTransformerEncoderLayer`.
    """

    _dense = nn.TransformerDecoderLayer
    _pruned = PrunedTransformerDecoderLayer


def _checked_parts(parts: Any) -> tuple[str, ...]:
    """``parts`` as a tuple. Raises ValueError or TypeError for anything but some of :data:`PARTS`."""
    found = () if isinstance(parts, str) else tuple(_checks.items("parts", parts))
    for part in found:
        _checks.one_of("parts", part, PARTS)
    if not found:
        raise ValueError(f"parts={parts!r:.80}: expected some of {list(PARTS)}")
    return found


def _check_weights(layer: nn.Module, parts: Sequence[str]) -> None:
    """Raise TypeError if a weight that would get gates is computed from other tensors (parametrized)."""
    for name, part in layer.named_children():
        if isinstance(part, nn.MultiheadAttention) and "heads" in parts:
            check_dense(part, nn.MultiheadAttention)
        elif name == "linear1" and "neurons" in parts:
            check_dense(part, nn.Linear)


def _plain_attention(attention: Any, cut: bool) -> tuple[Any, list[int]]:
    """The attention without gates, and the indices of the heads that are left; ``cut``: leave out closed heads."""
    if not isinstance(attention, GatedMultiheadAttention):
        return copied(attention), list(range(attention.num_heads))
    return attention.compacted() if cut else (attention.to_dense(), list(range(attention.num_heads)))


def _twin(layer: nn.Module) -> Any:
    """A new module object that shares the parameters, buffers and hooks of ``layer``."""
    twin = layer.__class__.__new__(layer.__class__)
    twin.__dict__.update(
        {name: value.copy() if isinstance(value, dict) else value for name, value in vars(layer).items()}
    )
    twin._modules = {name: None if child is None else _twin(child) for name, child in layer._modules.items()}
    return twin


def _parameter_count(modules: Sequence[nn.Module]) -> int:
    """The number of elements in all parameters of ``modules``."""
    return sum(p.numel() for module in modules for p in module.parameters())


def _multiply(layer: nn.Linear, z: Tensor) -> None:
    """Multiply weight and bias of ``layer`` by z, (1,), in place."""
    for p in (layer.weight, layer.bias):
        if p is not None:
            p.data = (p * z).to(p.dtype)


def _evaluated(activation: Any, x: Tensor) -> Tensor:
    """``activation(x)`` in evaluation mode."""
    if not isinstance(activation, nn.Module):
        y: Tensor = activation(x)
        return y
    y = copy.deepcopy(activation).eval()(x)
    return y


def _is_elementwise(activation: Any, weight: Tensor, kept: list[int]) -> bool:
    """Whether the activation function gives the neurons ``kept`` the same values when the other neurons are cut.

    ``weight``: (neurons, in_features); it gives the number of neurons, the dtype and the device. The check runs the
    function on random numbers.
    """
    x = torch.randn(3, len(weight), generator=torch.Generator().manual_seed(0)).to(weight)
    try:
        return torch.allclose(_evaluated(activation, x)[:, kept], _evaluated(activation, x[:, kept]))
    except (RuntimeError, IndexError, ValueError):
        return False


def _rows(layer: nn.Linear, kept: list[int]) -> nn.Linear:
    """Keep the rows ``kept`` of weight and bias, in place; returns ``layer``."""
    layer.weight = nn.Parameter(layer.weight[kept], requires_grad=layer.weight.requires_grad)
    if layer.bias is not None:
        layer.bias = nn.Parameter(layer.bias[kept], requires_grad=layer.bias.requires_grad)
    layer.out_features = len(kept)
    return layer


def _columns(layer: nn.Linear, kept: list[int]) -> nn.Linear:
    """Keep the columns ``kept`` of the weight, in place; returns ``layer``."""
    layer.weight = nn.Parameter(layer.weight[:, kept].clone(), requires_grad=layer.weight.requires_grad)
    layer.in_features = len(kept)
    return layer
