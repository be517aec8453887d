"""The generator of Dep-L0 in one program against float64: values and all gradients,
for widths around the tile and every depth.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import pytest
import torch

from dampr import ops, reference
from dampr.gates import DependencyGenerator
from dampr.ops import backend_triton as backend
from dampr.testing import assert_close

LIMIT = math.log(100.0)
WIDTHS = [(1, 1), (3, 5), (5, 7, 3), (64, 64, 64), (65, 1, 129, 63), (16, 16, 16, 32, 32, 64), (130, 200)]


def parameters(widths: tuple[int, ...]) -> list[torch.Tensor]:
    """W_1, b_1, W_2, ... with pre-activations on both sides of 0 and in the bend of tanh."""
    made = []
    for before, after in itertools.pairwise(widths):
        made += [torch.randn(after, before) / (4 * before) ** 0.5, torch.randn(after)]
    return made


def flat(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    return torch.cat([t.reshape(-1) for t in tensors])


def by_autograd(tensors: list[torch.Tensor], upstream: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    leaves = [t.detach().clone().requires_grad_() for t in tensors]
    values = torch.cat(reference.dependency_generator(leaves, LIMIT))
    return values.detach(), flat(torch.autograd.grad(values, leaves, upstream))


@pytest.mark.parametrize("widths", WIDTHS, ids=str)
def test_matches_float64(widths: tuple[int, ...]) -> None:
    draws = []
    for _ in range(16 if max(widths) < 16 else 1):  # on a handful of numbers PyTorch is exact by luck now and then
        tensors, upstream = parameters(widths), torch.randn(sum(widths[1:]))
        values = backend.dependency_generator_fwd(tensors, LIMIT)
        grads = flat(backend.dependency_generator_bwd(tensors, values, upstream, LIMIT))
        draws.append(
            (
                values,
                grads,
                *by_autograd([t.double() for t in tensors], upstream.double()),
                *by_autograd(tensors, upstream),
            )
        )
    values, grads, *truths = (torch.cat(pieces) for pieces in zip(*draws, strict=True))
    for name, got, exact, plain in zip(("values", "grads"), (values, grads), truths[:2], truths[2:], strict=True):
        assert_close(name, got, exact, plain)


def test_layouts_that_are_not_contiguous() -> None:
    tensors, upstream = parameters((6, 9, 4)), torch.ones(()).expand(13)
    odd = [torch.stack((t, t), -1)[..., 0] for t in tensors]
    values = backend.dependency_generator_fwd(odd, LIMIT)
    assert torch.equal(values, backend.dependency_generator_fwd(tensors, LIMIT))
    grads = flat(backend.dependency_generator_bwd(odd, values, upstream, LIMIT))
    assert torch.equal(grads, flat(backend.dependency_generator_bwd(tensors, values, torch.ones(13), LIMIT)))


def test_a_saturated_generator_is_at_its_limit_and_not_a_number_stays_visible() -> None:
    weight, bias = torch.zeros(4, 2), torch.tensor([1e30, -1e30, 0.0, float("nan")])
    values = backend.dependency_generator_fwd([weight, bias], LIMIT)
    assert values[:3].tolist() == pytest.approx([LIMIT, -LIMIT, 0.0])
    assert values[3].isnan()
    grads = flat(backend.dependency_generator_bwd([weight, bias], values, torch.ones(4), LIMIT))
    assert grads[-4:-1].tolist() == pytest.approx([0.0, 0.0, LIMIT], abs=1e-5)
    assert grads[-1].isnan()


def test_the_generator_of_resnet56_is_one_launch_in_each_direction(monkeypatch: pytest.MonkeyPatch) -> None:
    """28 layers of gates, 47,104 parameters; that of VGG16, with 1.6 million, is left to torch's products."""
    counted: list[str] = []
    launch = backend.dependency_generator.host.launch
    monkeypatch.setattr(
        backend.dependency_generator.host,
        "launch",
        lambda kernel, *args, **how: (counted.append(str(kernel)), launch(kernel, *args, **how)),
    )
    generator = DependencyGenerator([*[16] * 10, *[32] * 9, *[64] * 9])
    with ops.backend("triton"):
        log_alphas = generator()
        assert len(counted) == 1
        torch.cat([gate.log_alpha for gate in generator.gates()]).sum().backward()
    assert len(counted) == 2
    for made, expected in zip(
        log_alphas, reference.dependency_generator(list(generator.parameters()), LIMIT), strict=True
    ):
        torch.testing.assert_close(made, expected, rtol=1e-5, atol=1e-5)
    with torch.device("meta"):
        large = DependencyGenerator([64, 64, 128, 128, 256, 256, 256, *[512] * 6])
    assert (
        sum(p.numel() for p in large.parameters())
        > backend.GENERATOR_PARAMETERS
        > sum(p.numel() for p in generator.parameters())
    )
