"""Gates on the residual width of transformers: one vector in all norms, cut out of everything that writes, normalises or reads it."""

from __future__ import annotations

import re
import warnings
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import dampr
from dampr.gates import Fixed, HardConcrete
from dampr.nn import (
    GatedLayerNorm,
    GatedResidual,
    GatedTransformerEncoderLayer,
    PrunedMultiheadAttention,
    PrunedTransformerDecoderLayer,
    PrunedTransformerEncoderLayer,
)
from dampr.prune import streams
from dampr.prune.cost import Cost
from dampr.prune.latency import Latency
from dampr.prune.measure import count_macs, count_params
from tests import models

E, H, D = 8, 4, 12
words = torch.randint(20, (3, 5), generator=torch.Generator().manual_seed(0))
others = torch.randint(20, (3, 4), generator=torch.Generator().manual_seed(1))


class Block(nn.Module):
    """Pre-norm, every projection a linear layer of its own, a learned factor for each channel behind the feed-forward (CaiT)."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(E), nn.LayerNorm(E, bias=False)
        self.q, self.k, self.v, self.out = (nn.Linear(E, E) for _ in range(4))
        self.up, self.down, self.scale = nn.Linear(E, D), nn.Linear(D, E), nn.Parameter(torch.ones(E))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        n = self.norm1(x)
        q, k, v = (layer(n).unflatten(-1, (H, -1)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        x = x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.scale * self.down(F.gelu(self.up(self.norm2(x))))


class Classifier(nn.Module):
    """Words with learned positions in, one score for each class out; ``class_token``: read off a learned first word."""

    def __init__(self, layers: nn.Module, norm: nn.Module | None = None, first: nn.Module | None = None, class_token: bool = False) -> None:
        super().__init__()
        self.embedding, self.position = nn.Embedding(20, E), nn.Parameter(torch.randn(1, 5, E) / 2)
        self.token = nn.Parameter(torch.randn(1, 1, E)) if class_token else None
        self.first, self.layers, self.norm = first or nn.Identity(), layers, norm or nn.Identity()
        self.head = nn.Linear(E, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.embedding(x) + self.position
        if self.token is not None:
            x = torch.cat([self.token.expand(len(x), -1, -1), x], 1)
        x = self.norm(self.layers(self.first(x)))
        return self.head(x[:, 0] if self.token is not None else x.mean(1))


class Language(nn.Module):
    """GPT-like: the last layer has the table of the embedding for its weight."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.blocks, self.norm = nn.Embedding(20, E), nn.Sequential(Block(), Block()), nn.LayerNorm(E)
        self.head = nn.Linear(E, 20, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.norm(self.blocks(self.embedding(x))))


