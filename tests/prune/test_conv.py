"""Convolutions and norms through convert and compact: where gates go, what is exact, what is counted."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import dampr
from dampr.nn import GatedBatchNorm1d, GatedBatchNorm2d, GatedConv2d, GatedLayerNorm, GatedLinear


class Block(nn.Module):
    """A residual block as ResNet has it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(x + self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x))))))


class ResNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.blocks, self.head = nn.Sequential(Block(8), Block(8)), nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.blocks(torch.relu(self.norm(self.stem(x)))).mean((2, 3)))


class PreActivation(nn.Module):
    """Norms read the residual stream; a width inside the block has a norm of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.bn1, self.conv1 = nn.BatchNorm2d(8), nn.Conv2d(8, 12, 3, padding=1)
        self.bn2, self.conv2 = nn.BatchNorm2d(12), nn.Conv2d(12, 8, 3, padding=1)
        self.head = nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        x = x + self.conv2(torch.relu(self.bn2(self.conv1(torch.relu(self.bn1(x))))))
        return self.head(x.mean((2, 3)))


class Separable(nn.Module):
    """A depthwise convolution between two pointwise ones (MobileNet)."""

    def __init__(self) -> None:
        super().__init__()
        self.expand, self.bn1 = nn.Conv2d(3, 12, 1), nn.BatchNorm2d(12)
        self.depthwise, self.bn2 = nn.Conv2d(12, 12, 3, padding=1, groups=12, bias=False), nn.BatchNorm2d(12)
        self.project, self.head = nn.Conv2d(12, 6, 1), nn.Linear(6, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.bn1(self.expand(x)))
        return self.head(torch.relu(self.project(torch.relu(self.bn2(self.depthwise(x))))).mean((2, 3)))


def lenet() -> nn.Sequential:
    features = [
        nn.Conv2d(1, 6, 5),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(6, 10, 5),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
    ]
    return nn.Sequential(*features, nn.Linear(160, 20), nn.ReLU(), nn.Linear(20, 5))


IMAGES = torch.randn(4, 3, 9, 8, generator=torch.Generator().manual_seed(3))
DIGITS = torch.randn(4, 1, 28, 28, generator=torch.Generator().manual_seed(3))


def trained(model: nn.Module, x: torch.Tensor) -> nn.Module:
    """Statistics, gains and biases as after some training."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.weight)
            nn.init.normal_(module.bias)
    for _ in range(3):
        model.train()(x)
    return model.eval()


