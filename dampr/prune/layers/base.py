"""The base classes of kinds. A kind is a class that knows everything the package asks about one type of layer.

:func:`.registry.kind_of` gives the kind of a layer. A kind has no state: every method is given the layer.

A layer has two sides. ``writes`` says which one is meant: the channels that the layer writes (True), or those that it
reads (False).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

from torch import Tensor, nn

from dampr.gates import GateLike
from dampr.nn.base import Granularity

from ..places import Places, places_in
from ..terms import LayerWidths, Term, Width

Entry = dict[str, Any]  # what a manifest says of one layer: "out", "in", "units" or "heads" -> {"before", "kept"}
Call = tuple[tuple[Any, ...], dict[str, Any]]  # the positional and keyword arguments of a call


class CannotCutError(Exception):
    """Raised if closed channels cannot be cut; the message is the reason, which becomes part of a note in the
    manifest.
    """


class Kind:
    """A kind of layer. The attributes and methods of this class hold for a layer that no other kind fits.

    Attributes:
        types: the types of its layers; subclasses of these are of this kind too.
        twins: pairs of exactly a type of torch and the type of dampr.nn that is the same layer with gates.
        gated_parts: what gets gates, in words, if only gates on outputs are possible; "" if every granularity is.
        reads: it multiplies what it reads with weights, so no channel gets through it by itself.
        gemm: what it writes is one product with ``weight``, and a bias; this includes depthwise convolutions.
        recurrent: it is a recurrent layer of torch.
        attends: it is an attention; what it reads and what it writes have the same width.
        gates_units: its gates close units of a recurrent state, or heads, which are not channels of one weight.
        one_node: it is one node when a model is traced, whatever operations it consists of.
        passes: it hands every channel on, times a factor of its own, and neither writes nor reads a width.
        gates_values: its gates multiply the channels of other layers.
        normalises: it is a norm, and so counts as a layer even if it has no parameters.
        batch_statistics: it normalises by statistics of a batch, so it turns a channel of zeros into a constant.
        shares_gates: layers of such kinds can share their gates if their outputs are added.
        reads_indices: it reads indices that the caller chooses, and no channels.
        resizes: a layer with gates can lose channels and keep its gates.
        follows: :meth:`follow` sets its sizes.
        from_file: its sizes are in a file, and it is built from these to see whether its tensors have them.
        writes_last: the channels that it writes are the last dimension; else they are dimension 1.
        affine: the argument of its constructor that gives it a gain; None if there is none.
        size_written, size_read: the attributes with the number of channels on each side; "" if there is none.
    """

    types: ClassVar[tuple[type, ...]] = ()
    twins: ClassVar[tuple[tuple[type, Any], ...]] = ()
    gated_parts = ""
    reads = gemm = recurrent = attends = gates_units = one_node = False
    passes = gates_values = normalises = batch_statistics = shares_gates = reads_indices = False
    resizes = follows = from_file = writes_last = False
    affine: ClassVar[str | None] = None
    size_written, size_read = "num_features", ""

    def fits(self, cls: type) -> bool:
        """Whether layers of the type ``cls`` are of this kind."""
        return issubclass(cls, self.types)

    def of(self, layer: Any) -> Kind:
        """This kind, or a more special one that depends on the attributes of the layer and not on its type alone."""
        return self

    def twin(self, layer: Any) -> Any:
        """The type of dampr.nn that is the same layer with gates. Raises: KeyError if there is none."""
        return dict(self.twins)[type(layer)]

    def gated(self, layer: Any, gate: GateLike, granularity: Granularity, per_sample: bool) -> Any:
        """The layer with gates, made of the same parameter objects."""
        return self.twin(layer).from_dense(layer, gate=gate, granularity=granularity, per_sample=per_sample)

    # ---- channels

    def width(self, layer: Any, writes: bool) -> int:
        """How many channels the layer has on this side."""
        weight = layer.weight
        assert isinstance(weight, Tensor)
        return int(weight.shape[self.weight_dim(writes)])

    def weight_dim(self, writes: bool) -> int:
        """The dimension of ``weight`` with an index for each channel of this side."""
        return int(not writes)

    def places(self, layer: Any, writes: bool) -> list[tuple[str, int]]:
        """The tensors of the layer that could have an index for each channel of this side, and the dimension of each.

        Units are read from the first of them that the traced model has.
        """
        return [("weight", self.weight_dim(writes))]

    def side(self, layer: Any, own: str, dim: int) -> bool | None:
        """To which side of the layer the dimension ``dim`` of its parameter ``own`` belongs.

        Args:
            layer: the layer.
            own: the name of the parameter within the layer, such as "weight".
            dim: a dimension of that parameter.

        Returns: True for the channels that the layer writes, False for those that it reads, None if another parameter
        of the layer decides.

        Raises: CannotCutError for a layer that cannot be cut there. The message contains "{layer}", for which the
        caller puts the layer's name.
        """
        if own not in ("weight", "bias") and not (self.reads or self.one_node or self.reads_indices):
            raise CannotCutError("a bare nn.Parameter takes part in its width")
        how = " with groups" if getattr(layer, "groups", 1) > 1 else ""
        raise CannotCutError(f"{{layer}}{how} shares its width, and cannot be cut yet")

    def input_axis(self, layer: Any) -> int:
        """The dimension of the input that has the channels, negative: counted from the last."""
        return 1 - int(layer.weight.dim())

    def input_columns(self, layer: Any) -> list[tuple[nn.Module, str]]:
        """The weights whose columns multiply the input: pairs of a module and the name of its weight."""
        return [(layer, "weight")]

    def rows(self, layer: Any) -> int:
        """How many gate vectors of equal length the layer has: one, or for a recurrent layer one for each layer and
        direction.
        """
        return 1

    def pads(self, layer: Any) -> bool:
        """Whether the layer reads zeros beyond the border of its input.

        If so, what it makes of a constant input differs at the border, and a bias cannot stand for it.
        """
        return False

    def staying(self, layer: Any) -> dict[tuple[str, int], str]:
        """(tensor of the layer, dimension) -> why nothing of it may be cut, for those that its class needs whole."""
        return {}

    def timed_places(self, layer: Any, writes: bool) -> list[tuple[str, int]]:
        """The tensors whose width, on average, is the size on this side, and the dimension of each."""
        return [("weight", self.weight_dim(writes))]

    # ---- tensors and sizes

    def axes(self, writes: bool) -> dict[str, int]:
        """The tensors that have an index for each channel of this side -> the dimension of the channels."""
        return {"weight": self.weight_dim(writes), **({"bias": 0} if writes else {})}

    def tensors(self, layer: Any, entry: Entry) -> dict[str, list[Places]]:
        """Name of a tensor -> for each dimension, what is left of it according to a manifest entry; None for all of it.

        Raises: ValueError if the entry does not fit the layer.
        """
        sides = {writes: places_in(entry.get("out" if writes else "in")) for writes in (True, False)}
        if "heads" in entry:
            return {}
        found: dict[str, list[Places]] = {}
        for writes, place in sides.items():
            for name, dim in self.axes(writes).items():
                places = found.setdefault(name, [])
                places += [None] * (dim + 1 - len(places))
                places[dim] = place
        return found

    def sizes(self, layer: Any, entry: Entry) -> dict[str, int]:
        """Size attribute -> its value before the cut, for those that the cut of this manifest entry has changed."""
        sides = [("out", self.size_written), ("in", self.size_read)]
        return {name: entry[side]["before"] for side, name in sides if name and side in entry and "heads" not in entry}

    def restored(self, layer: Any, entry: Entry) -> nn.Module:
        """The layer with the size attributes from before the cut; its tensors already have these sizes."""
        for attribute, size in self.sizes(layer, entry).items():
            setattr(layer, attribute, size)
        restored: nn.Module = layer
        return restored

    def follow(self, layer: Any, keeps_groups: bool = False) -> None:
        """Set the size attributes to the shapes of the parameters.

        ``keeps_groups``: a convolution keeps ``groups``, because its groups became smaller and not fewer.
        """
        weight = getattr(layer, "weight", None)
        if weight is None:
            weight = getattr(layer, "running_mean", None)
        if isinstance(weight, Tensor):
            self.resize(layer, weight.shape, keeps_groups)

    def resize(self, layer: Any, shape: tuple[int, ...], keeps_groups: bool) -> None:
        """Set the size attributes from ``shape``, that of the weight, or of the running mean if there is no weight."""

    # ---- cost

    def params(self, name: str, layer: Any, widths: LayerWidths, own: int, counted: set[Any]) -> Iterator[Term]:
        """The terms for the parameters of the layer.

        Args:
            name: its name.
            layer: the layer, in the model without gates.
            widths: how much is left of each layer.
            own: the number of parameters of the layer itself.
            counted: the weights that have a term already. A weight that layers share has one term; this method adds it
                here.
        """
        if own:
            yield Term(name, Width(1), Width(1), own)


class PerChannel(Kind):
    """A layer whose tensors all have one element for each channel."""

    def axes(self, writes: bool) -> dict[str, int]:
        """All tensors have the channels in dimension 0, and the channels count as written."""
        return dict.fromkeys(("weight", "bias", "running_mean", "running_var"), 0) if writes else {}

    def tensors(self, layer: Any, entry: Entry) -> dict[str, list[Places]]:
        """As for other layers, for those tensors that the layer has (a norm may have no parameters)."""
        return {name: places for name, places in super().tensors(layer, entry).items() if hasattr(layer, name)}

    def params(self, name: str, layer: Any, widths: LayerWidths, own: int, counted: set[Any]) -> Iterator[Term]:
        """One term: the number of parameters is proportional to the number of channels."""
        yield Term(name, Width(1), widths.width(layer, True), own / self.width(layer, True))


class Passing(PerChannel):
    """A layer that hands every channel on, times a factor of its own."""

    passes = True

    def places(self, layer: Any, writes: bool) -> list[tuple[str, int]]:
        """The weight, or the running mean of a norm without one."""
        return [("weight", 0), ("running_mean", 0)]

    def side(self, layer: Any, own: str, dim: int) -> bool | None:
        """True for dimension 0: it has the channels, which count as written. They are the same units as the channels
        that the layer reads.
        """
        return True if dim == 0 else None


class Counted(Kind):
    """A layer whose products are counted and timed by layer; other products are found in the trace of a model."""

    def uses(self, layer: Any, call: Call, output: Any) -> tuple[int, int]:
        """Two counts of one call, from which :meth:`macs` makes the cost of the layer.

        Args:
            layer: the layer.
            call: the arguments of the call.
            output: what the call returned.

        Returns: (uses, projections), two integers.

        - For a layer with one weight: uses is how often the call multiplies each element of the weight, which is the
          number of positions of the output, or of steps of a sequence. projections is 0.
        - For an attention: uses is the number of multiply-accumulates of all heads together with the projections.
          projections is the number of multiply-accumulates of the projections alone.
        """
        return output.numel() // self.width(layer, True), 0

    def macs(self, name: str, layer: Any, widths: LayerWidths, uses: int, projections: int) -> Iterator[Term]:
        """The terms for the multiply-accumulates of the layer; ``uses`` and ``projections`` as :meth:`uses` returns
        them, for all calls.
        """
        if uses:
            yield weight_term(name, layer, widths, uses)

    def timed_widths(self, layer: Any, widths: LayerWidths) -> tuple[Width, Width]:
        """The widths that the time of the layer depends on: what is left of its input, and of its output."""
        return widths.width(layer, False), widths.width(layer, True)

    def timed_size(self, layer: Any, writes: bool) -> int:
        """The full size of what :meth:`timed_widths` returns for this side: channels, heads, or units of one
        direction.
        """
        return self.width(layer, writes)

    def narrow(self, layer: Any, read: int, written: int, within: bool) -> nn.Module:
        """A layer like this one with other sizes and random weights, which is timed in its place.

        Args:
            read: the number of channels that it reads; for a convolution in groups, those of one group.
            written: the number of channels, heads or units that it writes.
            within: for a convolution in groups, whether every group loses channels; else whole groups go.
        """
        raise NotImplementedError

    def narrow_call(self, layer: Any, call: Call, read: int) -> Call:
        """The same call with an input of ``read`` channels, to time a layer of that size; a recurrent layer gets no
        state.
        """
        raise NotImplementedError


def torch_type(layer: nn.Module) -> Any:
    """The class of torch that the class of a layer is or is derived from, whose constructor takes known arguments."""
    return next(cls for cls in type(layer).__mro__ if cls.__module__.startswith("torch.nn."))


def weight_term(name: str, layer: Any, widths: LayerWidths, times: float, bias: bool = False) -> Term:
    """The term of a layer with one weight.

    Args:
        times: how often each element of the weight counts (1 for parameters).
        bias: whether to count a bias too.
    """
    written, read = layer.weight.shape[:2]
    scale = times * layer.weight.numel() / (written * read)
    return Term(name, widths.width(layer, False), widths.width(layer, True), scale, float(bias))
