"""A draw can be held, and gates can have a generator of their own that nothing else moves."""

from __future__ import annotations

import copy
import functools
import pickle
from typing import Any

import pytest
import torch
from functorch.compile import min_cut_rematerialization_partition, nop
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch._inductor.fx_passes.post_grad import remove_noop_ops
from torch.nn import functional as F
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

import dampr
from dampr import gates
from dampr import nn as gated
from dampr.gates import draws

X = torch.randn(6, 8, generator=torch.Generator().manual_seed(1))
DRAWING: dict[str, Any] = {
    "hard_concrete": "hard_concrete",
    "dep_l0": lambda n, device=None: gates.DependencyGenerator([n], bias_init=0.0, device=device).gates()[0],
    "diffprune": lambda n, device=None: gates.DiffPrune(n, stochastic=True, init_phi=0.05, device=device),
}


def layer(gate: Any = "hard_concrete", **how: Any) -> gated.GatedLinear:
    torch.manual_seed(0)
    made = gated.GatedLinear(8, 16, gate=gate, **how)
    if hasattr(made.gate, "log_alpha") and gate == "hard_concrete":
        made.gate.log_alpha.data.zero_()
    return made


def network(**how: Any) -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(
        gated.GatedLinear(8, 16, **how), nn.ReLU(), gated.GatedLinear(16, 8, **how), nn.ReLU(), nn.Linear(8, 2)
    )
    for module in model.modules():
        if isinstance(module, gates.HardConcrete):
            module.log_alpha.data.zero_()
    return model


@pytest.mark.parametrize("name", DRAWING)
def test_a_held_draw_is_the_same_in_every_call_and_gone_after_the_block(name: str) -> None:
    made = layer(DRAWING[name])
    with torch.no_grad():
        with dampr.hold_draws(made):
            first, second = made(X), made(X)
            made.eval()(X)
            third = made.train()(X[:3])
        after = made(X)
    assert torch.equal(first, second)
    torch.testing.assert_close(first[:3], third)
    assert not torch.equal(first, after)


@pytest.mark.parametrize(
    "build",
    [
        layer,
        lambda **how: gated.GatedActivation(8, per_sample=True),
        lambda **how: gated.GatedBatchNorm1d(8, per_sample=True),
    ],
)
def test_rows_have_the_same_gates_in_calls_of_as_many_rows(build: Any) -> None:
    made = build(per_sample=True)
    made.gate.log_alpha.data.zero_()
    with torch.no_grad(), dampr.hold_draws(made):
        y = made(X)
        assert torch.equal(y, made(X))
    assert len({tuple(row) for row in (y == 0).tolist()}) > 1


def test_micro_batches_under_a_held_draw_have_the_gradient_of_the_batch() -> None:
    model = network()
    with dampr.hold_draws(model):
        model(X).square().sum().backward()
        whole = [p.grad.clone() for p in model.parameters()]
        model.zero_grad()
        for part in X.split(2):
            model(part).square().sum().backward()
    for p, expected in zip(model.parameters(), whole, strict=True):
        torch.testing.assert_close(p.grad, expected)


def test_an_inner_block_keeps_the_draw_and_an_exception_ends_the_outer_one() -> None:
    made = layer()

    def fail() -> None:
        with dampr.hold_draws(made), torch.no_grad():
            first = made(X)
            with dampr.hold_draws(made):
                assert torch.equal(made(X), first)
            assert torch.equal(made(X), first)
            assert copy.deepcopy(made).gate._held is None
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert not torch.equal(made(X), made(X))
    with pytest.raises(TypeError, match=r"^model=3: expected a torch.nn.Module$"), dampr.hold_draws(3):
        pass


def test_a_budget_that_owns_the_gates_leaves_them_held_and_numbered() -> None:
    owned = gates.OwnedGate(gates.HardConcrete(64, init_log_alpha=0.0))
    dampr.gate_generator(owned, seed=2)
    with torch.no_grad(), dampr.hold_draws(owned):
        first = owned()
        assert torch.equal(owned(), first)
    with torch.no_grad():
        assert not torch.equal(owned(), first)
    assert "next_seed" in owned.state_dict()