def close_at_random(model: nn.Module, share: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for gate in {layer.gate for layer in dampr.prune.gated_layers(model).values()}:
        with torch.no_grad():
            closed = torch.rand(gate.log_alpha.shape, generator=generator) < share
            gate.log_alpha.copy_(
                torch.where(closed, -5.0, torch.rand(gate.log_alpha.shape, generator=generator) * 6 - 2)
            )


def relative_gap(model: nn.Module, small: nn.Module, x: torch.Tensor) -> float:
    with torch.no_grad():
        masked, compacted = model.eval()(x), small.eval()(x)
    return float((masked - compacted).abs().max() / masked.abs().max())


@pytest.mark.parametrize("build", [lenet, ResNet, PreActivation, Separable])
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("tie", [True, False])
def test_masked_equals_compacted(build, seed, tie) -> None:
    torch.manual_seed(seed)
    x = DIGITS if build is lenet else IMAGES
    dense = trained(build(), x)
    before = dense(x)
    model = dampr.convert(dense, example_inputs=x, tie=tie)
    assert torch.equal(model(x), before)
    close_at_random(model, 0.5, seed)
    small = dampr.compact(model, example_inputs=x)
    assert relative_gap(model, small, torch.randn_like(x)) <= 1e-5
    assert not [m for m in small.modules() if type(m).__module__.startswith("dampr")]
    assert dampr.prune.measure.count_params(small) < dampr.prune.measure.count_params(model)


def test_output_gates_move_into_the_norm_that_follows() -> None:
    model = dampr.convert(ResNet(), example_inputs=IMAGES)
    kinds = {name: type(layer) for name, layer in dampr.prune.gated_layers(model).items()}
    assert set(kinds) == {"norm", "blocks.0.bn1", "blocks.0.bn2", "blocks.1.bn1", "blocks.1.bn2"}
    assert set(kinds.values()) == {GatedBatchNorm2d}
    stream = {model.norm.gate, model.blocks[0].bn2.gate, model.blocks[1].bn2.gate}
    assert len(stream) == 1, "what is added up shares one gate vector"
    assert model.blocks[0].bn1.gate not in stream
    assert model.norm.weights_per_gate == 3 * 9 + 1 + 2
    assert model.dampr_skipped == {"head": "its outputs are the model's own"}
    assert all(p in set(model.parameters()) for p in model.norm.gate.parameters())


def test_a_residual_stream_shrinks_as_one_width() -> None:
    model = trained(dampr.convert(ResNet(), example_inputs=IMAGES), IMAGES)
    with torch.no_grad():
        model.norm.gate.log_alpha[:5] = -5.0
        model.blocks[0].bn1.gate.log_alpha[2:] = -5.0
    small = dampr.compact(model, example_inputs=IMAGES)
    assert (small.stem.out_channels, small.norm.num_features, small.head.in_features) == (3, 3, 3)
    assert (
        small.blocks[0].conv1.in_channels,
        small.blocks[0].conv1.out_channels,
        small.blocks[0].conv2.out_channels,
    ) == (3, 2, 3)
    assert not small.dampr_manifest["closed_but_kept"]


def test_why_gates_sit_after_the_norm() -> None:
    """Closed before the norm a channel is a constant after it, which no bias makes up for at a padded border;
    closed after it, it is 0.
    """
    torch.manual_seed(0)

    def network() -> nn.Sequential:
        return nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.Conv2d(8, 4, 3, padding=1),
            nn.Flatten(),
            nn.Linear(288, 3),
        )

    dense = trained(network(), IMAGES)
    nn.init.constant_(dense[1].bias, 1.0)
    before = nn.Sequential(GatedConv2d.from_dense(dense[0]), *list(dense)[1:]).eval()
    after = nn.Sequential(dense[0], GatedBatchNorm2d.from_dense(dense[1]), *list(dense)[2:]).eval()
    for gate in (before[0].gate, after[1].gate):
        with torch.no_grad():
            gate.log_alpha[:3] = -5.0

    def cut(model: nn.Sequential, fold: bool) -> torch.Tensor:
        """Channels 0 to 2 removed by hand, their constants in the middle of the image folded into the next bias,
        or dropped.
        """
        hidden = model[2](model[1](model[0](IMAGES)))
        rest = nn.Conv2d(5, 4, 3, padding=1)
        with torch.no_grad():
            rest.weight.copy_(model[3].weight[:, 3:])
            constants = hidden[0, :3, 4, 4] if fold else torch.zeros(3)
            rest.bias.copy_(model[3].bias + (model[3].weight[:, :3].sum((2, 3)) * constants).sum(1))
        return model[5](model[4](rest(hidden[:, 3:])))

    with torch.no_grad():
        gap = {fold: float((before(IMAGES) - cut(before, fold)).abs().max()) for fold in (False, True)}
        exact = float((after(IMAGES) - cut(after, False)).abs().max())
    assert gap[False] > 1e-2
    assert gap[True] > 1e-2, "the border still differs"
    assert exact < 1e-6
    stays = dampr.compact(before, example_inputs=IMAGES)
    assert stays[0].out_channels == 8
    assert "padded border" in stays.dampr_manifest["closed_but_kept"]["0"]
    assert dampr.compact(after, example_inputs=IMAGES)[0].out_channels == 5


def test_a_constant_folds_where_nothing_is_padded() -> None:
    torch.manual_seed(0)
    layers = [GatedConv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3), nn.Flatten(), nn.Linear(80, 3)]
    model = trained(nn.Sequential(*layers), IMAGES)
    with torch.no_grad():
        model[0].gate.log_alpha[:3] = -5.0
    small = dampr.compact(model, example_inputs=IMAGES)
    assert small[0].out_channels == 5
    assert relative_gap(model, small, torch.randn_like(IMAGES)) <= 1e-5


def test_depthwise_convolutions_follow_the_layer_before() -> None:
    model = trained(dampr.convert(Separable(), example_inputs=IMAGES), IMAGES)
    assert "depthwise" in model.dampr_skipped["depthwise"]
    with torch.no_grad():
        model.bn1.gate.log_alpha[:7] = -5.0
    small = dampr.compact(model, example_inputs=IMAGES)
    assert (
        small.expand.out_channels,
        small.depthwise.groups,
        small.depthwise.in_channels,
        small.project.in_channels,
    ) == (5, 5, 5, 5)


def test_linear_layers_and_norms_of_vectors() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
    x = torch.randn(9, 6)
    model = trained(dampr.convert(model, example_inputs=x), x)
    assert isinstance(model[1], GatedBatchNorm1d)
    assert isinstance(model[3], GatedLinear)
    with torch.no_grad():
        model[1].gate.log_alpha[:4] = -5.0
    assert dampr.compact(model, example_inputs=x)[0].out_features == 4


def test_convolutions_and_norms_need_example_inputs() -> None:
    model = ResNet()
    with pytest.raises(ValueError, match="example_inputs=None: expected them.*'stem'"):
        dampr.convert(model)
    assert type(model.stem) is nn.Conv2d
    assert isinstance(dampr.convert(lenet())[0], GatedConv2d)


@pytest.mark.parametrize("granularity", ["input", "weight", (2, 2)])
def test_other_granularities_stay_in_the_convolution(granularity) -> None:
    model = ResNet().eval()
    before = model(IMAGES)
    dampr.convert(model, granularity=granularity, example_inputs=IMAGES)
    assert isinstance(model.stem, GatedConv2d)
    assert type(model.norm) is nn.BatchNorm2d
    assert torch.equal(model(IMAGES), before)


