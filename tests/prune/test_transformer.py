"""convert and compact on models with attention and transformer layers: the same function, with every gate in it,
and plain in the end.
"""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from torch import nn

import dampr
from dampr.gates import HardConcrete
from dampr.nn import (
    GatedEmbedding,
    GatedLayer,
    GatedLinear,
    GatedMultiheadAttention,
    GatedResidual,
    GatedTransformerDecoderLayer,
    GatedTransformerEncoderLayer,
    PrunedMultiheadAttention,
    PrunedTransformerDecoderLayer,
    PrunedTransformerEncoderLayer,
)

E, H, D = 8, 4, 12
nested = pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype stage:UserWarning")
words = torch.randint(20, (3, 5), generator=torch.Generator().manual_seed(0))
padding = torch.zeros(3, 5, dtype=torch.bool)
padding[0, 3:] = True
causal = torch.ones(5, 5).triu(1).bool()


class Classifier(nn.Module):
    """Words in, one score for each class out, through torch's own encoder."""

    def __init__(self, norm_first: bool = False, layers: int = 2, **how: Any) -> None:
        super().__init__()
        self.embedding = nn.Embedding(20, E)
        layer = nn.TransformerEncoderLayer(E, H, D, dropout=0.1, batch_first=True, norm_first=norm_first, **how)
        self.encoder = nn.TransformerEncoder(layer, layers, enable_nested_tensor=not norm_first)
        self.head = nn.Linear(E, 3)

    def forward(self, x: torch.Tensor, padding: torch.Tensor | None = None) -> torch.Tensor:
        return self.head(self.encoder(self.embedding(x), src_key_padding_mask=padding).mean(1))


class Block(nn.Module):
    """A block of one's own around torch's attention; ``weights``: what it does with the attention weights."""

    def __init__(self, weights: str = "ignored", **how: Any) -> None:
        super().__init__()
        self.embedding = nn.Embedding(20, E)
        self.norm, self.attention = nn.LayerNorm(E), nn.MultiheadAttention(E, H, batch_first=True, **how)
        self.up, self.down, self.head = nn.Linear(E, D), nn.Linear(D, E), nn.Linear(E, 3)
        self.weights = weights

    def forward(self, x: torch.Tensor) -> Any:
        x = self.embedding(x)
        n = self.norm(x)
        y, weights = self.attention(n, n, n, need_weights=self.weights != "unneeded")
        x = x + y
        out = self.head(x + self.down(torch.relu(self.up(x))))
        return (out, weights) if self.weights == "returned" else out


def transformer(**how: Any) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return nn.Transformer(E, H, 2, 2, D, batch_first=True, **how)


MODELS: dict[str, tuple[Any, Any]] = {
    "encoder": (Classifier, words),
    "encoder, norm first": (lambda: Classifier(True), words),
    "encoder, padded": (Classifier, (words, padding)),
    "encoder, gelu, no bias": (lambda: Classifier(True, activation="gelu", bias=False), words),
    "transformer": (transformer, (torch.randn(3, 5, E), torch.randn(3, 4, E), None, causal[:4, :4])),
    "decoder layer": (
        lambda: nn.TransformerDecoderLayer(E, H, D, batch_first=True),
        (torch.randn(3, 5, E), torch.randn(3, 4, E)),
    ),
    "encoder layer": (lambda: nn.TransformerEncoderLayer(E, H, D), torch.randn(5, 3, E)),
    "block": (Block, words),
    "block, unneeded": (lambda: Block("unneeded", kdim=E, add_bias_kv=True, add_zero_attn=True), words),
}
every_model = pytest.mark.parametrize("name", MODELS)


def built(name: str) -> tuple[Any, Any]:
    torch.manual_seed(1)
    build, x = MODELS[name]
    model = build()
    for p in model.parameters():
        if p.dim() == 1:
            p.data.add_(0.3 * torch.randn_like(p))
    return model, x


def call(model: nn.Module, x: Any) -> Any:
    out = model(*x) if isinstance(x, tuple) else model(x)
    return out[0] if isinstance(out, tuple) else out