def run(model: nn.Module, steps: range, optimizer: torch.optim.Optimizer, noise: int = 0) -> list[float]:
    """Training with ``noise`` random numbers of augmentation in each step that change nothing but the global
    generator.
    """
    losses = []
    for step in steps:
        if noise:
            torch.rand(noise)
        loss = F.cross_entropy(model(X + step * 0.01), torch.arange(6) % 2)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def test_augmentation_does_not_change_masks_that_have_a_generator() -> None:
    found = []
    for noise in (0, 7):
        model = dampr.gate_generator(network(), seed=5)
        found.append(run(model, range(4), torch.optim.SGD(model.parameters(), 0.1), noise))
    other = dampr.gate_generator(network(), seed=6)
    assert found[0] == found[1]
    assert run(other, range(4), torch.optim.SGD(other.parameters(), 0.1)) != found[0]


def test_gates_with_a_generator_take_nothing_from_the_global_one() -> None:
    model = dampr.gate_generator(network(), seed=5)
    before = torch.get_rng_state()
    model(X).sum().backward()
    assert torch.equal(before, torch.get_rng_state())


def test_a_run_resumes_to_the_bit() -> None:
    model = dampr.gate_generator(network(), seed=5)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    run(model, range(3), optimizer)
    state = copy.deepcopy(model.state_dict())
    expected = run(model, range(3, 6), optimizer)
    resumed = dampr.gate_generator(network(), seed=0)
    resumed.load_state_dict(state)
    torch.rand(3)
    assert run(resumed, range(3, 6), torch.optim.SGD(resumed.parameters(), 0.1)) == expected


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_goes_on_where_the_original_was(copied: Any) -> None:
    model = dampr.gate_generator(network())
    model(X)
    twin = copied(model)
    assert torch.equal(twin(X), model(X))
    twin(X)
    assert not torch.equal(twin(X), model(X))


def test_gates_of_one_generator_draw_independently_and_anew_in_each_call() -> None:
    model = dampr.gate_generator(nn.ModuleList(gates.HardConcrete(4096, init_log_alpha=0.0) for _ in range(2)))
    with torch.no_grad():
        drawn = torch.stack([gate() for gate in model for _ in range(3)])
    correlation = torch.corrcoef(drawn) - torch.eye(6)
    assert correlation.abs().max() < 0.07  # 4.5 standard deviations


def test_without_gates_that_draw_there_is_nothing_to_generate() -> None:
    with pytest.raises(ValueError, match=r"^model=Linear: it has no gates that draw"):
        dampr.gate_generator(nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"^seed=-1: expected None or an int in \[0, 2\*\*63\)$"):
        dampr.gate_generator(layer(), seed=-1)
    model = dampr.gate_generator(layer(), seed=1)
    assert "next_seed" not in dict(dampr.gate_generator(model, seed=None).gate.named_buffers())


