"""Targets: the functions of ``dampr.functional`` on every backend that is here, with gradients, against float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import dampr
from dampr import functional, spec
from tests.backends import ON_CPU

from .cases import Case, judge
from .values import Draw, nonsense

SPECS = (
    *[spec.hard_concrete(rule) for rule in spec.RULES],
    *[spec.ramp(shape, sharpness) for shape in spec.SHAPES for sharpness in (1.0, 5.0)],
    *[spec.mask(variant) for variant in spec.VARIANTS],
    spec.value(),
)


def a_spec(draw: Draw) -> spec.GateSpec:
    return draw.choice(SPECS) if draw.chance(0.6) else SPECS[0]


def gate(draw: Draw, count: int, dtype: torch.dtype) -> Tensor:
    own = torch.float64 if dtype == torch.float64 else torch.float32
    values = torch.randn(count, generator=draw.torch, dtype=torch.float32).mul(draw.choice((0.3, 3.0, 30.0))).to(own)
    return draw.laid_out(values)


def seeds(draw: Draw) -> Any:
    seed = draw.choice((0, 1, 2**32, 2**63 - 1, draw.randrange(2**63)))
    return torch.tensor([seed]) if draw.chance(0.3) else seed


def corrupted(draw: Draw, kwargs: dict[str, Any]) -> None:
    """Replace arguments by nonsense, or tensors by others that do not fit."""
    for name in draw.sample(sorted(kwargs), k=min(len(kwargs), draw.choice((1, 1, 1, 2)))):
        value = kwargs[name]
        if isinstance(value, Tensor) and draw.chance(0.5):
            ways: tuple[Callable[[], Any], ...] = (
                lambda value=value: value.to("meta"),
                lambda value=value: value.long() if value.is_floating_point() else value.float(),
                lambda value=value: value.half() if value.dtype != torch.float16 else value.double(),
                lambda value=value: value[..., :-1] if value.dim() else value[None],
                lambda value=value: value[None],
                lambda value=value: value.to(torch.complex64),
                lambda value=value: torch.cat((value, value), -1) if value.dim() else value,
            )
            kwargs[name] = draw.choice(ways)()
        else:
            kwargs[name] = nonsense(draw)


def with_gradients(
    function: Callable[..., Any], kwargs: dict[str, Any], seed: int, backend: str | None = None, double: bool = False
) -> Any:
    """The result and the gradients of a fixed sum of it, of copies of the arguments; in float64 on request."""
    given = {}
    for name, value in kwargs.items():
        if isinstance(value, Tensor) and value.is_floating_point() and not value.is_meta and not value.is_sparse:
            value = (value.double().contiguous() if double else value).detach()
            value = value.requires_grad_() if not name.startswith("running") else value.clone()
        given[name] = value
    with dampr.backend(backend) if backend else dampr.backend("auto"):
        out = function(**given)
        first = out[0] if isinstance(out, tuple) else out
        leaves = [value for value in given.values() if isinstance(value, Tensor) and value.requires_grad]
        if first.is_meta or not first.requires_grad or not first.numel():
            return out
        factors = torch.randn(first.shape, generator=torch.Generator().manual_seed(seed)).to(first.dtype)
        return out, torch.autograd.grad(first, leaves, factors, allow_unused=True)


def of(name: str, make: Callable[[Draw], dict[str, Any]]) -> Callable[[Draw], str | None]:
    function = getattr(functional, name)

    def target(draw: Draw) -> str | None:
        kwargs = make(draw)
        names = tuple(kwargs)
        backend = draw.choice((*ON_CPU, None))
        seed = draw.randrange(2**31)
        if draw.chance(0.45):
            corrupted(draw, kwargs)
            return judge(Case(function, (), kwargs, names=names))
        if draw.chance(0.08):
            on_meta = {k: v.to("meta") if isinstance(v, Tensor) else v for k, v in kwargs.items()}
            return judge(Case(function, (), on_meta, names=names, truth=lambda: function(**kwargs), valid=True))

        def call(**given: Any) -> Any:
            return with_gradients(function, given, seed, backend)

        call.__qualname__ = f"{name} and its gradients on {backend}"
        truth = lambda: with_gradients(function, kwargs, seed, "reference", double=True)  # noqa: E731
        if any(
            isinstance(v, Tensor) and v.is_floating_point() and not bool((v.double().abs() < 1e4).all())
            for v in kwargs.values()
        ):
            return judge(Case(call, (), kwargs, names=names, valid=True, truth=lambda: values(truth())))
        baseline = lambda: with_gradients(function, kwargs, seed, "reference")  # noqa: E731
        return judge(Case(call, (), kwargs, names=names, valid=True, truth=truth, baseline=baseline))

    return target


def values(found: Any) -> Any:
    """Of a result that infinities reach, nothing is compared but its places:
    how 0 times infinity is taken is up to the route.
    """
    return torch.utils._pytree.tree_map_only(Tensor, lambda t: torch.full_like(t, float("nan")), found)


def maybe(draw: Draw, make: Callable[[], Any], share: float = 0.5) -> Any:
    return make() if draw.chance(share) else None


def linear(draw: Draw) -> dict[str, Any]:
    dtype, k, n = draw.dtype(), draw.size(), draw.size()
    lead = tuple(draw.size() for _ in range(draw.choice((0, 1, 1, 2, 3))))
    kwargs = {
        "x": draw.tensor((*lead, k), dtype),
        "weight": draw.tensor((n, k), dtype),
        "bias": maybe(draw, lambda: draw.tensor((n,), dtype)),
    }
    return kwargs | _gates(draw, kwargs["weight"], k, n, dtype, spatial=False)


def _gates(draw: Draw, weight: Tensor, read: int, written: int, dtype: torch.dtype, spatial: bool) -> dict[str, Any]:
    kwargs: dict[str, Any] = {"seed": seeds(draw), "spec": a_spec(draw)}
    where = draw.choice(("input", "output", "both", "none", "weight", "block"))
    if where in ("weight", "block"):
        rows, columns = (draw.size(1), draw.size(1)) if where == "block" else (1, 1)
        count = -(weight.shape[0] // -rows) * -(weight.shape[1] // -columns)
        if spatial and where == "weight":
            return kwargs | {"weight_gate": gate(draw, weight.numel(), dtype), "block": None}
        return kwargs | {"weight_gate": gate(draw, count, dtype), "block": (rows, columns)}
    kwargs["per_sample"] = draw.chance(0.4)
    kwargs["input_gate"] = gate(draw, read, dtype) if where in ("input", "both") else None
    kwargs["output_gate"] = gate(draw, written, dtype) if where in ("output", "both") else None
    return kwargs


def convolution(dims: int) -> Callable[[Draw], dict[str, Any]]:
    def make(draw: Draw) -> dict[str, Any]:
        dtype, groups = draw.choice((torch.float32, torch.float64, torch.bfloat16)), draw.choice((1, 1, 1, 2, 3))
        read, written = groups * draw.size(1), groups * draw.size(1)
        kernel = tuple(draw.choice((1, 1, 2, 3)) for _ in range(dims))
        dilation = tuple(draw.choice((1, 1, 2)) for _ in range(dims))
        image = tuple(d * (r - 1) + 1 + draw.choice((0, 1, 2, 5)) for d, r in zip(dilation, kernel, strict=True))
        stride: Any = tuple(draw.choice((1, 1, 2, 3)) for _ in range(dims))
        padding: Any = tuple(draw.choice((0, 0, 1, 2)) for _ in range(dims))
        if draw.chance(0.15):
            stride, padding = 1, draw.choice(("same", "valid"))
        batch = (draw.choice((0, 1, 1, 2, 5)),) if draw.chance(0.85) else ()
        x = draw.tensor((*batch, read, *image), dtype)
        if dims == 2 and batch and draw.chance(0.3):
            x = x.contiguous(memory_format=torch.channels_last)
        weight = draw.tensor((written, read // groups, *kernel), dtype)
        if dtype == torch.bfloat16:  # torch 2.13's own convolution ends in a segmentation fault for others, with groups
            weight = weight.contiguous()
        kwargs = {
            "x": x,
            "weight": weight,
            "bias": maybe(draw, lambda: draw.tensor((written,), dtype)),
            "stride": stride,
        }
        kwargs |= {"padding": padding, "dilation": dilation, "groups": groups}
        return kwargs | _gates(draw, weight, read, written, dtype, spatial=True)

    return make


def activations(draw: Draw) -> dict[str, Any]:
    dtype, shape = draw.dtype(), tuple(draw.size() for _ in range(draw.randint(1, 5)))
    shape = shape if torch.Size(shape).numel() < 1e5 else shape[:2]
    dim = draw.randrange(-len(shape), len(shape))
    per_sample = draw.chance(0.4) and dim % len(shape) != 0
    kwargs = {"x": draw.tensor(shape, dtype), "gate": gate(draw, shape[dim], dtype), "dim": dim}
    return kwargs | {"seed": seeds(draw), "per_sample": per_sample, "spec": a_spec(draw)}


def affine(draw: Draw) -> dict[str, Any]:
    n, dtype = draw.size(), draw.dtype()
    other = dtype if dtype == torch.float64 else draw.choice((dtype, torch.float32))
    own = {
        "gate": gate(draw, n, dtype),
        "weight": draw.tensor((n,), dtype),
        "bias": maybe(draw, lambda: draw.tensor((n,), other)),
    }
    return own | {"seed": seeds(draw), "spec": a_spec(draw)}


def batch_norm(draw: Draw) -> dict[str, Any]:
    dtype, channels = draw.choice((torch.float32, torch.float64)), draw.size(1)
    space = tuple(draw.choice((1, 2, 3, 5)) for _ in range(draw.choice((0, 1, 2))))
    training = draw.chance(0.6)
    kwargs: dict[str, Any] = {
        "x": draw.tensor((draw.choice((2, 3, 5, 8)), channels, *space), dtype),
        "gate": gate(draw, channels, dtype),
    }
    for name in ("weight", "bias"):
        kwargs[name] = maybe(draw, lambda: draw.tensor((channels,), dtype))
    if not training or draw.chance(0.5):
        kwargs["running_mean"] = torch.randn(channels, generator=draw.torch).to(dtype)
        kwargs["running_var"] = torch.rand(channels, generator=draw.torch).to(dtype) + 0.1
    kwargs |= {"training": training, "momentum": draw.random(), "eps": 10 ** -draw.uniform(2, 5), "seed": seeds(draw)}
    return kwargs | {"per_sample": draw.chance(0.5), "activation": maybe(draw, lambda: "relu"), "spec": a_spec(draw)}


def sampled(draw: Draw) -> dict[str, Any]:
    log_alpha = gate(draw, draw.size(), draw.choice((torch.float32, torch.float64)))
    return {"log_alpha": log_alpha, "seed": seeds(draw), "rows": maybe(draw, draw.size), "spec": a_spec(draw)}


def probability(draw: Draw) -> dict[str, Any]:
    return {
        "log_alpha": draw.tensor(
            tuple(draw.size() for _ in range(draw.randint(0, 3))), draw.choice((torch.float32, torch.float64))
        )
    }


def l0(draw: Draw) -> dict[str, Any]:
    log_alpha = gate(draw, draw.size(1), draw.choice((torch.float32, torch.float64)))
    n, dtype = len(log_alpha), log_alpha.dtype
    sizes: Any = draw.choice((1.0, 7, torch.rand(n, generator=draw.torch).to(dtype)))
    kwargs = {
        "log_alpha": log_alpha,
        "group_size": sizes,
        "lam": draw.choice((0.0, 1e-3, torch.rand(n, generator=draw.torch).to(dtype))),
    }
    if draw.chance(0.5):
        kwargs |= {"group_sq_norm": torch.rand(n, generator=draw.torch).to(dtype), "prior_precision": draw.random()}
    return kwargs


TARGETS = {
    "gated_linear": of("gated_linear", linear),
    "gated_conv1d": of("gated_conv1d", convolution(1)),
    "gated_conv2d": of("gated_conv2d", convolution(2)),
    "gate_activations": of("gate_activations", activations),
    "gated_affine": of("gated_affine", affine),
    "gated_batch_norm": of("gated_batch_norm", batch_norm),
    "sample_gates": of("sample_gates", sampled),
    "open_probability": of("open_probability", probability),
    "expected_l0": of("expected_l0", l0),
}
