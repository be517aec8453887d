"""Rules of norms, reductions (``sum``, ``mean``, ``max``), softmax, pooling and resizing.

A rule takes a call of an operator and returns the axes of its result. An axis is an int64 tensor that holds the unit of
each index along some dimensions of a tensor, and has size 1 along all others.

A reduction along dimensions in which no unit changes leaves the units as they are: a mean over height and width keeps
the channels. A reduction across units fixes them ("mixed"), or they may be cut only under a condition: "statistic"
where a norm has to count open units alone, "sum" where zeros add nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import Tensor

from . import rules
from .axes import Axes, along, first_along, narrow, varying
from .ledger import Marks, line

if TYPE_CHECKING:
    from .call import Call, Rule


def _per_channel(call: Call, tensor: Tensor, others: list[Any], axes: Axes) -> Axes:
    """Return the axes of a norm's result: the input (B, C, ...) meets gains, biases and running statistics of shape
    (C,).

    Args:
        call: the call.
        tensor: the input.
        others: gains, biases and running statistics.
        axes: the axes of the input.
    """
    rank = tensor.dim()
    shape = [1, tensor.shape[1]] + [1] * (rank - 2)
    operands: list[tuple[Marks, list[int]]] = [(Marks(axes), list(tensor.shape))]
    rules.write(call, others)
    for other in others:
        if call.of(other) is not None:
            operands.append((Marks([along(axis, 1, rank) for axis in call.axes(other)]), shape))
    return call.ledger.meet(list(tensor.shape), operands, call)


@rules.rule(
    "native_batch_norm _native_batch_norm_legit _native_batch_norm_legit_no_training "
    "_native_batch_norm_legit_functional batch_norm "
    "cudnn_batch_norm miopen_batch_norm _batch_norm_with_update _batch_norm_with_update_functional "
    "_batch_norm_no_update"
)
def _batch_norm(call: Call) -> tuple[Axes, ...]:
    """The rule of BatchNorm and InstanceNorm: each channel has its own statistics, so channels stay separate units.

    Units along another dimension than the channels enter such a statistic, unless running statistics are used; they may
    be cut only if the statistic then counts the open ones alone.
    """
    tensor = call.args[0]
    training = next((a for a in call.args[3:6] if isinstance(a, bool)), False)
    running = any(isinstance(a, Tensor) and a.dim() == 1 for a in call.args[3:5])
    if training or not running:
        call.ledger.reduce(call.axes(tensor), set(range(tensor.dim())) - {1}, True, "statistic", call)
    call.ledger.normed += [
        (call.module_name(), line(axis), axis.shape[1]) for axis in call.axes(tensor) if varying(axis) == {1}
    ]
    others = [a for a in call.args[1:5] if isinstance(a, Tensor)]
    return (_per_channel(call, tensor, others, call.axes(tensor)), *([[]] * (len(call.out) - 1)))


@rules.rule("native_layer_norm layer_norm _fused_rms_norm rms_norm")
def _layer_norm(call: Call) -> Axes | tuple[Axes, ...]:
    """The rule of LayerNorm and RMSNorm: a statistic over the last dimensions, then a gain and a bias along these."""
    tensor, over = call.args[0], len(call.args[1])
    axes = call.axes(tensor)
    call.ledger.reduce(axes, set(range(tensor.dim() - over, tensor.dim())), True, "statistic", call)
    gains = [a for a in call.args[2:4] if isinstance(a, Tensor)]
    rules.write(call, gains)
    operands = [(Marks(axes), list(tensor.shape)), *filter(None, (rules.operand(call, gain) for gain in gains))]
    met = call.ledger.meet(list(tensor.shape), operands, call)
    return met if isinstance(call.out, Tensor) else (met, *([[]] * (len(call.out) - 1)))


@rules.rule("native_group_norm group_norm")
def _group_norm(call: Call) -> Axes | tuple[Axes, ...]:
    """The rule of GroupNorm.

    With one group, the channels may be cut only if the norm then computes its statistics over the open ones alone. With
    more groups, all channels of a group become one unit, so whole groups are cut.
    """
    tensor, groups = call.args[0], call.arg("group") or call.arg("num_groups")
    for axis in call.axes(tensor):
        if 1 not in varying(axis):
            call.ledger.fix(axis, call.why("mixed", "its channels are mixed"))
        elif groups == 1:
            call.ledger.statistic(axis, call)
        else:
            split = axis.reshape([axis.shape[0], groups, -1, *axis.shape[2:]])
            call.ledger.normed.append((call.module_name(), line(axis), groups))
            call.ledger.unite(split, first_along(split, set(range(split.dim())) - {1}), call)
    gains = [a for a in (call.arg("weight"), call.arg("bias")) if isinstance(a, Tensor)]
    met = _per_channel(call, tensor, gains, call.axes(tensor))
    return met if isinstance(call.out, Tensor) else (met, *([[]] * (len(call.out) - 1)))


@rules.rule("_weight_norm_interface")
def _weight_norm(call: Call) -> tuple[Axes, ...]:
    """The rule of ``torch.nn.utils.weight_norm``: a direction, divided by its norm, times a length.

    The norm counts what the weight reads, so it is recorded as a norm of the weight. Returns the axes of the weight,
    and none of the norm.
    """
    direction, length = call.args[:2]
    over = {d for d in range(direction.dim()) if length.shape[d] == 1}
    call.ledger.norm_of([call.axes(direction)], over, call)
    call.ledger.reduce(call.axes(direction), over, True, "noted", call)
    operands = [rules.operand(call, t) for t in (direction, length)]
    return call.ledger.meet(list(direction.shape), list(filter(None, operands)), call), []


def _dims(call: Call, rank: int) -> set[int]:
    """Return the dimensions that a reduction of a tensor with ``rank`` dimensions runs over, without negative numbers;
    all if the call names none.
    """
    dims = call.arg("dim", call.arg("dims"))
    if dims is None or dims == []:
        return set(range(rank))
    return {d % rank for d in ([dims] if isinstance(dims, int) else dims)} if rank else set()


def _reduction(kind: str) -> Rule:
    """Make the rule of the reductions of one kind.

    Args:
        kind: "sum", "statistic" (a mean or variance, say) or "mixed" (anything else). :meth:`~.ledger.Ledger.reduce`
            says what each kind does to units.

    Returns: a function from the call of an operator to the axes of its outputs.
    """

    def reduce(call: Call) -> Axes | tuple[Axes, ...]:
        """Apply the rule to a call.

        A sum over a weight is recorded as a norm of the weight; the reduction itself is then of the kind "noted".
        """
        if len(call.given) > 1:  # max(a, b) of two tensors is elementwise
            return rules.elementwise(call)
        tensor, marks = call.args[0], call.of(call.args[0])
        keepdim = call.first.dim() == tensor.dim() > 0
        dims, how = _dims(call, tensor.dim()), kind
        if kind == "sum" and marks is not None and (marks.weight or marks.scaled):
            call.ledger.norm_of([marks.axes], dims, call)
            how = "noted"
        if how == "sum" and len(dims) == 1:
            call.probe(tensor, call.axes(tensor), min(dims), added=True)
        axes = call.ledger.reduce(call.axes(tensor), dims, keepdim, how, call)
        return axes if isinstance(call.out, Tensor) else tuple(axes for _ in call.out)

    return reduce


rules.rule("sum nansum linalg_vector_norm norm count_nonzero")(_reduction("sum"))
rules.rule("mean var var_mean std std_mean")(_reduction("statistic"))
rules.rule("max min amax amin argmax argmin prod logsumexp any all median mode aminmax kthvalue nanmedian")(
    _reduction("mixed")
)


@rules.rule(
    "_softmax _log_softmax softmax log_softmax _safe_softmax cumsum cumprod logcumsumexp cummax cummin sort topk "
    "_fft_r2c _fft_c2r "
    "_fft_c2c fft_fftshift"
)
def _mixed_along(call: Call) -> Axes | tuple[Axes, ...]:
    """The rule of operators in which elements along a dimension depend on each other: softmax, ``cumsum``, ``sort``,
    FFT.

    Units that change along that dimension are fixed or, if they change along others too, become one unit along it.
    """
    tensor = call.args[0]
    dims = _dims(call, tensor.dim())
    call.ledger.reduce(call.axes(tensor), dims, True, "mixed", call)
    axes = [axis for axis in call.axes(tensor) if varying(axis) - dims or not varying(axis)]
    if not call.name.endswith("softmax"):
        axes = [narrow(first_along(axis, dims)) for axis in axes]
    return axes if isinstance(call.out, Tensor) else tuple(axes for _ in call.out)


def _matrices(call: Call, tensor: Tensor, dims: set[int]) -> Axes:
    """Record that an operator mixes what changes along ``dims``, and return the axes of ``tensor`` after it.

    Args:
        call: the call.
        tensor: an argument of it.
        dims: the dimensions of the matrices, or of what is mixed else.

    Returns: the axes that change along other dimensions, with size 1 along ``dims``.
    """
    axes = call.axes(tensor)
    call.ledger.reduce(axes, dims, True, "mixed", call)
    return [narrow(first_along(axis, dims)) for axis in axes if varying(axis) - dims]


@rules.rule(
    "inverse linalg_inv linalg_inv_ex linalg_cholesky linalg_cholesky_ex cholesky linalg_pinv linalg_qr linalg_eigh "
    "_linalg_eigh linalg_eig linalg_eigvals linalg_svd _linalg_svd linalg_svdvals linalg_lu linalg_lu_factor "
    "linalg_lu_factor_ex linalg_det _linalg_det linalg_slogdet _linalg_slogdet linalg_matrix_exp matrix_exp"
)
def _of_matrices(call: Call) -> Axes | tuple[Axes, ...]:
    """The rule of functions of matrices, which are the last two dimensions: what changes along these is mixed, what
    changes along others stays apart.
    """
    tensor = call.args[0]
    axes = _matrices(call, tensor, {tensor.dim() - 2, tensor.dim() - 1})

    def of(result: Any) -> Axes:
        """Return the axes of one result, which has the leading dimensions of the matrices, and others that no unit
        changes along.
        """
        kept = result.dim() if isinstance(result, Tensor) else 0
        return [axis.reshape([*axis.shape[:-2], *(1,) * (kept - axis.dim() + 2)]) for axis in axes]

    return of(call.out) if isinstance(call.out, Tensor) else tuple(of(result) for result in call.out)


rules.rule("_linalg_check_errors")(rules.nothing)  # it reads what these report


@rules.rule("linalg_solve_triangular triangular_solve linalg_solve linalg_solve_ex _linalg_solve_ex cholesky_solve")
def _solve(call: Call) -> Axes | tuple[Axes, ...]:
    """The rule of systems of linear equations: what changes along the rows of the right-hand side is mixed with the
    matrix, its columns stay apart, and so does what changes along the dimensions in front.
    """
    matrix, right = call.args[:2] if call.name.startswith(("linalg", "_linalg")) else call.args[1::-1]
    first = call.first if isinstance(call.out, Tensor) else call.out[0]
    rows, sides = right.dim() - (2 if call.arg("left", True) else 1), 2
    if right.dim() == 1 or right.shape == matrix.shape[:-1]:
        rows, sides = right.dim() - 1, 1  # the right-hand side is one vector for each matrix
    shape = [*matrix.shape[:-2], *(1,) * sides]
    of_matrix = [
        axis.reshape([*axis.shape[:-2], *(1,) * sides])
        for axis in _matrices(call, matrix, {matrix.dim() - 2, matrix.dim() - 1})
    ]
    sizes = [1 if at == rows else size for at, size in enumerate(right.shape)]
    operands = [(Marks(of_matrix), shape), (Marks(_matrices(call, right, {rows})), sizes)]
    met = call.ledger.meet(list(first.shape), operands, call)
    return met if isinstance(call.out, Tensor) else (met, *([[]] * (len(call.out) - 1)))


def _spatial(dims: int) -> Callable[[Call], Axes | tuple[Axes, ...]]:
    """Make a rule for pooling and resizing over the last ``dims`` dimensions.

    Units that change along these alone are fixed; units that change along others too become one unit along these.
    """

    def pool(call: Call) -> Axes | tuple[Axes, ...]:
        """Apply the rule to a call: over the last ``dims`` dimensions of its first argument."""
        tensor, out = call.args[0], []
        over = set(range(tensor.dim() - min(dims, tensor.dim()), tensor.dim()))
        for axis in call.axes(tensor):
            if varying(axis) & over and not varying(axis) - over:
                call.ledger.fix(axis, call.why("mixed", "its channels are mixed"))
                continue
            first = first_along(axis, varying(axis) & over)
            if varying(axis) & over:
                call.ledger.unite(axis, first, call)
            out.append(first)
        return out if isinstance(call.out, Tensor) else tuple(out for _ in call.out)

    return pool


def _spatial_gradient(dims: int) -> Callable[[Call], Axes]:
    """Make a rule for the gradients of pooling and resizing over the last ``dims`` dimensions. Their channels are those
    of the operator's input.
    """

    def gradient(call: Call) -> Axes:
        """Apply the rule to a call: over the last ``dims`` dimensions of the gradient, and of the input if the call has
        it.
        """
        over = set(range(call.first.dim() - dims, call.first.dim()))
        shape = [1 if at in over else size for at, size in enumerate(call.first.shape)]
        read = [call.axes(tensor) for tensor in call.args[:2] if call.of(tensor) is not None]
        operands = [(Marks(call.ledger.reduce(axes, over, True, "mixed", call)), shape) for axes in read]
        return call.ledger.meet(shape, operands, call)

    return gradient


_SPATIAL = (
    "max_pool avg_pool adaptive_avg_pool adaptive_max_pool upsample_nearest upsample_linear upsample_bilinear "
    "upsample_bicubic "
    "upsample_trilinear _upsample_nearest_exact fractional_max_pool"
)
for _dim in (1, 2, 3):
    for _kind in _SPATIAL.split():
        _forms = "{0}{1}d {0}{1}d_with_indices _{0}{1}d {0}{1}d_aa _{0}{1}d_aa mkldnn_{0}{1}d"
        rules.rule(_forms.format(_kind, _dim))(_spatial(_dim))
        _gradients = " ".join(f"{form}_backward" for form in _forms.format(_kind, _dim).split())
        rules.rule(_gradients)(_spatial_gradient(_dim))
rules.rule("grid_sampler_2d")(_spatial(2))
rules.rule("grid_sampler_3d")(_spatial(3))


@rules.rule("max_unpool2d max_unpool3d")
def _unpool(call: Call) -> Axes:
    """The rule of ``max_unpool``: pooled values go back to the places that ``max_pool`` returned as indices.

    Values and indices may come from different layers; units at the same place of both become one.
    """
    shape, operands = list(call.args[0].shape), [rules.operand(call, t) for t in call.args[:2]]
    axes = call.ledger.meet(shape, [known for known in operands if known is not None], call)
    over, out = set(range(len(shape) - (2 if call.name.endswith("2d") else 3), len(shape))), []
    for axis in axes:
        if varying(axis) & over:
            call.ledger.fix(axis, call.why("mixed", "its channels are mixed"))
        else:
            out.append(axis)
    return out