class Attending(nn.Module):
    """A block around torch's attention, with every option that leaves its width alone."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.attention = nn.LayerNorm(E), nn.MultiheadAttention(E, H, add_bias_kv=True, add_zero_attn=True, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        n = self.norm(x)
        hidden = torch.zeros(x.shape[:2], dtype=torch.bool)
        hidden[0, -2:] = True
        return x + self.attention(query=n, key=n, value=n, key_padding_mask=hidden)[0]


class Translator(nn.Module):
    """Encoder and decoder, whose streams are one width, because each attention of the decoder reads both."""

    def __init__(self) -> None:
        super().__init__()
        self.source, self.target = nn.Embedding(20, E), nn.Embedding(20, E)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.transformer = nn.Transformer(E, H, 2, 2, D, batch_first=True, norm_first=True)
        self.head = nn.Linear(E, 3)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return self.head(self.transformer(self.source(x), self.target(y)))


def encoder(norm_first: bool = True, layers: int = 2, **how: Any) -> nn.Module:
    return nn.TransformerEncoder(
        nn.TransformerEncoderLayer(E, H, D, batch_first=True, norm_first=norm_first, **how), layers, enable_nested_tensor=False
    )


def gated_encoder() -> nn.Module:
    how: dict[str, Any] = {"batch_first": True, "norm_first": True, "parts": ("heads", "neurons", "sublayers")}
    return nn.Sequential(*(GatedTransformerEncoderLayer(E, H, D, **how) for _ in range(2)))


def frozen(model: Classifier) -> Classifier:
    """Positions that nobody trains, as sinusoidal ones, and a table of words."""
    model.position.requires_grad_(False)
    model.embedding.requires_grad_(False)
    return model


def branches() -> nn.Module:
    """Feed-forward branches that may close as a whole."""
    return nn.Sequential(
        *(GatedResidual(nn.Sequential(nn.LayerNorm(E), nn.Linear(E, D), nn.GELU(), nn.Linear(D, E))) for _ in range(3)), nn.LayerNorm(E)
    )


CASES: dict[str, Any] = {
    "blocks": lambda: (Classifier(nn.Sequential(Block(), Block()), nn.LayerNorm(E)), words),
    "class token": lambda: (Classifier(nn.Sequential(Block(), Block()), nn.LayerNorm(E), class_token=True), words),
    "encoder": lambda: (Classifier(encoder(), nn.LayerNorm(E)), words),
    "frozen": lambda: (frozen(Classifier(encoder(layers=1), nn.LayerNorm(E))), words),
    "encoder, gelu, no bias": lambda: (
        Classifier(encoder(activation="gelu", bias=False), nn.LayerNorm(E, elementwise_affine=False)),
        words,
    ),
    "post-norm behind a norm": lambda: (Classifier(encoder(False), first=nn.LayerNorm(E)), words),
    "a block used twice": lambda: (Classifier(nn.Sequential(*[Block()] * 2), nn.LayerNorm(E)), words),
    "attention": lambda: (Classifier(nn.Sequential(Attending(), Attending()), nn.LayerNorm(E)), words),
    "branches": lambda: (Classifier(branches()), words),
    "sequence": lambda: (nn.Sequential(nn.Embedding(20, E), *encoder().layers, nn.LayerNorm(E), nn.Linear(E, 3)), words),
    "sublayers": lambda: (Classifier(gated_encoder(), nn.LayerNorm(E)), words),
    "translator": lambda: (Translator(), (words, others)),
    "language": lambda: (Language(), words),
    "vit": models.ALL["vit"],
    "mlp": lambda: (nn.Sequential(nn.Linear(6, 10), nn.LayerNorm(10), nn.ReLU(), nn.Linear(10, 3)), torch.randn(4, 6)),
}
GATED = {  # the dense counterparts of those that have gates before
    "sublayers": lambda: Classifier(nn.Sequential(*encoder().layers), nn.LayerNorm(E)),
    "branches": lambda: Classifier(nn.Sequential(*(dampr.nn.Residual(m.branch) for m in list(branches())[:-1]), nn.LayerNorm(E))),
}
PROJECTED = ["*.q", "*.k", "*.v"]  # their own gates would have to keep the width of heads
every_case = pytest.mark.parametrize("case", CASES)


def built(case: str, seed: int = 1, **how: Any) -> tuple[Any, Any]:
    """A converted model whose gains, shifts and positions are not those of a fresh one, in evaluation mode."""
    torch.manual_seed(seed)
    model, x = CASES[case]()
    for p in model.parameters():
        if p.dim() == 1 and p.numel() > 1:
            p.data.add_(0.3 * torch.randn_like(p))
    how["exclude"] = [*PROJECTED, *(how["exclude"] if isinstance(how.get("exclude"), list) else filter(None, [how.get("exclude")]))]
    return dampr.convert(model.eval(), example_inputs=x, residual=True, **how), x


def call(model: nn.Module, x: Any) -> torch.Tensor:
    return model(*x) if isinstance(x, tuple) else model(x)


def norms(model: nn.Module) -> dict[str, GatedLayerNorm]:
    return {name: m for name, m in model.named_modules() if isinstance(m, GatedLayerNorm) and m.statistics == "open"}


def close(model: nn.Module, seed: int = 0, share: float = 0.5) -> nn.Module:
    """Random gates of each kind closed, others open or in between; one at least stays open, but of a sublayer."""
    generator = torch.Generator().manual_seed(seed)
    for gate in {layer.gate: None for layer in dampr.prune.gated_layers(model).values()}:
        shut = torch.rand(gate.num_gates, generator=generator) < share
        shut[torch.randint(gate.num_gates, (), generator=generator)] &= gate.num_gates == 1
        gate.log_alpha.data = torch.where(shut, -9.0, 3 * torch.rand(gate.num_gates, generator=generator))
    return model.eval()


def compacted(model: nn.Module, x: Any, **how: Any) -> Any:
    small = dampr.compact(model, example_inputs=x, **how)
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            torch.testing.assert_close(call(small, x), call(model, x), rtol=1e-5, atol=1e-5)
    assert not any(isinstance(m, dampr.nn.GatedLayer) for m in small.modules())
    return small


def width_of(small: nn.Module) -> set[int]:
    return {m.normalized_shape[0] for m in small.modules() if type(m) is nn.LayerNorm}


@every_case
def test_convert_keeps_the_function_to_the_bit_and_gives_the_norms_one_gate(case: str) -> None:
    torch.manual_seed(1)
    model, x = CASES[case]()
    before = call(model.eval(), x)
    plain = {name: m for name, m in model.named_modules() if isinstance(m, nn.LayerNorm)}
    parameters = dict(model.named_parameters())
    dampr.convert(model, example_inputs=x, residual=True, exclude=PROJECTED)
    assert torch.equal(call(model, x), before)
    assert norms(model).keys() == plain.keys()
    assert len({norm.gate for norm in norms(model).values()}) == 1
    assert all(dict(model.named_parameters())[name] is p for name, p in parameters.items())
    writers = [
        why for name, why in model.dampr_skipped.items() if name.endswith(("embedding", "source", "linear2", "down", "out", "patch"))
    ]
    assert writers or case == "mlp"
    assert all(why.startswith("its outputs are the residual stream, whose gates are in '") for why in writers)


@every_case
@pytest.mark.parametrize("seed", range(3))
def test_masked_is_compacted_at_the_size_foretold(case: str, seed: int) -> None:
    model, x = built(case, seed)
    costs = {"macs": Cost(model, x, "macs"), "params": Cost(model, x, "params")}
    count = {"macs": count_macs(model, x), "params": count_params(model)}
    assert {metric: int(cost.total) for metric, cost in costs.items()} == count
    assert not costs["macs"].structure.notes
    close(model, seed)
    small = compacted(model, x)
    left = int(next(iter(norms(model).values())).gate.is_open().sum())
    assert width_of(small) <= {left}
    foretold = {metric: int(cost(cost.decision())) for metric, cost in costs.items()}
    added = sum(p.numel() for name, p in small.named_parameters() if name not in dict(model.named_parameters()))
    assert foretold == {"macs": count_macs(small, x), "params": count_params(small) - added}


@every_case
@pytest.mark.parametrize("left", [1, 0])
def test_all_but_one_and_all_closed(case: str, left: int) -> None:
    model, x = built(case)
    norm = next(iter(norms(close(model)).values()))  # neurons and heads are closed as well
    norm.gate.log_alpha.data = torch.where(torch.arange(norm.gate.num_gates) < left, 1.0, -9.0)
    small = compacted(model, x)
    assert width_of(small) == {1}
    assert ("1 closed channel stays: every layer keeps one at least" in small.dampr_manifest["closed_but_kept"].values()) is (left == 0)


def test_the_types_of_what_is_left() -> None:
    model, x = built("translator")
    small = compacted(close(model), x)
    left = width_of(small).pop()
    assert small.transformer.d_model == small.head.in_features == small.source.embedding_dim == small.target.embedding_dim == left
    assert {type(layer) for layer in small.transformer.encoder.layers} == {PrunedTransformerEncoderLayer}
    assert {type(layer) for layer in small.transformer.decoder.layers} == {PrunedTransformerDecoderLayer}
    attention = small.transformer.decoder.layers[0].multihead_attn
    assert type(attention) is PrunedMultiheadAttention
    assert (attention.embed_dim, attention.head_dim) == (left, E // H)
    assert attention.in_proj_weight.shape == (3 * len(attention.heads) * E // H, left)
    assert attention.out_proj.weight.shape == (left, len(attention.heads) * E // H)


def test_without_closed_channels_what_torch_has_a_form_for_comes_out_of_torch() -> None:
    model, x = built("encoder", exclude=[nn.MultiheadAttention, nn.Linear])
    assert norms(model).keys() == dampr.prune.gated_layers(model).keys()
    small = compacted(model, x)
    assert type(small.layers.layers[0]) is nn.TransformerEncoderLayer
    assert type(small.layers.layers[0].self_attn) is nn.MultiheadAttention
    closed = compacted(close(model), x)
    assert type(closed.layers.layers[0]) is PrunedTransformerEncoderLayer
    assert closed.layers.layers[0].self_attn.heads == tuple(range(H))


def test_heads_neurons_sublayers_and_the_width_go_together() -> None:
    model, x = built("sublayers")
    close(model, 3)
    for layer in model.layers:
        for own in layer.sublayer_gates:
            nn.init.constant_(own.gate.log_alpha, 1.0)
    nn.init.constant_(model.layers[0].sublayer_gates[0].gate.log_alpha, -9.0)
    small = compacted(model, x)
    assert not list(small.layers[0].self_attn.parameters())
    attention, left = small.layers[1].self_attn, width_of(small).pop()
    assert attention.embed_dim == left < E
    assert len(attention.heads) == H - len(model.layers[1].self_attn.closed_heads())
    assert small.layers[0].linear1.in_features == left
    assert small.layers[0].linear1.out_features == D - len(model.layers[0].closed_neurons())


def test_what_is_frozen_stays_frozen() -> None:
    model, x = built("frozen")
    small = compacted(close(model), x)
    assert small.position.shape == (1, 5, width_of(small).pop())
    assert {name for name, p in small.named_parameters() if not p.requires_grad} == {"position", "embedding.weight"}


def test_a_shared_table_stays_shared() -> None:
    model, x = built("language")
    small = compacted(close(model), x)
    assert small.head.weight is small.embedding.weight
    assert small.embedding.weight.shape == (20, width_of(small).pop())


def test_the_penalty_counts_a_channel_once() -> None:
    model, _ = built("blocks", include=nn.LayerNorm)
    assert len(dampr.prune.gated_layers(model)) == 5
    attention, feed_forward = 3 * E + E + 1, D + D + 1 + 1  # rows of q, k, v; columns and a shift of out; up, down with a shift, factor
    each = 20 + 5 + 2 * (attention + feed_forward) + 3 * 2 + 2 * 1 + 3  # words, positions, blocks, norms (two without a shift), head
    assert {norm.weights_per_gate for norm in list(norms(model).values())[1:]} == {1.0, 2.0}
    pi = model.norm.gate.open_probability()
    torch.testing.assert_close(dampr.penalty(model), (pi * each).sum())


def test_training_moves_the_gates_and_every_gate_does_something() -> None:
    model, x = built("encoder", include=nn.LayerNorm)
    optimizer = torch.optim.Adam(dampr.param_groups(model, lr=1e-3, gate_lr=0.1))
    assert dampr.verify_model(model, x, optimizer=optimizer).ok
    before = model.norm.gate.log_alpha.detach().clone()
    model.train()
    for _ in range(3):
        optimizer.zero_grad()
        (model(x).square().mean() + 1e-3 * dampr.penalty(model)).backward()
        optimizer.step()
    assert (model.norm.gate.log_alpha < before).all()
    compacted(close(model), x)


@pytest.mark.parametrize("family", ["dep_l0", "dam", "diffprune", "diffmask"])
def test_every_family(family: str) -> None:
    torch.manual_seed(0)
    model, x = CASES["encoder"]()
    before = call(model.eval(), x)
    dampr.convert(model, gate=family, example_inputs=x, residual=True)
    torch.testing.assert_close(call(model, x), before, rtol=1e-4, atol=1e-4)
    model.train()
    (call(model, x).square().mean() + 1e-3 * dampr.penalty(model)).backward()
    model.eval()
    gate = model.norm.gate
    shared = Fixed(torch.where(torch.arange(E) % 3 == 1, 0.0, gate.deterministic().detach()))
    for norm in norms(model).values():
        assert norm.gate is gate
        norm.gate = shared
    assert width_of(compacted(model, x)) == {5}


@pytest.mark.parametrize("metric", ["macs", "params"])
def test_a_budget_ends_at_what_compaction_counts(metric: str) -> None:
    for case in ("blocks", "translator", "sublayers"):
        model, x = built(case)
        generator = torch.Generator().manual_seed(4)
        for gate in {layer.gate: None for layer in dampr.prune.gated_layers(model).values()}:
            gate.log_alpha.data = 2 * torch.rand(gate.num_gates, generator=generator)
        budget = dampr.Budget(model, x, **{metric: 0.4})
        report = budget.finalize()
        small = compacted(model, x)
        counted = count_macs(small, x) if metric == "macs" else count_params(small)
        assert report.reached == counted <= budget.target
        assert width_of(small).pop() < E


def test_a_rounded_budget_gives_rounded_widths_and_compact_alone_says_why_not() -> None:
    model, x = built("encoder")
    close(model)
    model.norm.gate.log_alpha.data = torch.where(torch.arange(E) < 5, 1.0, -9.0)
    small = compacted(model, x, round_to=4)
    assert width_of(small) == {5}
    noted = small.dampr_manifest["closed_but_kept"]
    assert "5 channels are left, no multiple of 4: a LayerNorm counts whatever would fill them up" in noted.values()
    dampr.Budget(model, x, params=0.5).finalize(round_to=4)
    small = compacted(model, x, round_to=4)
    assert width_of(small) == {4}
    assert not small.dampr_manifest["closed_but_kept"]


@every_case
def test_an_optimizer_goes_on_with_what_is_left_of_its_state(case: str) -> None:
    model, x = built(case)
    optimizer = torch.optim.Adam(dampr.param_groups(model, lr=1e-3))
    call(model, x).square().mean().backward()
    optimizer.step()
    close(model)
    before = {name: optimizer.state[p]["exp_avg"] for name, p in model.named_parameters() if p in optimizer.state}
    small = compacted(model, x, optimizer=optimizer)
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    kept = next(iter(small.dampr_manifest["layers"].values()))["out"]["kept"] if case == "mlp" else None
    for name, p in small.named_parameters():
        if name in before:
            assert id(p) in held, name
            assert optimizer.state[p]["exp_avg"].shape == p.shape, name
    if kept is not None:
        state = optimizer.state[small[0].weight]["exp_avg"]
        assert torch.equal(state, before["0.weight"][kept])
    if case == "translator":
        name = "transformer.decoder.layers.0.multihead_attn"
        entry, attention = small.dampr_manifest["layers"][name], small.get_submodule(name)
        rows = torch.arange(3 * E).view(3, H, -1)[:, list(attention.heads)].flatten()
        expected = before[f"{name}.in_proj_weight"][rows][:, entry["in"]["kept"]]
        assert torch.equal(optimizer.state[attention.in_proj_weight]["exp_avg"], expected)
    if case == "class token":
        kept = small.dampr_manifest["parameters"]["token"]["kept"]
        assert torch.equal(optimizer.state[small.token]["exp_avg"], before["token"][..., kept])
    call(small, x).square().mean().backward()
    optimizer.step()


@every_case
def test_files_lead_back_into_the_dense_original(case: str, tmp_path: Any) -> None:
    model, x = built(case)
    for gate in (m for m in close(model).modules() if isinstance(m, HardConcrete)):  # 0 or 1, so that no layer gains a weight
        gate.log_alpha.data = torch.where(gate.is_open() | torch.tensor(gate.num_gates == 1), 9.0, -9.0)
    small = compacted(model, x).eval()
    path = tmp_path / "small.safetensors"
    dampr.save(small, path)
    torch.manual_seed(9)
    original = CASES[case]()[0] if case not in GATED else GATED[case]()
    loaded = dampr.load(path, original)
    assert torch.equal(call(loaded, x), call(small, x))
    assert str(loaded) == str(small)
    assert loaded.dampr_manifest == small.dampr_manifest
    if case in ("mlp", "sequence"):
        alone = dampr.load(path)
        assert str(alone) == str(small)
        assert torch.equal(call(alone, x), call(small, x))
    with pytest.raises(ValueError, match="channels in front of this LayerNorm were cut"):
        dampr.expand(small)


def test_a_file_whose_norm_does_not_go_with_its_width_does_not_load(tmp_path: Any) -> None:
    model, x = built("mlp")
    small = compacted(close(model), x)
    small[1].normalized_shape = (10,)
    with pytest.raises(dampr.FileError, match=r"layer '1': its widths .* do not go with 1\.weight"):
        dampr.save(small, tmp_path / "small.safetensors")


@every_case
def test_compacted_models_export(case: str) -> None:
    model, x = built(case)
    small = compacted(close(model), x).eval()
    exported = torch.export.export(small, x if isinstance(x, tuple) else (x,)).module()
    torch.testing.assert_close(call(exported, x), call(small, x))


def test_latency_knows_the_width_of_attention() -> None:
    model, x = built("encoder")
    latency = Latency(model, x)
    site = next(site for site in latency.sites if site.name == "layers.layers.0.self_attn")
    assert site.read.weights
    assert site.written.weights
    assert float(latency(latency.decision())) == pytest.approx(latency.total)
    assert float(latency(torch.zeros(latency.structure.size))) <= latency.total


class Reading(nn.Module):
    """A decoder whose memory comes from outside."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(20, E), nn.Linear(E, 3)
        self.decoder = nn.TransformerDecoder(nn.TransformerDecoderLayer(E, H, D, batch_first=True, norm_first=True), 1, nn.LayerNorm(E))

    def forward(self, x: torch.Tensor, memory: torch.Tensor) -> torch.Tensor:
        return self.head(self.decoder(self.embedding(x), memory))