@pytest.mark.parametrize("build", [lenet, ResNet])
def test_macs_and_parameters_are_those_of_the_sizes_that_are_left(build) -> None:
    """Active inputs times active outputs times kernel positions times output positions, by hand,
    and by torch's flop counter.
    """
    x = (DIGITS if build is lenet else IMAGES)[:1]
    model = trained(dampr.convert(build(), example_inputs=x), x if build is lenet else IMAGES)
    close_at_random(model, 0.5, 1)
    small = dampr.compact(model, example_inputs=x)
    sizes: dict[str, torch.Size] = {}
    hooks = [
        m.register_forward_hook(lambda m, a, out, n=n: sizes.__setitem__(n, out.shape))
        for n, m in small.named_modules()
    ]
    small(x)
    for hook in hooks:
        hook.remove()
    macs = params = 0
    for name, layer in small.named_modules():
        if isinstance(layer, nn.Conv2d):
            macs += (
                layer.in_channels
                * layer.out_channels
                * layer.kernel_size[0]
                * layer.kernel_size[1]
                * sizes[name][2]
                * sizes[name][3]
            )
            params += (
                layer.in_channels * layer.out_channels * layer.kernel_size[0] * layer.kernel_size[1]
                + (layer.bias is not None) * layer.out_channels
            )
        elif isinstance(layer, nn.Linear):
            macs += layer.in_features * layer.out_features
            params += layer.in_features * layer.out_features + layer.out_features
        elif isinstance(layer, nn.BatchNorm2d):
            params += 2 * layer.num_features
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        small(x)
    assert counter.get_total_flops() == 2 * macs
    report = dampr.summary(model, example_inputs=x)
    assert (report.macs_compacted, report.params_compacted) == (macs, params)


def test_a_failed_conversion_puts_weights_and_layers_back(monkeypatch) -> None:
    import importlib

    convert = importlib.import_module("dampr.prune.convert")
    model = ResNet().eval()
    before, values = {n: id(m) for n, m in model.named_modules()}, {n: p.clone() for n, p in model.named_parameters()}

    def fail(*_: object) -> None:
        raise convert.ConversionError("made up")

    monkeypatch.setattr(convert, "check_called", fail)
    with pytest.raises(convert.ConversionError, match="made up"):
        dampr.convert(model, example_inputs=IMAGES)
    assert {n: id(m) for n, m in model.named_modules()} == before
    assert all(torch.equal(p, values[n]) for n, p in model.named_parameters())


def test_a_saved_convolutional_model_comes_back(tmp_path) -> None:
    model = trained(dampr.convert(ResNet(), example_inputs=IMAGES), IMAGES)
    close_at_random(model, 0.5, 2)
    small = dampr.compact(model, example_inputs=IMAGES)
    dampr.save(small, tmp_path / "small.safetensors")
    again = dampr.load(tmp_path / "small.safetensors", ResNet())
    assert torch.equal(again.eval()(IMAGES), small.eval()(IMAGES))


def test_layernorm_gates_close_features_exactly() -> None:
    dense = nn.LayerNorm(6).eval()
    gated = GatedLayerNorm.from_dense(dense).eval()
    x = torch.randn(3, 4, 6)
    assert torch.equal(gated(x), dense(x))
    with torch.no_grad():
        gated.gate.log_alpha[:2] = -5.0
    assert gated(x)[..., :2].eq(0).all()
    torch.testing.assert_close(gated.to_dense()(x), gated(x))


def test_a_norm_that_took_in_its_activation_is_cut_as_well() -> None:
    torch.manual_seed(0)
    layers = [
        nn.Conv2d(3, 8, 3, padding=1),
        GatedBatchNorm2d(8, activation="relu"),
        nn.Conv2d(8, 4, 3),
        nn.Flatten(),
        nn.Linear(168, 3),
    ]
    model = trained(nn.Sequential(*layers), IMAGES)
    with torch.no_grad():
        model[1].gate.log_alpha[:3] = -5.0
    small = dampr.compact(model, example_inputs=IMAGES)
    assert small[0].out_channels == 5
    assert relative_gap(model, small, torch.randn_like(IMAGES)) <= 1e-5


def test_every_layer_can_have_a_lambda_of_its_own() -> None:
    model = dampr.convert(lenet())
    layers = dampr.prune.gated_layers(model)
    expected = sum(layer.penalty(10.0 if name in "03" else 0.5, 0.1) for name, layer in layers.items())
    torch.testing.assert_close(dampr.penalty(model, lam={"[03]": 10.0, "*": 0.5}, prior_precision=0.1), expected)
    with pytest.raises(ValueError, match=r"lam=\{'\[03\]': 1.0\}: expected a glob that matches the gated layer '7'"):
        dampr.penalty(model, lam={"[03]": 1.0})
