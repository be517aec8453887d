"""The part of ``dampr verify`` for gated batch norms: modes, layouts and rules."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dampr import functional, names, reference
from dampr.spec import hard_concrete

from .rows import Expected, Row, compare_all, on_backend, upstream

# (B, C, ...) of a norm: empty, vectors, sequences, images of one pixel, of prime sizes, of whole tiles, more channels
# than a tile. None has two values per channel: these become +1 and -1, with a gradient that is 0 up to eps.
NORM_SHAPES = (
    (0, 3, 4, 4),
    (5, 1),
    (5, 7),
    (130, 65),
    (3, 5, 17),
    (7, 3, 1, 1),
    (3, 7, 5, 3),
    (2, 64, 16, 16),
    (2, 130, 3, 5),
    (1, 3, 33, 29),
)


@dataclass(frozen=True)
class NormCase:
    """One gated batch norm of x (B, C, ...).

    Attributes:
        shape: the shape of x.
        training: whether to normalise by the statistics of x, else by running ones.
        per_sample: whether each sample has a draw.
        relu: whether a ReLU follows.
        rule: the rule of the gates.
        layout: the memory layout of x.
        affine: whether there are a gain and a bias.
        expanded_dy: whether the gradient of y is one expanded number.
        mean: the mean of x.
    """

    shape: tuple[int, ...]
    training: bool = True
    per_sample: bool = True
    relu: bool = True
    rule: str = "sample"
    # "channels_last", or "sliced": every second index of the last dimension of a wider tensor
    layout: str = "contiguous"
    affine: bool = True
    expanded_dy: bool = False
    mean: float = 0.0

    def __str__(self) -> str:
        how = [
            f"{self.shape}, {'training' if self.training else 'evaluation'}, per "
            f"{'sample' if self.per_sample else 'batch'}",
            "ReLU" if self.relu else "",
            self.rule if self.rule != "sample" else "",
            self.layout if self.layout != "contiguous" else "",
            "" if self.affine else "no gain and bias",
            "expanded gradient" if self.expanded_dy else "",
            f"mean {self.mean}" if self.mean else "",
        ]
        return ", ".join(part for part in how if part)


def norm_cases() -> list[NormCase]:
    """The cases: difficult shapes in both modes with either draw; then layouts, rules and gradients on one shape of
    each kind.
    """
    both = (False, True)
    cases = [NormCase(shape, training, per_sample) for shape in NORM_SHAPES for training in both for per_sample in both]
    for shape in NORM_SHAPES:
        if len(shape) == 4:
            cases += [
                NormCase(shape, training, per_sample, layout="channels_last")
                for training in both
                for per_sample in both
            ]
    images, vectors = (3, 20, 5, 7), (33, 20)
    for training, per_sample in itertools.product(both, both):
        for layout in ("contiguous", "channels_last", "sliced"):
            cases.append(NormCase(images, training, per_sample, layout=layout, expanded_dy=True))
            cases.append(NormCase(images, training, per_sample, relu=False, layout=layout))
        cases.append(NormCase(images, training, per_sample, affine=False))
        cases.append(NormCase(vectors, training, per_sample, relu=False))
    cases += [
        NormCase(images, training, True, rule=rule) for training in both for rule in ("paper", "median", "binary")
    ]
    cases += [NormCase(images, relu=False, layout=layout, mean=100.0) for layout in ("contiguous", "channels_last")]
    return cases


NormData = tuple[dict[str, Tensor], tuple[Tensor, Tensor], Tensor, Tensor]


def norm_data(case: NormCase, dtype: torch.dtype, generator: torch.Generator) -> NormData:
    """(data, (running mean, running variance), dy, seed) of a case; x and dy are rounded to ``dtype``."""
    seed = torch.randint(0, 2**63 - 1, (1,), generator=generator)
    channels = case.shape[1]
    data = {
        "x": (torch.randn(case.shape, generator=generator) + case.mean).to(dtype),
        "gate": torch.randn(channels, generator=generator),
    }
    if case.affine:
        data |= {name: torch.randn(channels, generator=generator) for name in ("weight", "bias")}
    running = torch.randn(channels, generator=generator), torch.rand(channels, generator=generator) + 0.5
    dy = (
        torch.ones((), dtype=dtype).expand(case.shape)
        if case.expanded_dy
        else torch.randn(case.shape, generator=generator).to(dtype)
    )
    return data, running, dy, seed


def verify(row: Row, dtype: torch.dtype) -> Row:
    """Run every case of a row in ``dtype``, add the comparisons with the reference to ``row``, and return it."""
    generator = torch.Generator().manual_seed(3)
    for index, case in enumerate(norm_cases()):
        given = norm_data(case, dtype, generator)
        if row.has(index):
            verify_case(row, case, dtype, given)
    return row


def verify_case(row: Row, case: NormCase, dtype: torch.dtype, given: NormData) -> None:
    """Run one case and add its comparisons to ``row``; ``given``: the result of :func:`norm_data`."""
    data, running, dy, seed = given

    def once(kind: torch.dtype, affine: dict[str, Tensor], gradient: Tensor) -> dict[str, Tensor]:
        """The results of the reference in dtype ``kind``."""
        return norm_once(None, kind, "cpu", case, affine, running, gradient, seed)

    out = norm_once(row.backend, dtype, row.device, case, data, running, dy, seed)
    compare_all(row, str(case), out, Expected(row, dtype, once, data, dy, keep=("x",)), dtype)


def norm_once(
    backend: names.Backend | None,
    dtype: torch.dtype,
    device: str,
    case: NormCase,
    data: dict[str, Tensor],
    running: tuple[Tensor, Tensor],
    dy: Tensor,
    seed: Tensor,
) -> dict[str, Tensor]:
    """y, every gradient and the running statistics of a case, by name; ``backend`` None: autograd on the reference."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    leaves = {
        name: t.to(device, dtype if name == "x" else wide).detach().clone().requires_grad_() for name, t in data.items()
    }
    running = tuple(t.to(device, wide, copy=True) for t in running)  # type: ignore[assignment]
    x, seed, spec = leaves["x"], seed.to(device), hard_concrete(case.rule)
    if case.layout == "channels_last":
        x = x.contiguous(memory_format=torch.channels_last)
    elif case.layout == "sliced":
        x = x.repeat_interleave(2, -1)[..., ::2]
    affine = leaves.get("weight"), leaves.get("bias")
    with on_backend(backend):
        if backend is not None:
            how: dict[str, Any] = {
                "training": case.training,
                "per_sample": case.per_sample,
                "activation": "relu" if case.relu else None,
                "seed": seed,
                "spec": spec,
            }
            y = functional.gated_batch_norm(x, leaves["gate"], *affine, *running, **how)
        else:
            statistics = None if case.training else running
            per_sample = case.per_sample and case.rule == "sample"
            y = reference.norm_gate(x, *affine, leaves["gate"], seed, statistics, 1e-5, spec, per_sample, case.relu)
            if case.training:
                torch.nn.functional.batch_norm(x.detach(), *running, training=True)
        y.backward(upstream(dy, dtype, device))
    grads = {f"d{name}": torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for name, leaf in leaves.items()}
    return {"y": y.detach(), **grads, "running_mean": running[0], "running_var": running[1]}
