"""Rules of products: matrix products, convolutions, embeddings.

In ``y = x @ w.T`` with x (B, I) and w (O, I), dimension I is contracted: column i of w reads unit i of x, so both are
one unit. The result has the other dimensions: the units of its channels are those of the rows of w. A weight therefore
"reads" the units of its contracted dimension and "writes" those of the others.

A rule takes a call of an operator and returns the axes of its result. An axis is an int64 tensor that holds the unit of
each index along some dimensions of a tensor, and has size 1 along all others.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from torch import Tensor

from . import rules
from .axes import Axes, along, first_along, moving, varying
from .ledger import CONSTANTS, Marks, line

if TYPE_CHECKING:
    from .call import Call


def product(call: Call, a: Tensor, b: Tensor, letters: tuple[str, str], result: str) -> Axes:
    """Record a product of two tensors, and return the axes of its result,
    ``einsum(f"{letters[0]},{letters[1]}->{result}", a, b)``.

    Letter "k" is the contracted dimension. Along "g", data decides which element takes part in a product: its units are
    fixed.

    Units of both factors along "k" become one and are recorded as read by a weight, as a norm of weights (both factors
    are weights), or as summed (no factor is a weight). Units that meet constants along "k" are fixed, unless the
    constants are the same everywhere. In a trace with closed units, values that these have along "k" are noted.

    Args:
        call: the call.
        a, b: the factors.
        letters: the dimensions of each factor, a letter for each; a vector of length k is "k".
        result: the dimensions of the result.
    """
    _note_contracted(call, a, b, letters)
    # both factors are brought to the same dimensions: those of the result, then the contracted ones
    order = result + "".join(sorted(set("".join(letters)) - set(result)))
    sizes = {
        letter: 1 if letter == "g" else n
        for tensor, its_letters in ((a, letters[0]), (b, letters[1]))
        for letter, n in zip(its_letters, tensor.shape, strict=True)
    }
    operands = []
    # a vector that a weight is multiplied with is not what reads its units
    both_weights = call.is_weight(a) and call.is_weight(b)
    for tensor, its_letters in ((a, letters[0]), (b, letters[1])):
        marks = call.of(tensor)
        if marks is not None:
            axes = [_in_order(axis, its_letters, order) for axis in _picked(call, marks.axes, its_letters)]
            if marks.weight and not (both_weights and tensor.dim() == 1):
                _note_sides(call, axes, len(result))
            operands.append((Marks(axes), [sizes[letter] if letter in its_letters else 1 for letter in order]))
    met = call.ledger.meet([sizes[letter] for letter in order], operands, call)
    zero = any(call.of(t) is None and call.tracer.is_zero(t) for t in (a, b))
    weighed = any((marks := call.of(t)) is not None and marks.weight for t in (a, b))
    kind = "noted" if both_weights and not zero else "weighed" if weighed else "sum"
    contracted = set(range(len(result), len(order)))
    if kind == "noted":
        call.ledger.norm_of([marks.axes for marks, _ in operands], contracted, call)
    # axes of several dimensions that change along some of them together are no factors by themselves
    without_overlap = [all(a is b or not varying(a) & varying(b) for b in met) for a in met]
    overlapping = [axis for axis, lone in zip(met, without_overlap, strict=True) if not lone]
    call.count(
        math.prod(sizes.values()), [axis for axis, lone in zip(met, without_overlap, strict=True) if lone], overlapping
    )
    return call.ledger.reduce(met, contracted, False, kind, call)


def _note_contracted(call: Call, a: Tensor, b: Tensor, letters: tuple[str, str]) -> None:
    """Note what the two factors of a product have along the contracted dimension "k" beside units that become one.

    Units that meet constants there are fixed, unless the constants are the same everywhere. In a trace with closed
    units, the values that these have there are noted.

    Args:
        call, a, b, letters: as for :func:`product`.
    """
    for tensor, its_letters, other, other_letters in ((a, letters[0], b, letters[1]), (b, letters[1], a, letters[0])):
        if "k" not in its_letters:
            continue
        marks, factor = call.of(tensor), call.of(other)
        if marks is not None and factor is not None and factor.weight and not marks.weight:
            call.probe(tensor, marks.axes, its_letters.index("k"))
        if marks is not None and factor is None and not call.even(other, {other_letters.index("k")}):
            for axis in marks.axes:
                if axis.shape[its_letters.index("k")] > 1:
                    call.ledger.keep_along(axis, {its_letters.index("k")}, CONSTANTS, call)
    if "k" in letters[0] and "k" in letters[1] and not any((m := call.of(t)) is None or m.weight for t in (a, b)):
        call.probe_pair(
            [(t, call.axes(t), its_letters.index("k")) for t, its_letters in ((a, letters[0]), (b, letters[1]))]
        )


def _picked(call: Call, axes: Axes, letters: str) -> Axes:
    """Return the axes at index 0 of dimension "g", along which data picks; units that change along it are fixed.

    Args:
        call: the call.
        axes: the axes of a factor.
        letters: the dimensions of this factor. Without a "g" among them, the axes are returned unchanged.
    """
    if "g" not in letters:
        return axes
    at = letters.index("g")
    lost = [axis for axis in axes if at in varying(axis)]
    call.ledger.fix(lost, call.why("picked", "data decides which of them is used"))
    return moving(first_along(axis, [at]) for axis in axes)


def _in_order(axis: Tensor, letters: str, order: str) -> Tensor:
    """Return an axis with dimensions ``letters`` as an axis with dimensions ``order``; it has size 1 along letters that
    are only in ``order``.
    """
    moved = axis.permute(sorted(range(len(letters)), key=lambda i: order.index(letters[i])))
    sizes = iter(moved.shape)
    return moved.reshape([next(sizes) if letter in letters else 1 for letter in order])


def _note_sides(call: Call, axes: Axes, result_rank: int) -> None:
    """Record what a weight reads (units along contracted dimensions, which are columns) and what it writes (all
    others).

    Args:
        call: the call.
        axes: the axes of the weight, with the dimensions of the result first and the contracted ones after them.
        result_rank: the number of dimensions of the result.
    """
    for axis in axes:
        if any(dim >= result_rank for dim in varying(axis)):
            call.ledger.read.append(line(axis))
            call.ledger.columns.append(line(axis))
        else:
            call.ledger.written.append(line(axis))


def _with_bias(call: Call, axes: Axes, bias: Any) -> Axes:
    """Return the axes of a product's result after a bias is added; the bias writes the units that it meets.

    Args:
        call: the call of the product, bias included.
        axes: the axes of the product without the bias.
        bias: the bias. If it is None or a constant, ``axes`` are returned.
    """
    marks = call.of(bias)
    if marks is None:
        return axes
    rules.write(call, [bias])
    shape = list(call.out.shape)
    return call.ledger.meet(shape, [(Marks(axes), shape), (marks, list(bias.shape))], call)


def _letters(a: Tensor, b: Tensor) -> tuple[tuple[str, str], str]:
    """Name the dimensions of a matrix product of two tensors with one to three dimensions, as :func:`product` takes
    them.

    Returns: ((letters of a, letters of b), letters of the result).
    """
    a_letters, b_letters = {1: "k", 2: "mk", 3: "bmk"}[a.dim()], {1: "k", 2: "kn", 3: "bkn"}[b.dim()]
    return (a_letters, b_letters), "".join(dict.fromkeys(a_letters + b_letters)).replace("k", "")


@rules.rule("mm bmm mv dot vdot matmul _sparse_mm")
def _matrix(call: Call) -> Axes:
    """The rule of matrix products: units along the summed dimension meet, the others move to the result."""
    a, b = call.args[:2]
    return product(call, a, b, *_letters(a, b))


@rules.rule("addmm addmv baddbmm _addmm_activation _sparse_addmm")
def _matrix_with_bias(call: Call) -> Axes:
    """The rule of a matrix product that is added to a bias."""
    bias, a, b = call.args[:3]
    return _with_bias(call, product(call, a, b, *_letters(a, b)), bias)


@rules.rule("_grouped_mm")
def _grouped_matrix(call: Call) -> Axes:
    """The rule of products of groups of rows (or columns), each with a matrix of its own, as of experts.

    The factors are (S, K) and (G, K, N), (G, M, K) and (K, S), or (G, M, K) and (G, K, N); two matrices are those of a
    weight's gradient, in groups along what they sum over, and give (G, M, N). The operator wants rows in memory whose
    length is a multiple of 16 bytes, so units along them go in blocks.
    """
    a, b = call.args[:2]
    for tensor in (a, b):
        _in_blocks(call, tensor, max(range(-2, 0), key=lambda dim: (tensor.stride(dim) == 1, dim)))
    letters = {
        (2, 3): (("mk", "gkn"), "mn"),
        (3, 2): (("gmk", "kn"), "mn"),
        (3, 3): (("bmk", "bkn"), "bmn"),
    }
    if (a.dim(), b.dim()) not in letters:
        axes = product(call, a, b, ("mk", "kn"), "mn")
        return [axis[None] for axis in axes]
    return _with_bias(call, product(call, a, b, *letters[a.dim(), b.dim()]), call.arg("bias"))


def _in_blocks(call: Call, tensor: Tensor, dim: int) -> None:
    """Unite the units along a dimension in blocks of consecutive ones, so that whole blocks are cut.

    A kernel that wants rows of a multiple of 16 bytes would refuse other sizes. A block has 8 units (16 bytes in half
    precision) if the size is a multiple of 8, else as many as have 16 bytes. If these do not divide the size, nothing
    is united.

    Args:
        call: the call.
        tensor: a factor.
        dim: the dimension, a negative number.
    """
    size, position = tensor.shape[dim], tensor.dim() + dim
    block = 8 if size % 8 == 0 else max(1, 16 // tensor.element_size())
    for axis in call.axes(tensor) if size % block == 0 else []:
        if position in varying(axis):
            rows = axis.movedim(position, -1).unflatten(-1, (-1, block))
            call.ledger.unite(rows[..., :1], rows, call)


@rules.rule("outer ger")
def _outer(call: Call) -> Axes:
    """The rule of the outer product, which contracts nothing."""
    return product(call, call.args[0], call.args[1], ("m", "n"), "mn")


@rules.rule("_cdist_forward _euclidean_dist")
def _distances(call: Call) -> Axes:
    """The rule of distances between all rows of two tensors, which contract the last dimension as a product does."""
    a, b = call.args[:2]
    batch = "xyzw"[: a.dim() - 2]
    return product(call, a, b, (batch + "mk", batch + "nk"), batch + "mn")


@rules.rule("embedding")
def _embedding(call: Call) -> Axes:
    """The rule of ``embedding``: the result (*index.shape, D) has the units of the columns of the weight (N, D)."""
    return _columns_of_rows(call, call.args[1].dim() + 1)


@rules.rule("_embedding_bag _embedding_bag_forward_only")
def _embedding_bag(call: Call) -> tuple[Axes, ...]:
    """The rule of ``embedding_bag``: the sums (or means, or maxima) of rows have the units of the columns of the
    weight.
    """
    call.ledger.fix(call.axes(call.arg("per_sample_weights")), call.why("mixed", "rows are added up along it"))
    return _columns_of_rows(call, 2), *([[]] * (len(call.out) - 1))


def _columns_of_rows(call: Call, rank: int) -> Axes:
    """Return the axes of a result of ``rank`` dimensions whose last one has the columns of the weight of an embedding.

    The weight is the first argument of the call. Data picks its rows, so their units are fixed.
    """
    out = []
    for axis in call.axes(call.args[0]):
        if varying(axis) == {0}:
            call.ledger.fix(axis, call.why("picked", "rows of an embedding are picked by data"))
        else:
            call.ledger.written.append(line(axis))
            out.append(along(axis[:1].reshape(-1), rank - 1, rank))
    return out


@rules.rule(
    "convolution _convolution mkldnn_convolution convolution_overrideable _slow_conv2d_forward conv2d thnn_conv2d"
)
def _convolution(call: Call) -> Axes:
    """The rule of convolutions in any number of dimensions, in groups or not, transposed or not.

    Channels of the input meet the units that the weight reads; the result has the units that the weight writes. With
    groups there are two ways: a whole group is one unit (:func:`_read_in_groups`), or, for the weights in
    ``ledger.within``, the channels in the same place of every group are one (:func:`_read_within_groups`).
    """
    tensor, weight, bias = call.args[:3]
    return _convolved(call, tensor, weight, bias, call.arg("transposed", False))


@rules.rule("convolution_backward")
def _convolution_backward(call: Call) -> Axes | tuple[Axes, ...]:
    """The rule of the gradient of a convolution's input, which models take that compute forces: it is the transposed
    convolution of the gradient of the output.
    """
    grad, _, weight = call.args[:3]
    if list(call.arg("output_mask")) != [True, False, False]:
        return rules.opaque(call)
    return _convolved(call, grad, weight, None, not call.arg("transposed", False)), [], []


def _convolved(call: Call, tensor: Tensor, weight: Tensor, bias: Any, transposed: bool) -> Axes:
    """Record a convolution, and return the axes of its result.

    Args:
        call: the call, whose first result the convolution is.
        tensor: the input, (B, C, ...).
        weight: the weight, (O, C / groups, ...), or (C, O / groups, ...) if ``transposed``.
        bias: the bias, (O,), or None.
        transposed: whether this is a transposed convolution.
    """
    groups, rank, out = call.arg("groups", 1), tensor.dim(), call.first
    read, written = _weight_sides(call, weight, transposed)
    batch, channels = _image_axes(call, tensor)
    width, samples = tensor.shape[1], 1
    if groups > 1 and _differs_by_sample(call, weight, channels, width, read if transposed else written, groups):
        # one sample stands for all: a convolution without groups
        samples, groups, width = groups, 1, width // groups
        of_one_group = [units[: len(units) // samples] for units in (read if transposed else written)]
        read, written = (of_one_group, written) if transposed else (read, of_one_group)
        channels = [axis.narrow(1, 0, width) if axis.shape[1] > 1 else axis for axis in channels]
    if call.of(tensor) is None and not call.even(tensor, {1}):
        call.ledger.fix(read, call.why("constants", "it reads constants"))
    marks, within = call.of(weight), groups > 1 and _within(call, weight)
    if marks is not None and (marks.weight or marks.scaled):
        call.probe(tensor, channels, 1)
        columns = [units.numpy() for units in read] if groups == 1 or transposed or within else []
        call.ledger.read += columns
        call.ledger.columns += columns
        # each row of a transposed weight in groups is what a whole group reads and writes
        call.ledger.written += [
            units.numpy() for units in (written if groups == 1 or not transposed or within else read)
        ]
    # the dimensions that the multiply-accumulates are proportional to
    of_sides = [*read, *written] if groups == 1 or within else read if transposed else written
    if groups > 1 and not of_sides:  # the weight has no units: a filter that code makes for every channel
        of_sides = channels
    call.count((tensor if transposed else out)[:, 0].numel() * weight.numel(), [*of_sides, *batch])
    if groups == 1:
        _read_all(call, [tensor.shape[0], width, *tensor.shape[2:]], call.of(tensor) is not None, channels, read)
    elif within:
        written = _read_within_groups(call, tensor, channels, read, written, groups, transposed)
    else:
        written = _read_in_groups(call, tensor, channels, read, written, groups, transposed)
    axes = moving([along(units.repeat(samples), 1, rank) for units in written])
    if call.of(bias) is not None:
        rules.write(call, [bias])
        shape = [1, out.shape[1]] + [1] * (rank - 2)
        shifts = Marks([along(axis, 1, rank) for axis in call.axes(bias)])
        axes = call.ledger.meet(shape, [(Marks(axes), shape), (shifts, shape)], call)
    return axes + batch


def _weight_sides(call: Call, weight: Tensor, transposed: bool) -> tuple[Axes, Axes]:
    """Return what the weight of a convolution reads and what it writes, in the order of its dimensions.

    Of a weight (O, I, kh, kw), I is read and O written; of a transposed convolution's (I, O, kh, kw) the reverse. Units
    along the kernel's height and width are fixed.

    Args:
        call: the call.
        weight: the weight.
        transposed: whether the convolution is transposed.

    Returns: (units that are read, units that are written), for each side a list of int64 tensors of one dimension, one
    for each axis.
    """
    sides: tuple[Axes, Axes] = [], []
    for axis in call.axes(weight):
        dims = varying(axis)
        if dims in ({0}, {1}):
            sides[min(dims)].append(axis.reshape(-1))
        else:
            text = "its channels are mixed" if dims & {0, 1} else "a kernel's height and width stay"
            call.ledger.fix(axis, call.why("mixed", text))
    return sides if transposed else (sides[1], sides[0])


def _image_axes(call: Call, tensor: Tensor) -> tuple[Axes, Axes]:
    """Split the axes of the input of a convolution; units along other dimensions than the first two are fixed.

    Returns: (axes along the batch, axes along the channels).
    """
    batch, channels = [], []
    for axis in call.axes(tensor):
        if varying(axis) == {0}:
            batch.append(axis)
        elif 1 in varying(axis):
            channels.append(axis)
        else:
            call.ledger.fix(axis, call.why("mixed", "a convolution runs over its channels"))
    return batch, channels


def _differs_by_sample(call: Call, weight: Tensor, channels: Axes, width: int, first: Axes, groups: int) -> bool:
    """Return whether the groups of a convolution are samples, each with a weight of its own that code computes for it
    (as in StyleGAN): what the groups read and write are the same units, again and again.

    Args:
        call: the call.
        weight: the weight; a parameter or buffer has the same values for all samples, so the answer is then False.
        channels: the axes of the input that change along its channels.
        width: the number of channels of all groups.
        first: the units of the weight's first dimension, which runs over all groups, for each of its axes.
        groups: the number of groups.
    """
    if call.tracer.name_of(weight) is not None or not first:
        return False
    lines = [axis.transpose(1, -1).reshape(-1, axis.shape[1]) for axis in channels if axis.shape[1] == width]
    return all(
        bool((rows.reshape(groups, -1) == rows.reshape(groups, -1)[:1]).all())
        for rows in [*first, *(row for line in lines for row in line[:1])]
    )


def _read_all(call: Call, size: list[int], known: bool, channels: Axes, read: Axes) -> None:
    """Record that a convolution without groups reads ``channels``: each becomes one unit with its column of the weight.

    Args:
        call: the call.
        size: the shape of the input, (B, C, ...).
        known: whether anything with units went into the input.
        channels: the axes of the input that change along C. Units that also change along height or width become one
            unit for each channel.
        read: the units that the weight reads, C in order.
    """
    rank = len(size)
    shape = [1, size[1]] + [1] * (rank - 2)
    operands = [(Marks([along(units, 1, rank)]), shape) for units in read]
    if known:
        operands.append((Marks(channels), size))
    for axis in call.ledger.meet(size, operands, call):
        if varying(axis) - {1}:
            call.ledger.unite(axis, first_along(axis, varying(axis) - {1}), call)


def _within(call: Call, weight: Tensor) -> bool:
    """Return whether each group of a convolution loses the same channels, while no group goes as a whole
    (``ledger.within``).

    The weight is noted in ``ledger.in_groups`` if its groups have several channels, so that this way can be tried.
    """
    name = call.tracer.name_of(weight)
    if name is not None and weight.shape[1] > 1:
        call.ledger.in_groups.add(name)
    return name in call.ledger.within


def _read_within_groups(
    call: Call, tensor: Tensor, channels: Axes, read: Axes, written: Axes, groups: int, transposed: bool
) -> Axes:
    """Record that channels in the same place of every group are one unit, where they are read and where they are
    written.

    With 6 input channels in 2 groups, channels 0 and 3 are one unit, 1 and 4, 2 and 5. The dimension of the weight that
    runs over all groups is united so; the other one holds a single group and is repeated.

    Args:
        call: the call of a convolution.
        tensor: its input, (B, C, ...).
        channels: the axes of the input that change along C.
        read: the units that the weight reads, for each of its axes a tensor of one dimension.
        written: the units that it writes, likewise.
        groups: the number of groups.
        transposed: whether the convolution is transposed, so that what it reads runs over all groups.

    Returns: the units that are written, one for each output channel, for each axis.
    """
    ledger, width, rank = call.ledger, tensor.shape[1], tensor.dim()
    # ``first``: units of the weight's dimension that runs over all groups; ``last``: of the one that holds one group
    first, last = (read, written) if transposed else (written, read)
    for units in first:
        rows = units.reshape(groups, -1)
        ledger.unite(rows, rows[:1], call)
    lines = read if transposed else [units.repeat(groups) for units in last]
    for units in lines:
        for axis in channels:
            ledger.unite(along(units, 1, rank), axis.expand([axis.shape[0], width, *axis.shape[2:]]), call)
        if not channels:
            ledger.fix(units, call.why("constants", "its groups read data that has no channels of its own"))
    for axis in channels if not lines else ():
        ledger.fix(axis, call.why("mixed", "it lies within a group of a convolution"))
    return [units.repeat(groups) for units in written] if transposed else written


def _read_in_groups(
    call: Call, tensor: Tensor, channels: Axes, read: Axes, written: Axes, groups: int, transposed: bool
) -> Axes:
    """Record that a group goes as a whole: all channels that it reads and all that it writes are one unit.

    The weight's dimension that holds the channels within a group is fixed.

    Args:
        call, tensor, channels, read, written, groups, transposed: as for :func:`_read_within_groups`.

    Returns: the units that are written, one for each output channel, for each axis.
    """
    ledger, within = call.ledger, call.why("split", "it lies within a group of a convolution")
    block = ledger.fresh(groups, 1)
    for axis in channels:
        full = axis.expand([axis.shape[0], tensor.shape[1], *axis.shape[2:]])
        split = full.reshape([full.shape[0], groups, -1, *full.shape[2:]])
        ledger.unite(along(block.reshape(-1), 1, split.dim()), split, call)
    if call.of(tensor) is not None and not channels:
        ledger.fix(block, call.why("constants", "its groups read data that has no channels of its own"))
    for units in read:
        if transposed:
            ledger.unite(block, units.reshape(groups, -1), call)
        else:
            ledger.fix(units, within)
    if transposed:
        for units in written:
            ledger.fix(units, within)
        written = [ledger.fresh(call.first.shape[1])]
    for units in written:
        ledger.unite(block, units.reshape(groups, -1), call)
    return written or [block.expand(groups, call.first.shape[1] // groups).reshape(-1)]
