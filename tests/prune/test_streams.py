"""Gates on the residual width of transformers: one vector in all norms, cut out of everything that writes,
normalises or reads it.
"""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
from torch import nn

import dampr
from dampr.gates import Fixed, HardConcrete, make_gate
from dampr.nn import (
    OpenStatistics,
    PrunedMultiheadAttention,
    PrunedTransformerDecoderLayer,
    PrunedTransformerEncoderLayer,
)
from dampr.prune import streams
from dampr.prune.cost import Cost
from dampr.prune.latency import Latency
from dampr.prune.measure import count_macs, count_params
from tests.long import long_if
from tests.residual import (
    CASES,
    GATED,
    PROJECTED,
    D,
    E,
    H,
    built,
    call,
    close,
    compacted,
    every_case,
    norms,
    width_of,
    words,
)


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
        why
        for name, why in model.dampr_skipped.items()
        if name.endswith(("embedding", "source", "linear2", "down", "out", "patch"))
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
    assert (
        "1 closed channel stays: every layer keeps one at least" in small.dampr_manifest["closed_but_kept"].values()
    ) is (left == 0)


def test_the_types_of_what_is_left() -> None:
    model, x = built("translator")
    small = compacted(close(model), x)
    left = width_of(small).pop()
    assert (
        small.transformer.d_model
        == small.head.in_features
        == small.source.embedding_dim
        == small.target.embedding_dim
        == left
    )
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


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype stage:UserWarning")
@pytest.mark.parametrize("exclude", [[], [nn.MultiheadAttention], [nn.MultiheadAttention, nn.Linear]])
def test_padded_batches_pass_where_torch_would_take_its_fused_path(exclude: list[Any]) -> None:
    class Padded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding, self.first, self.head = nn.Embedding(20, E), nn.LayerNorm(E), nn.Linear(E, 3)
            self.encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(E, H, D, batch_first=True), 2)

        def forward(self, x: torch.Tensor, padding: torch.Tensor) -> torch.Tensor:
            return self.head(self.encoder(self.first(self.embedding(x)), src_key_padding_mask=padding))

    torch.manual_seed(0)
    model, x = Padded().eval(), (words, torch.arange(5) >= torch.tensor([[3], [4], [5]]))
    before = model(*x)
    dampr.convert(model, example_inputs=x, residual=True, exclude=exclude)
    assert len(norms(model)) == 5
    assert torch.equal(model(*x), before)
    assert width_of(compacted(close(model), x)).pop() < E


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
    # rows of q, k, v; columns and a shift of out; up, down with a shift, factor
    attention, feed_forward = 3 * E + E + 1, D + D + 1 + 1
    # words, positions, blocks, norms (two without a shift), head
    each = 20 + 5 + 2 * (attention + feed_forward) + 3 * 2 + 2 * 1 + 3
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
    assert (model.norm.gate.log_alpha != before).all()
    compacted(close(model), x)


# dynamo's own, of every autograd.Function
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_a_converted_model_compiles_without_a_graph_break() -> None:
    model, x = built("blocks")
    model.train()
    torch.manual_seed(3)
    expected = model(x)
    torch.manual_seed(3)
    found = torch.compile(model, fullgraph=True, backend="aot_eager")(x)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    found.square().sum().backward()
    assert model.norm.gate.log_alpha.grad is not None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_dtypes(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model, x = CASES["encoder"]()
    dampr.convert(model.to(dtype), example_inputs=x, residual=True)
    assert norms(model)
    low = dtype == torch.bfloat16
    small = dampr.compact(
        close(model), example_inputs=x, **({"atol": 0.1, "rtol": 0.1} if low else {"atol": 1e-7, "rtol": 1e-7})
    )
    assert {p.dtype for p in small.parameters()} == {dtype}
    assert width_of(small).pop() < E


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


@pytest.mark.parametrize("metric", ["macs", long_if("params", "params")])
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
    # 0 or 1, so that no layer gains a weight
    for gate in (m for m in close(model).modules() if isinstance(m, HardConcrete)):
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
    if case in ("mlp", "sequence", "stack"):
        alone = dampr.load(path)
        assert str(alone) == str(small)
        assert torch.equal(call(alone, x), call(small, x))
    with pytest.raises(ValueError, match="channels that this LayerNorm counts were cut"):
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
    term = next(term for term in latency.terms if term.name == "layers.layers.0.self_attn")
    assert term.read.weights
    assert term.written.weights
    assert float(latency(latency.decision())) == pytest.approx(latency.total)
    assert float(latency(torch.zeros(latency.structure.size))) <= latency.total


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


def without_gain(dtype: torch.dtype) -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    model, x = CASES["blocks"]()
    for norm in [m for m in model.modules() if type(m) is nn.LayerNorm]:
        norm.weight = norm.bias = None
        norm.elementwise_affine = False
    return model.to(dtype), x


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_norms_without_gain_in_other_dtypes(dtype: torch.dtype) -> None:
    model, x = without_gain(dtype)
    dampr.convert(model, example_inputs=x, residual=True)
    assert norms(model)
    close(model)
    tolerance = 1e-7 if dtype == torch.float64 else 0.1
    small = dampr.compact(model, example_inputs=x, atol=tolerance, rtol=tolerance)
    assert {p.dtype for p in small.parameters()} == {dtype}
    assert width_of(small).pop() < E


def test_gates_of_norms_without_gain_are_where_the_model_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """Such a norm has nothing to tell its device from;
    on the CPU alone what is asked for is all that there is to see.
    """
    devices = []

    def make(gate: Any, count: int, device: Any = None) -> Any:
        devices.extend([device] if count == E else [])
        return make_gate(gate, count, device)

    model, x = without_gain(torch.float32)
    monkeypatch.setattr(importlib.import_module("dampr.prune.convert"), "make_gate", make)
    dampr.convert(model, example_inputs=x, residual=True, include=[nn.LayerNorm])
    assert devices == [torch.device("cpu")]


def test_a_stream_without_gain_has_its_gates_on_what_reads_it_where_fresh_gates_are_not_1() -> None:
    model, x = without_gain(torch.float32)
    before = model(x)
    dampr.convert(model, example_inputs=x, residual=True, gate="dam")
    assert not norms(model)
    assert sum(isinstance(m, OpenStatistics) for m in model.modules()) == sum(
        type(m) is nn.LayerNorm for m in model.modules()
    )
    torch.testing.assert_close(model(x), before)