class Odd(nn.Module):
    """A stream with something about it, named by ``what``."""

    def __init__(self, what: str) -> None:
        super().__init__()
        self.what, self.embedding, self.norm, self.head = what, nn.Embedding(20, E), nn.LayerNorm(E), nn.Linear(E, 3)
        self.register_buffer("sinusoid", torch.randn(5, E))
        self.up, self.down, self.scores = nn.Linear(E, D), nn.Linear(D, E), nn.Linear(5 * E, 3)
        self.same, self.other = nn.Linear(E, E), nn.Linear(E, 20, bias=False)
        if what == "shared":
            self.other.weight = self.embedding.weight
        self.grouped, self.rms, self.lstm = nn.Conv1d(E, E, 1, groups=2), nn.RMSNorm(E), nn.LSTM(E, E, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.embedding(x)
        if self.what == "shared":
            return self.other(self.same(self.norm(x)))
        if self.what == "buffer":
            x = x + self.sinusoid
        if self.what == "read before":
            x = x + self.down(self.up(x))
        if self.what == "groups":
            x = x + self.grouped(x.transpose(1, 2)).transpose(1, 2)
        if self.what == "rms":
            x = self.rms(x)
        if self.what == "recurrent":
            x = self.lstm(x)[0]
        n = self.norm(x)
        if self.what == "shuffled":
            n = n.unflatten(-1, (2, -1)).transpose(-1, -2).flatten(-2)
        if self.what == "softmax":
            n = n.softmax(-1)
        if self.what == "flattened":
            return self.scores(n.flatten(1))
        if self.what == "output":
            return n
        return self.head(n + x if self.what == "both" else n)


def odd(what: str) -> Any:
    return lambda: (Odd(what), words)


REFUSED: dict[str, tuple[Any, str]] = {
    "post-norm on embeddings": (
        lambda: (Classifier(encoder(False)), words),
        "reads Embedding 'embedding' without a LayerNorm between|reads Parameter 'position' without a LayerNorm between",
    ),
    "no final norm": (lambda: (Classifier(encoder()), words), "Linear 'head' reads .* without a LayerNorm between"),
    "the input": (lambda: (nn.Sequential(nn.LayerNorm(E), nn.Linear(E, 3)), torch.randn(2, E)), "its width is the model's own input"),
    "memory is an input": (
        lambda: (Reading(), (words, torch.randn(3, 4, E))),
        "without half of its channels the model does not run, so something beside its layers has that width",
    ),
    "decoder alone": (
        lambda: (
            nn.TransformerDecoder(nn.TransformerDecoderLayer(E, H, D, norm_first=True), 1),
            (torch.randn(5, 3, E), torch.randn(4, 3, E)),
        ),
        "its width is the model's own output",
    ),
    "the output": (odd("output"), "its width is the model's own output"),
    "a buffer": (odd("buffer"), "without half of its channels the model does not run, so something beside its layers has that width"),
    "read before": (odd("read before"), "Linear 'up' reads Embedding 'embedding' without a LayerNorm between"),
    "both": (odd("both"), "Linear 'head' reads Embedding 'embedding' without a LayerNorm between"),
    "flattened": (odd("flattened"), "its channels are rearranged on the way to 'scores'"),
    "shuffled": (odd("shuffled"), "computes something else, so these are mixed or rearranged on the way"),
    "softmax": (odd("softmax"), "computes something else, so these are mixed or rearranged on the way"),
    "shared": (odd("shared"), "Embedding 'embedding' shares a weight with Linear 'other', which has another width"),
    "groups": (odd("groups"), "Conv1d 'grouped' (with groups shares its width|reads Embedding 'embedding' without)"),
    "another norm": (odd("rms"), "does not run, so something beside its layers has that width .*normalized_shape"),
    "recurrent": (odd("recurrent"), "LSTM 'lstm' shares its width, and cannot be cut yet"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_cut_has_no_gates_and_says_why(case: str) -> None:
    build, reason = REFUSED[case]
    torch.manual_seed(0)
    model, x = build()
    before = call(model.eval(), x)
    places = [name for name, m in model.named_modules() if isinstance(m, nn.LayerNorm)]
    try:
        dampr.convert(model, example_inputs=x, residual=True)
        why = {name: model.dampr_skipped[name] for name in places}
    except dampr.ConversionError as error:  # nothing else to convert either
        why = dict.fromkeys(places, str(error))
    assert not norms(model)
    assert torch.equal(call(model, x), before)
    assert all("no gates for its width: " in text for text in why.values())
    assert any(re.search(reason, text) for text in why.values()), why


def test_norms_that_are_left_out_leave_out_their_stream() -> None:
    for how in ({"exclude": "layers.1.norm2"}, {"include": ["*.norm1", nn.Linear]}, {"exclude": nn.LayerNorm}):
        model, _ = built("blocks", **how)
        assert not norms(model)
        assert " is left out" in model.dampr_skipped["norm"]
    model, _ = built("blocks", include=[nn.LayerNorm])
    assert norms(model).keys() == dampr.prune.gated_layers(model).keys()


def test_a_second_conversion_leaves_a_gated_stream_as_it_is() -> None:
    model, x = built("encoder", include=nn.LayerNorm)
    gate = model.norm.gate
    dampr.convert(model, example_inputs=x, residual=True)
    assert model.norm.gate is gate
    assert model.dampr_skipped["norm"] == "no gates for its width: 'layers.layers.0.norm1' has gates already"
    compacted(close(model), x)


def test_a_failed_conversion_leaves_the_norms_as_they_were() -> None:
    class Fails(Classifier):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if type(self.norm) is not nn.LayerNorm:
                raise ArithmeticError("only plain norms here")
            return super().forward(x)

    model = Fails(encoder(), nn.LayerNorm(E))
    before = [(name, type(m), id(m)) for name, m in model.named_modules()], {name: id(p) for name, p in model.named_parameters()}
    with pytest.raises(ArithmeticError, match="only plain norms here"):
        dampr.convert(model, example_inputs=words, residual=True)
    assert ([(name, type(m), id(m)) for name, m in model.named_modules()], {name: id(p) for name, p in model.named_parameters()}) == before


def test_closed_channels_that_cannot_be_cut_are_an_error() -> None:
    """A norm made by hand whose width is the model's output: a plain one would count what it leaves out."""
    gate = HardConcrete(6)
    model = nn.Sequential(nn.Linear(4, 6), GatedLayerNorm(6, gate=gate, statistics="open"))
    x = torch.randn(3, 4)
    assert type(dampr.compact(model, example_inputs=x)[1]) is nn.LayerNorm
    gate.log_alpha.data[:2] = -9.0
    with pytest.raises(dampr.CompactionError, match="1: 2 closed channels cannot stay, .* its width is the model's own output"):
        dampr.compact(model, example_inputs=x)
    assert "1" in Cost(nn.Sequential(*model, nn.Linear(6, 2)), x, "macs").structure.gated
    with pytest.raises(ValueError, match="no gate of it cuts anything"):
        dampr.Budget(model, x, macs=0.5)


def test_norms_of_one_stream_with_other_gates_are_an_error() -> None:
    own = [GatedLayerNorm(6, statistics="open") for _ in range(2)]
    x = torch.randn(3, 4)

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.norms, self.heads = nn.Linear(4, 6), nn.ModuleList(own), nn.ModuleList([nn.Linear(6, 2), nn.Linear(6, 2)])

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.stem(x)
            return sum(head(norm(x)) for head, norm in zip(self.heads, self.norms, strict=True))

    model = Two().eval()
    assert "gates of their own, expected one for all" in Cost(model, x, "params").structure.notes["norms.0"]
    own[0].gate.log_alpha.data[:2] = -9.0
    with pytest.raises(dampr.CompactionError, match="have other gates: expected one for all"):
        dampr.compact(model, example_inputs=x)
    own[1].gate = own[0].gate
    small = compacted(model, x)
    assert small.stem.out_features == small.heads[0].in_features == small.heads[1].in_features == 4


def test_wrong_arguments_are_named() -> None:
    model = Classifier(encoder(), nn.LayerNorm(E))
    for how in ({}, {"example_inputs": words, "granularity": "input"}, {"example_inputs": words, "per_sample": True}):
        with pytest.raises(ValueError, match="residual=True with .*: expected granularity 'output', one draw per call, and example inputs"):
            dampr.convert(model, residual=True, **how)


def test_the_first_layer_that_differs_is_named_behind_a_narrow_norm(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = built("encoder", include=nn.LayerNorm)
    cut = streams.Stream.cut

    def spoiled(self: streams.Stream, model: nn.Module, left: torch.Tensor) -> Any:
        kept = cut(self, model, left)
        with torch.no_grad():
            model.get_submodule("norm").bias.add_(1)
        return kept

    close(model)
    monkeypatch.setattr(streams.Stream, "cut", spoiled)
    with pytest.raises(dampr.CompactionError, match="layer 'norm' is the first whose output differs"):
        dampr.compact(model, example_inputs=x)
