"""The first steps of all functions with a weight: check the arguments, cast them as autocast would, and make seeds."""

from __future__ import annotations

import torch
from torch import Tensor

from dampr import _checks, philox
from dampr.ops.gate_args import GateArgs, GatePair
from dampr.spec import SAMPLE, GateSpec


def cast(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``x`` in the dtype that autocast gives it, after checks that ``weight`` and ``bias`` fit.

    Raises: TypeError or ValueError.
    """
    if bias is not None and (
        not isinstance(bias, Tensor) or bias.layout != torch.strided or bias.shape != weight.shape[:1]
    ):
        _checks.tensor("bias", bias)
        raise ValueError(f"bias.shape={tuple(bias.shape)}: expected ({weight.shape[0]},), the rows of weight")
    device, dtype = x.device, x.dtype
    autocast = not x.is_meta and dtype != torch.float64 and torch.is_autocast_enabled(device.type)
    same = (
        weight.dtype == dtype
        and weight.device == device
        and (bias is None or (bias.dtype == dtype and bias.device == device))
    )
    if same and not autocast:
        return x
    _checks.same_device("weight", weight, "x", x)
    if autocast:
        x = x.to(torch.get_autocast_dtype(device.type))
    for name, t in (("weight", weight), ("bias", bias)):
        if t is not None and t.dtype != x.dtype and not (autocast and t.dtype == torch.float32):
            expected = (
                f"{x.dtype} or torch.float32"
                if autocast
                else f"{x.dtype}, the dtype of x (mixed dtypes are for autocast)"
            )
            raise TypeError(f"{name}.dtype={t.dtype}: expected {expected}")
    if bias is not None:
        _checks.same_device("bias", bias, "x", x)
    return x


def gate_of(
    name: str,
    gate: Tensor,
    count: int,
    one: str,
    x: Tensor,
    seed: int | Tensor | None,
    spec: GateSpec,
    per_sample: bool = False,
) -> GateArgs:
    """The checked arguments of ``count`` gates next to ``x``.

    Args:
        name: the name of the argument ``gate``, for errors.
        gate: the gate parameters.
        count: the number of gates.
        one: what has a gate, for errors ("channel").
        x: the tensor whose device and dtype decide.
        seed, spec, per_sample: those of the gates.
    """
    if not isinstance(spec, GateSpec) or not isinstance(per_sample, bool):
        _checks.gate_spec("spec", spec)
        per_sample = _checks.flag("per_sample", per_sample)
    log_alpha = _checks.gate_parameter(name, gate, count, one, x)
    return GateArgs(
        log_alpha,
        _checks.seed_tensor("seed", seed, x.device) if spec.rule == SAMPLE else None,
        spec,
        per_sample and spec.rule == SAMPLE,
    )


def gates_of(
    input_gate: Tensor | None,
    n_in: int,
    one_input: str,
    output_gate: Tensor | None,
    n_out: int,
    one_output: str,
    x: Tensor,
    seed: int | Tensor | None,
    spec: GateSpec,
    per_sample: bool,
) -> GatePair:
    """The checked gate parameters of inputs and outputs, with a seed for each.

    If both have gates, the outputs use a second stream of the same seed. ``one_input`` and ``one_output`` say in errors
    what has a gate.
    """
    if not isinstance(spec, GateSpec) or not isinstance(per_sample, bool):
        _checks.gate_spec("spec", spec)
        per_sample = _checks.flag("per_sample", per_sample)
    dtype, device, found = torch.float64 if x.dtype == torch.float64 else torch.float32, x.device, []
    for name, t, count, one in (
        ("input_gate", input_gate, n_in, one_input),
        ("output_gate", output_gate, n_out, one_output),
    ):
        plain = (
            isinstance(t, Tensor)
            and t.layout == torch.strided
            and t.dtype == dtype
            and t.shape == (count,)
            and t.device == device
        )
        found.append(t if plain or t is None else _checks.gate_parameter(name, t, count, one, x))
    in_la, out_la = found
    in_seed = out_seed = None
    if spec.rule == SAMPLE and (in_la is not None or out_la is not None):
        right = isinstance(seed, Tensor) and seed.dtype == torch.int64 and seed.shape == (1,) and seed.device == device
        noise = seed if right and isinstance(seed, Tensor) else _checks.seed_tensor("seed", seed, device)
        in_seed = None if in_la is None else noise
        if out_la is not None:
            out_seed = noise if in_la is None else noise ^ philox.SECOND_STREAM
    return GatePair(in_la, out_la, in_seed, out_seed, spec, per_sample and spec.rule == SAMPLE)