def close(model: nn.Module, share: float = 0.4, seed: int = 0, keep_one: bool = False) -> nn.Module:
    """Random gates closed, others open or in between; ``keep_one``: all but the last of each layer closed."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, HardConcrete):
            n = module.num_gates
            shut = torch.arange(n) < n - 1 if keep_one else torch.rand(n, generator=generator) < share
            module.log_alpha.data = torch.where(shut, -9.0, torch.rand(n, generator=generator) * 3)
    return model.eval()


def compacted(model: nn.Module, x: Any) -> Any:
    small = dampr.compact(model, example_inputs=x)
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            torch.testing.assert_close(call(small, x), call(model, x), rtol=1e-5, atol=1e-5)
    assert not any(isinstance(module, GatedLayer) for module in small.modules())
    return small


def gated(model: nn.Module) -> dict[str, str]:
    return {name: type(layer).__name__ for name, layer in dampr.prune.gated_layers(model).items()}


@nested
@every_model
@pytest.mark.parametrize("with_inputs", [False, True])
def test_convert_keeps_the_function_and_puts_gates_on_heads_and_neurons(name: str, with_inputs: bool) -> None:
    model, x = built(name)
    parameters = dict(model.named_parameters())
    before = call(model.eval(), x)
    with torch.no_grad():
        fused = call(model, x)
    assert dampr.convert(model, example_inputs=x if with_inputs else None) is model
    after = dict(model.named_parameters())
    assert all(after[n] is p for n, p in parameters.items())
    assert torch.equal(call(model, x), before)
    with torch.no_grad():
        torch.testing.assert_close(call(model, x), fused)
    found = gated(model)
    heads = [n for n, m in model.named_modules() if isinstance(m, nn.MultiheadAttention)]
    assert heads
    assert all(found[n] == "GatedMultiheadAttention" for n in heads)
    assert all(type(m) not in (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer) for m in model.modules())
    assert not any(n.endswith("linear2") for n in found)
    assert all(found[n] == "GatedLinear" for n, _ in model.named_modules() if n.endswith("linear1"))
    skipped = [why for n, why in model.dampr_skipped.items() if n.endswith("linear2")]
    assert all("its outputs have no gates: the residual stream" in why for why in skipped)
    assert bool(skipped) == (not name.startswith("block"))


@nested
@every_model
def test_every_gate_changes_the_output_also_where_torch_would_take_its_fused_path(name: str) -> None:
    model, x = built(name)
    dampr.convert(model, example_inputs=x)
    model.eval()
    for layer in dampr.prune.gated_layers(model).values():
        for gate in range(layer.gate.num_gates):
            with torch.no_grad():
                before = call(model, x)
                layer.gate.log_alpha[gate] = -9.0
                changed = not torch.equal(call(model, x), before)
                layer.gate.log_alpha[gate] = 3.0
            assert changed or isinstance(layer, GatedLinear), "a neuron may be off anyway"


@nested
@every_model
@pytest.mark.parametrize("seed", [0, 1, 2, "all but one"])
def test_masked_is_compacted(name: str, seed: int | str) -> None:
    model, x = built(name)
    dampr.convert(model, example_inputs=x)
    close(model, 0.4, 0 if isinstance(seed, str) else seed, keep_one=seed == "all but one")
    small = compacted(model, x)
    assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in model.parameters())
    layers = small.dampr_manifest["layers"]
    for n, layer in dampr.prune.gated_layers(model).items():
        if isinstance(layer, GatedMultiheadAttention) and layer.closed_heads() and len(layer.closed_heads()) < H:
            assert layers[n]["heads"] == {"before": H, "kept": sorted(set(range(H)) - layer.closed_heads())}
            assert type(small.get_submodule(n)) is PrunedMultiheadAttention
        elif n.endswith("linear1") and layer.closed_channels()[0]:
            left = layers[n]["out"]["kept"]
            assert left == sorted(set(range(D)) - layer.closed_channels()[0])
            assert small.get_submodule(n).out_features == len(left)
            assert layers[n.replace("linear1", "linear2")]["in"]["kept"] == left


@nested
def test_what_has_a_form_in_torch_takes_it() -> None:
    model, x = built("encoder, padded")
    dampr.convert(model, example_inputs=x, exclude=nn.MultiheadAttention)
    small = compacted(close(model), x)
    assert {type(layer) for layer in small.encoder.layers} == {nn.TransformerEncoderLayer}
    assert small.encoder.layers[0].linear1.out_features < D
    assert type(small.encoder.layers[0].self_attn) is nn.MultiheadAttention


@nested
def test_the_types_of_what_is_left() -> None:
    for name, kind in (
        ("encoder, padded", PrunedTransformerEncoderLayer),
        ("decoder layer", PrunedTransformerDecoderLayer),
    ):
        model, x = built(name)
        small = compacted(close(dampr.convert(model, example_inputs=x)), x)
        assert any(type(m) is kind for m in small.modules())
        assert type(small) is kind or type(small) is type(model)


@pytest.mark.parametrize("weights", ["ignored", "unneeded", "returned"])
def test_heads_stay_where_their_attention_weights_are_read(weights: str) -> None:
    model = Block(weights)
    dampr.convert(model, include="attention", example_inputs=words)
    close(model, keep_one=True)
    small = compacted(model, words)
    if weights == "returned":
        assert type(small.attention) is nn.MultiheadAttention
        note = small.dampr_manifest["closed_but_kept"]["attention"]
        assert note == "3 closed heads stay: the model reads their attention weights"
        torch.testing.assert_close(small(words)[1], model(words)[1])
    else:
        assert small.attention.heads == (3,)
        assert small.dampr_manifest["closed_but_kept"] == {}


def test_all_heads_or_neurons_closed() -> None:
    model, x = built("encoder layer")
    dampr.convert(model, example_inputs=x)
    close(model, share=1.0)
    small = compacted(model, x)
    assert small.self_attn.heads == (0,)
    assert small.linear1.out_features == 1
    assert small.dampr_manifest["closed_but_kept"] == {
        "self_attn": "1 closed head stays: every layer keeps one at least",
        "linear1": "1 closed neuron stays: every layer keeps one at least",
    }


def test_other_gates_of_the_same_model_are_cut_as_well() -> None:
    """The graph is traced through what is left of attention; the width of the residual stream stays, with a note."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = GatedEmbedding(20, E)
            self.layer = GatedTransformerEncoderLayer(
                E, H, D, batch_first=True, parts=("heads", "neurons", "sublayers")
            )
            self.hidden, self.head = GatedLinear(E, 7), nn.Linear(7, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(torch.sigmoid(self.hidden(self.layer(self.embedding(x)))))

    model = close(Model(), seed=3)
    for own in model.layer.sublayer_gates:
        own.gate.log_alpha.data.fill_(1.0)
    small = compacted(model, words)
    left = 7 - len(model.hidden.closed_channels()[0])
    assert small.hidden.out_features == small.head.in_features == left < 7
    assert small.embedding.embedding_dim == E
    assert "closed channels stay" in small.dampr_manifest["closed_but_kept"]["embedding"]


@pytest.mark.parametrize("heads", [[], [1]], ids=["whole", "pruned"])
def test_a_width_that_runs_through_attention_stays_with_a_note(heads: list[int]) -> None:
    """Without norms nothing but the attention is in the way of cutting the width of the embedding."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding, self.attention = GatedEmbedding(20, E), GatedMultiheadAttention(E, H, batch_first=True)
            self.hidden, self.head = GatedLinear(E, 7), nn.Linear(7, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.embedding(x)
            return self.head(torch.relu(self.hidden(x + self.attention(x, x, x)[0])))

    model = close(Model(), share=0.5)
    model.attention.gate.log_alpha.data.fill_(9.0)
    model.attention.gate.log_alpha.data[heads] = -9.0
    small = compacted(model, words)
    assert small.embedding.embedding_dim == E
    assert "MultiheadAttention 'attention' shares its width" in small.dampr_manifest["closed_but_kept"]["embedding"]
    assert small.hidden.out_features == 7 - len(model.hidden.closed_channels()[0]) < 7


@pytest.mark.parametrize("norm_first", [False, True])
def test_closed_sublayers_and_branches_go(norm_first: bool) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            how: dict[str, Any] = {"batch_first": True, "norm_first": norm_first, "parts": ("heads", "sublayers")}
            self.first = GatedTransformerEncoderLayer(E, H, D, **how)
            self.decoder = GatedTransformerDecoderLayer(E, H, D, **how)
            self.branch = GatedResidual(GatedTransformerEncoderLayer(E, H, D, batch_first=True))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.branch(self.decoder(self.first(x), x))

    model = close(Model(), share=0.0)
    model.first.sublayer_gates[0].gate.log_alpha.data.fill_(-9.0)
    model.decoder.sublayer_gates[1].gate.log_alpha.data.fill_(-9.0)
    x = torch.randn(3, 5, E)
    small = compacted(model, x)
    assert not list(small.first.self_attn.parameters())
    assert not list(small.decoder.multihead_attn.parameters())
    assert small.dampr_manifest["layers"]["first.self_attn"]["heads"] == {"before": H, "kept": []}


@pytest.mark.parametrize(
    ("include", "exclude", "expected"),
    [
        (None, ["*.self_attn"], ["encoder.layers.0.linear1", "encoder.layers.1.linear1"]),
        (None, [nn.Linear], ["encoder.layers.0.self_attn", "encoder.layers.1.self_attn"]),
        ("encoder.layers.0", None, ["encoder.layers.0.linear1", "encoder.layers.0.self_attn"]),
        (nn.TransformerEncoderLayer, "*.1", ["encoder.layers.0.linear1", "encoder.layers.0.self_attn"]),
        (nn.MultiheadAttention, "encoder.layers.0", ["encoder.layers.1.self_attn"]),
        (["*.1.linear1"], None, ["encoder.layers.1.linear1"]),
    ],
)
def test_include_and_exclude_name_layers_or_their_parts(include: Any, exclude: Any, expected: list[str]) -> None:
    model = Classifier()
    dampr.convert(model, include=include, exclude=exclude, example_inputs=words)
    assert sorted(gated(model)) == expected
    for i, layer in enumerate(model.encoder.layers):
        touched = any(name.startswith(f"encoder.layers.{i}.") for name in expected)
        assert type(layer) is (GatedTransformerEncoderLayer if touched else nn.TransformerEncoderLayer)


@pytest.mark.parametrize("granularity", ["input", "weight", (4, 4)])
def test_other_granularities_gate_linear_layers_and_leave_attention(granularity: Any) -> None:
    model = Classifier()
    before = model.eval()(words)
    dampr.convert(model, granularity=granularity, exclude="head", example_inputs=words)
    assert torch.equal(model(words), before)
    assert sorted(gated(model)) == [f"encoder.layers.{i}.linear{j}" for i in range(2) for j in (1, 2)]
    assert (
        model.dampr_skipped["encoder.layers.0.self_attn"]
        == "MultiheadAttention has gates on its heads, with granularity='output'"
    )
    with torch.no_grad():
        before = model(words)
        model.encoder.layers[0].linear2.gate.log_alpha.fill_(-9.0)
        assert not torch.equal(model(words), before)
    small = compacted(close(model, 0.3), words)
    assert type(small.encoder.layers[0]) is nn.TransformerEncoderLayer


def test_closed_inputs_of_the_residual_stream_stay_with_a_note() -> None:
    model = Classifier()
    dampr.convert(model, granularity="input", include="*.linear1", example_inputs=words)
    small = compacted(close(model, 0.5), words)
    assert "the residual stream has its width" in small.dampr_manifest["closed_but_kept"]["encoder.layers.0.linear1"]


@nested
@pytest.mark.parametrize("family", ["hard_concrete", "dep_l0", "dam", "diffprune", "diffmask"])
@pytest.mark.parametrize("name", ["encoder, padded", "transformer"])
def test_every_family(family: str, name: str) -> None:
    model, x = built(name)
    before = call(model.eval(), x)
    dampr.convert(model, gate=family, example_inputs=x)
    torch.testing.assert_close(call(model, x), before, rtol=1e-4, atol=1e-4)
    model.train()
    (call(model, x).square().mean() + 1e-3 * dampr.penalty(model)).backward()
    compacted(model.eval(), x)


@pytest.mark.parametrize("example", [False, True])
def test_a_failed_conversion_leaves_the_model_as_it_was(example: bool) -> None:
    class Fails(Classifier):
        def forward(self, x: torch.Tensor, padding: torch.Tensor | None = None) -> torch.Tensor:
            if type(self.encoder.layers[0]) is not nn.TransformerEncoderLayer:
                raise ArithmeticError("only plain layers here")
            return super().forward(x, padding)

    model = Fails()
    before = [(n, type(m), id(m)) for n, m in model.named_modules()], [(n, id(p)) for n, p in model.named_parameters()]
    state = copy.deepcopy(model.state_dict())
    with pytest.raises(ArithmeticError if example else ValueError):
        dampr.convert(model, gate="dam" if example else "none", example_inputs=words if example else None)
    assert (
        [(n, type(m), id(m)) for n, m in model.named_modules()],
        [(n, id(p)) for n, p in model.named_parameters()],
    ) == before
    assert all(torch.equal(t, state[n]) for n, t in model.state_dict().items())
    assert torch.backends.mha.get_fastpath_enabled()


def test_hooks_and_identity_of_a_transformer_layer_stay() -> None:
    model, seen = Classifier(), []
    first = model.encoder.layers[0]
    first.register_forward_hook(lambda *_: seen.append(1))
    first.self_attn.register_forward_hook(lambda *_: seen.append(2))
    dampr.convert(model, example_inputs=words)
    seen.clear()
    model(words)
    assert model.encoder.layers[0] is first
    assert seen == [2, 1]


def test_a_bare_attention_layer_comes_back_converted() -> None:
    dense = nn.MultiheadAttention(E, H)
    assert type(dampr.convert(dense)) is GatedMultiheadAttention
    x = torch.randn(5, 3, E)
    layer = dampr.convert(nn.MultiheadAttention(E, H), example_inputs=(x, x, x))
    with pytest.raises(ValueError, match="nothing around it could be cut"):
        dampr.compact(layer, example_inputs=(x, x, x))


def test_step_by_step_gives_what_one_step_gives() -> None:
    model = Classifier()
    dampr.convert(model, include="*.self_attn", example_inputs=words)
    dampr.convert(model, exclude="head", per_sample=True, example_inputs=words)
    assert sorted(gated(model)) == [f"encoder.layers.{i}.{part}" for i in range(2) for part in ("linear1", "self_attn")]
    assert sorted(model.dampr_skipped) == ["embedding", *(f"encoder.layers.{i}.linear2" for i in range(2))]
    assert [layer.per_sample for layer in dampr.prune.gated_layers(model).values()] == [False, True] * 2
    model(words).sum().backward()


def test_a_layer_that_is_used_several_times_stays_one_layer() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers, self.head = (
                nn.ModuleList([nn.TransformerEncoderLayer(E, H, D, batch_first=True)] * 3),
                nn.Linear(E, 3),
            )

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for layer in self.layers:
                x = layer(x)
            return self.head(x)

    model, x = Shared(), torch.randn(3, 5, E)
    dampr.convert(model, example_inputs=x)
    small = compacted(close(model), x)
    assert small.layers[0] is small.layers[1] is small.layers[2]
    assert type(small.layers[0]) is PrunedTransformerEncoderLayer


def test_a_subclass_with_gated_heads_takes_no_fused_path() -> None:
    class Own(nn.TransformerEncoderLayer):
        pass

    model = nn.Sequential(Own(E, H, D, batch_first=True), nn.Linear(E, 3))
    x = torch.randn(3, 5, E)
    dampr.convert(model, exclude="*.linear2", example_inputs=x)
    assert gated(model) == {"0.self_attn": "GatedMultiheadAttention", "0.linear1": "GatedLinear"}
    small = compacted(close(model), x)
    assert type(small[0].self_attn) is PrunedMultiheadAttention
    assert small[0].linear1.out_features < D


def test_macs_count_attention_on_every_path() -> None:
    """2 layers: q, k, v and out, scores and what they weigh, feed-forward; then the head."""
    model = Classifier()
    tokens = words.numel()
    dense = 2 * (tokens * (4 * E * E + 2 * E * D) + 2 * 3 * 5 * 5 * E) + 3 * E * 3
    dampr.convert(model, example_inputs=words)
    table = dampr.summary(close(model, keep_one=True), example_inputs=words)
    assert table.macs == dense
    small = 2 * (tokens * (4 * E * E // H + 2 * E) + 2 * 3 * 5 * 5 * E // H) + 3 * E * 3
    assert table.macs_compacted == small
    assert [row.granularity for row in table.layers[:2]] == ["head", "output"]