class Checkpointed(nn.Module):
    """One gated layer called twice in each of two regions, and once without,
    with another region inside of the second.
    """

    def __init__(self, reentrant: bool | None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.inner, self.reentrant = gated.GatedLinear(8, 8), gated.GatedLinear(8, 8), reentrant
        for part in (self.layer, self.inner):
            part.gate.log_alpha.data.zero_()

    def maybe(self, function: Any, x: torch.Tensor) -> torch.Tensor:
        return function(x) if self.reentrant is None else checkpoint(function, x, use_reentrant=self.reentrant)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.maybe(lambda t: self.layer(self.layer(t).sin()).cos(), x)
        x = self.layer(x).tanh()
        return self.maybe(
            lambda t: self.layer(self.maybe(lambda s: self.inner(self.inner(s).sin()).tanh(), t)).sin(), x
        )


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("held", [False, True])
def test_a_checkpointed_region_draws_again_what_it_drew(reentrant: bool, held: bool) -> None:
    found = []
    for how in (None, reentrant):
        model = dampr.gate_generator(Checkpointed(how), seed=3)
        x = X.clone().requires_grad_()
        with dampr.hold_draws(model if held else nn.Identity()):
            losses = [model(x * scale).square().sum() for scale in (1.0, 2.0)]  # two graphs at once
            losses[0].backward(retain_graph=True)
            losses[1].backward()
            losses[0].backward()
        model(x).sum().backward()
        found.append([p.grad for p in (*model.parameters(), x)])
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("kept", [(), ("mm", "next_seed"), ("add_", "sub", "clone")])
def test_selective_checkpointing_draws_again_what_it_drew(kept: tuple[str, ...]) -> None:
    def policy(_: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        keep = any(name in str(op) for name in kept)
        return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE

    contexts = functools.partial(create_selective_checkpoint_contexts, policy)
    model = dampr.gate_generator(Regions(None), seed=3)
    twin = copy.deepcopy(model)
    for net, how in ((model, {"context_fn": contexts}), (twin, {})):
        for scale in (1.0, 2.0):
            checkpoint(net.layer, X * scale, use_reentrant=False, **how).sin().add_(1).square().sum().backward()
    torch.testing.assert_close([p.grad for p in model.layer.parameters()], [p.grad for p in twin.layer.parameters()])
    assert torch.equal(model.layer.gate.next_seed, twin.layer.gate.next_seed)


class Regions(nn.Module):
    """Gated layers in a checkpointed region, which has another region inside where torch can tell them apart."""

    def __init__(self, reentrant: bool | None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.inner, self.reentrant = gated.GatedLinear(8, 8), gated.GatedLinear(8, 8), reentrant
        for part in (self.layer, self.inner):
            part.gate.log_alpha.data.zero_()

    def outer(self, x: torch.Tensor) -> torch.Tensor:
        def both(t: torch.Tensor) -> torch.Tensor:
            return self.inner(self.layer(t).sin())

        return self.layer(both(x) if self.reentrant else self.maybe(both, x)).cos()

    def maybe(self, function: Any, x: torch.Tensor) -> torch.Tensor:
        return function(x) if self.reentrant is None else checkpoint(function, x, use_reentrant=self.reentrant)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.maybe(self.outer, x)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("generator", [False, True])
def test_regions_of_a_held_draw_have_it_again_wherever_their_backward_is(generator: bool, reentrant: bool) -> None:
    """In the block, behind it, in the block of another draw; one that was not held is not, where a draw is held."""
    found = []
    for how in (None, reentrant):
        model = Regions(how)
        if generator:
            dampr.gate_generator(model, seed=3)
        torch.manual_seed(1)
        x = X.clone().requires_grad_()
        free = model(x).square().sum()
        with dampr.hold_draws(model):
            inside, behind, later = (model(x * scale).square().sum() for scale in (1.0, 2.0, 3.0))
            inside.backward()
            free.backward()
        behind.backward()
        with dampr.hold_draws(model):
            other = model(x).square().sum()
            later.backward()
        grads = [p.grad.clone() for p in (*model.parameters(), x)]
        other.backward()
        found.append([*grads, *(p.grad for p in (*model.parameters(), x))])
    torch.testing.assert_close(*found)


def test_regions_of_a_bank_have_its_draw_again_behind_the_block() -> None:
    found = []
    for how in (None, False):
        model, x = Regions(how), X.clone().requires_grad_()
        bank = dampr.GateBank(model)
        torch.manual_seed(1)
        with bank.draw():
            loss = model(x).square().sum() + bank.penalty(1e-2)
        with bank.draw():
            later = model(x * 2).square().sum()
            loss.backward()
        later.backward()
        found.append([p.grad for p in (*model.parameters(), x)])
    torch.testing.assert_close(*found)


def test_a_reentrant_region_of_a_bank_is_refused_in_words() -> None:
    model = Regions(True)
    bank = dampr.GateBank(model)
    with bank.draw():
        loss = model(X.clone().requires_grad_()).sum()
    with pytest.raises(RuntimeError, match="^a reentrant checkpoint repeats a draw of a GateBank: expected use_reen"):
        loss.backward()


def test_a_bank_follows_a_held_draw_and_a_generator() -> None:
    model = Regions(None)
    bank = dampr.GateBank(model)

    def drawn() -> torch.Tensor:
        with bank.draw():
            return model(X).detach()

    with dampr.hold_draws(model):
        assert torch.equal(drawn(), drawn())
    assert not torch.equal(drawn(), drawn())
    found = []
    for noise in (0, 7):
        dampr.gate_generator(model, seed=5)
        torch.rand(noise)
        found.append(torch.stack([drawn(), drawn()]))
    assert torch.equal(*found)


def test_a_reentrant_region_too_far_back_is_refused_in_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(draws, "REENTRANT_KEPT", 3)
    model = dampr.gate_generator(Checkpointed(True), seed=3)
    loss = model(X.clone().requires_grad_()).sum()
    model(X.clone().requires_grad_())
    with pytest.raises(RuntimeError, match="more than 3 calls of its gate back: expected use_reentrant=False"):
        loss.backward()


def test_the_generator_works_within_transforms() -> None:
    model = dampr.gate_generator(layer(), seed=1)
    twin = copy.deepcopy(model)
    gradient = torch.func.grad(lambda x: model(x).square().sum())(X)
    x = X.clone().requires_grad_()
    twin(x).square().sum().backward()
    torch.testing.assert_close(gradient, x.grad)
    assert torch.equal(model.gate.next_seed, twin.gate.next_seed)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # dynamo's own
def test_a_compiled_layer_draws_what_an_eager_one_does() -> None:
    model = dampr.gate_generator(layer(), seed=1)
    twin = copy.deepcopy(model)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for _ in range(2):
        torch.testing.assert_close(compiled(X), twin(X))
    with dampr.hold_draws(model):
        assert torch.equal(compiled(X), compiled(X))


def partition_as_inductor(graph: Any, inputs: Any, **how: Any) -> Any:
    remove_noop_ops(graph.graph)
    return min_cut_rematerialization_partition(graph, inputs, **how)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # dynamo's own
@pytest.mark.parametrize("held", [False, True])
@pytest.mark.parametrize("region", ["none", "around", "within"])
def test_a_compiled_backward_has_the_gates_of_its_forward(region: str, held: bool) -> None:
    """Also where copies of inputs are left out and what is cheap is computed again, as in inductor, and in regions."""
    model = dampr.gate_generator(Regions(None), seed=1)
    twin = copy.deepcopy(model)
    torch._dynamo.reset()
    run: Any = (lambda t: checkpoint(model, t, use_reentrant=False)) if region == "within" else model
    run = torch.compile(run, fullgraph=True, backend=aot_autograd(fw_compiler=nop, partition_fn=partition_as_inductor))
    if region == "around":
        run = functools.partial(checkpoint, run, use_reentrant=False)
    if region == "within" and not held:
        with pytest.raises(RuntimeError, match="region within torch.compile .*: expected dampr.hold_draws"):
            run(X)
        return
    found = []
    for net, call in ((model, run), (twin, twin)):
        for _ in range(2):
            with dampr.hold_draws(net if held else nn.Identity()):
                losses = [call(X * scale).square().sum() for scale in (1.0, 2.0)]  # two graphs at once
                torch.stack(losses).sum().backward()
        found.append([p.grad for p in net.parameters()])
        found[-1].extend(net.buffers())
    torch.testing.assert_close(*found)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # dynamo's own
def test_a_reentrant_region_of_what_is_compiled_is_refused_in_words() -> None:
    model = dampr.gate_generator(layer(), seed=1)
    torch._dynamo.reset()
    y = checkpoint(torch.compile(model, backend="aot_eager"), X.clone().requires_grad_(), use_reentrant=True)
    with pytest.raises(RuntimeError, match="repeats a draw of a compiled model: expected use_reentrant=False"):
        y.sum().backward()


def test_the_next_seed_outlives_to_empty_and_the_meta_device() -> None:
    layer = dampr.gate_generator(dampr.nn.GatedLinear(4, 4), seed=3)
    first = int(layer.gate.next_seed)
    layer.gate()
    assert int(layer.to_empty(device="cpu").gate.next_seed) == first + 1
    meta = dampr.gate_generator(dampr.nn.GatedLinear(4, 4, device="meta"), seed=3)
    assert int(meta.to_empty(device="cpu").gate.next_seed) == first


def test_rows_from_an_offset_are_those_of_the_whole() -> None:
    gate = dampr.gates.HardConcrete(5, init_log_alpha=0.0)
    whole = dampr.functional.sample_gates(gate.log_alpha, seed=3, rows=9)
    for backend in ("reference", "auto"):
        with dampr.backend(backend):
            part = dampr.functional.sample_gates(gate.log_alpha, seed=3, rows=4, index_offset=5)
        torch.testing.assert_close(part, whole[5:])
    with pytest.raises(ValueError, match="index_offset=5: expected 0, because all rows have one draw"):
        dampr.functional.sample_gates(gate.log_alpha, seed=3, index_offset=5)
    with pytest.raises(ValueError, match="index_offset=-1: expected an integer of at least 0"):
        dampr.functional.sample_gates(gate.log_alpha, seed=3, rows=2, index_offset=-1)
