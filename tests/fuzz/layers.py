"""Targets: constructors and calls of ``dampr.nn``, beside the layer of torch with the same arguments,
and of ``dampr.gates``.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence

from dampr import gates
from dampr import nn as gated

from .cases import Case, judge
from .functional import corrupted, values
from .values import Draw, nonsense

FAMILIES: tuple[Any, ...] = ("hard_concrete", "dam", "diffprune", "diffmask", gates.HardConcrete)


def names_of(function: Any) -> tuple[str, ...]:
    """What an error may name: arguments, and the number of gates that follows from them."""
    return (*inspect.signature(function).parameters, "num_gates")


def opened(layer: nn.Module) -> nn.Module:
    for module in layer.modules():
        if isinstance(module, gates.HardConcrete):
            module.log_alpha.data.fill_(100.0)
    return layer


def sizes(draw: Draw, **least: int) -> dict[str, Any]:
    return {name: draw.size(low) for name, low in least.items()}


def linear(draw: Draw) -> tuple[dict[str, Any], tuple[int, ...]]:
    own = sizes(draw, in_features=1, out_features=1) | {"bias": draw.chance(0.7)}
    return own, (*[draw.size() for _ in range(draw.choice((0, 1, 2)))], own["in_features"])


def convolution(dims: int) -> Callable[[Draw], tuple[dict[str, Any], tuple[int, ...]]]:
    def make(draw: Draw) -> tuple[dict[str, Any], tuple[int, ...]]:
        groups = draw.choice((1, 1, 2))
        own: dict[str, Any] = {
            "in_channels": groups * draw.size(1),
            "out_channels": groups * draw.size(1),
            "groups": groups,
        }
        own |= {"kernel_size": draw.choice((1, 2, 3)), "stride": draw.choice((1, 2)), "bias": draw.chance(0.7)}
        own |= {
            "padding": draw.choice((0, 1)),
            "padding_mode": draw.choice(("zeros", "zeros", "reflect", "replicate", "circular")),
        }
        return own, (
            *[draw.choice((1, 2, 5))] * draw.chance(0.8),
            own["in_channels"],
            *[draw.choice((3, 4, 7)) for _ in range(dims)],
        )

    return make


def batch_norm(dims: int) -> Callable[[Draw], tuple[dict[str, Any], tuple[int, ...]]]:
    def make(draw: Draw) -> tuple[dict[str, Any], tuple[int, ...]]:
        own = sizes(draw, num_features=1) | {
            "eps": 10 ** -draw.uniform(2, 6),
            "momentum": draw.choice((None, 0.1, 1.0, 0.0)),
        }
        own |= {"affine": draw.chance(0.7), "track_running_stats": draw.chance(0.7)}
        space = [draw.choice((1, 2, 5)) for _ in range(dims)] if dims > 1 or draw.chance(0.5) else []
        return own, (draw.choice((2, 3, 5)), own["num_features"], *space)

    return make


def layer_norm(draw: Draw) -> tuple[dict[str, Any], tuple[int, ...]]:
    shape = tuple(draw.size(1) for _ in range(draw.choice((1, 1, 2))))
    own = {
        "normalized_shape": shape,
        "eps": 10 ** -draw.uniform(2, 6),
        "elementwise_affine": draw.chance(0.7),
        "bias": draw.chance(0.7),
    }
    return own, (*[draw.size() for _ in range(draw.choice((0, 1, 2)))], *shape)


def recurrent(draw: Draw) -> tuple[dict[str, Any], tuple[int, ...]]:
    own = sizes(draw, input_size=1, hidden_size=1) | {"num_layers": draw.choice((1, 1, 2)), "bias": draw.chance(0.7)}
    own |= {"batch_first": draw.chance(0.5), "bidirectional": draw.chance(0.4)}
    return own, (draw.choice((1, 2, 5)), *[draw.choice((1, 3))] * draw.chance(0.8), own["input_size"])


def lstm(draw: Draw) -> tuple[dict[str, Any], tuple[int, ...]]:
    own, shape = recurrent(draw)
    own["proj_size"] = draw.randrange(own["hidden_size"])
    return own, shape


KINDS: dict[str, tuple[Any, Any, Callable[[Draw], tuple[dict[str, Any], tuple[int, ...]]]]] = {
    "GatedLinear": (gated.GatedLinear, nn.Linear, linear),
    "GatedConv1d": (gated.GatedConv1d, nn.Conv1d, convolution(1)),
    "GatedConv2d": (gated.GatedConv2d, nn.Conv2d, convolution(2)),
    "GatedConv3d": (gated.GatedConv3d, nn.Conv3d, convolution(3)),
    "GatedBatchNorm1d": (gated.GatedBatchNorm1d, nn.BatchNorm1d, batch_norm(1)),
    "GatedBatchNorm2d": (gated.GatedBatchNorm2d, nn.BatchNorm2d, batch_norm(2)),
    "GatedBatchNorm3d": (gated.GatedBatchNorm3d, nn.BatchNorm3d, batch_norm(3)),
    "GatedLayerNorm": (gated.GatedLayerNorm, nn.LayerNorm, layer_norm),
    "GatedRNN": (gated.GatedRNN, nn.RNN, recurrent),
    "GatedGRU": (gated.GatedGRU, nn.GRU, recurrent),
    "GatedLSTM": (gated.GatedLSTM, nn.LSTM, lstm),
}


def of(kind: str) -> Callable[[Draw], str | None]:
    build, dense, make = KINDS[kind]
    recurrent = "input_size", "hidden_size", "num_layers", "proj_size", "dropout", "bias", "batch_first"
    own_names = (*names_of(dense), *names_of(build), *recurrent)

    def target(draw: Draw) -> str | None:
        arguments, shape = make(draw)
        dtype = draw.choice((torch.float32, torch.float32, torch.float64))
        arguments["dtype"] = dtype
        how: dict[str, Any] = {}
        if draw.chance(0.3):
            extra = {"gate": draw.choice(FAMILIES), "granularity": draw.choice(("output", "input", "weight", (2, 2)))}
            extra |= {"per_sample": draw.chance(0.5), "widths": "own", "statistics": "open", "activation": "relu"}
            how = {name: extra[name] for name in draw.sample(sorted(extra), 2) if name in names_of(build)}
            if draw.chance(0.5) and how:
                how[draw.choice(sorted(how))] = nonsense(draw)
            return judge(Case(build, (), arguments | how, names=own_names))
        if draw.chance(0.35):
            corrupted(draw, arguments)
            layers = arguments.get("num_layers")
            if isinstance(layers, int) or (isinstance(layers, Tensor) and layers.numel() == 1 and not layers.is_meta):
                # Or torch itself would make names for all of them.
                arguments["num_layers"] = 0 if float(layers.real) > 9 else layers
            return judge(Case(build, (), arguments, names=own_names, like=lambda: dense(**arguments)))
        plain = dense(**arguments)
        layer = opened(build(**arguments))
        layer.load_state_dict(copy.deepcopy(plain.state_dict()))
        training = draw.chance(0.5)
        plain.train(training)
        layer.train(training)
        x = draw.tensor(shape, dtype)
        given: dict[str, Any] = {"input": x}
        if draw.chance(0.4):
            corrupted(draw, given)
        elif "hidden_size" in arguments and len(shape) == 3 and draw.chance(0.4):
            lengths = torch.full(
                (shape[0 if arguments["batch_first"] else 1],), shape[1 if arguments["batch_first"] else 0]
            )
            given["input"] = pack_padded_sequence(x, lengths, batch_first=arguments["batch_first"])
        case = Case(layer, (), given, names=("input", "x", "weight", "gate"), like=lambda: plain(**given))
        case.truth = (lambda: values(plain(**given))) if training and overflows(given["input"]) else None
        return judge(case)

    return target


def overflows(x: Any) -> bool:
    """Whether squares of numbers in x do, so that a norm of torch gives another result for another layout of x."""
    known = isinstance(x, Tensor) and x.layout == torch.strided and not x.is_meta and x.is_floating_point()
    return known and bool((x.abs() > torch.finfo(x.dtype).max ** 0.5).any())


def embedding(draw: Draw) -> str | None:
    arguments: dict[str, Any] = sizes(draw, num_embeddings=1, embedding_dim=1) | {
        "max_norm": draw.choice((None, None, 1.0))
    }
    arguments["padding_idx"] = draw.choice((None, 0))
    if draw.chance(0.4):
        corrupted(draw, arguments)
        return judge(
            Case(
                gated.GatedEmbedding,
                (),
                arguments,
                names=names_of(gated.GatedEmbedding),
                like=lambda: nn.Embedding(**arguments),
            )
        )
    plain = nn.Embedding(**arguments)
    layer = opened(gated.GatedEmbedding(**arguments, granularity=draw.choice(("output", "input"))))
    layer.load_state_dict(copy.deepcopy(plain.state_dict()))
    words = torch.randint(
        0, arguments["num_embeddings"], tuple(draw.size() for _ in range(draw.choice((0, 1, 2)))), generator=draw.torch
    )
    given: dict[str, Any] = {"input": words}
    if draw.chance(0.4):
        corrupted(draw, given)
    if draw.chance(0.1) and words.numel():
        given["input"] = torch.where(words == words.flatten()[0], draw.choice((-1, 10**6)), words)
    return judge(Case(layer, (), given, names=("input", "x"), like=lambda: plain(**given)))


def attention(draw: Draw) -> str | None:
    heads = draw.choice((1, 2, 3))
    arguments: dict[str, Any] = {
        "embed_dim": heads * draw.choice((1, 2, 5)),
        "num_heads": heads,
        "bias": draw.chance(0.7),
    }
    arguments |= {"add_bias_kv": draw.chance(0.2), "add_zero_attn": draw.chance(0.2), "batch_first": draw.chance(0.5)}
    if draw.chance(0.35):
        corrupted(draw, arguments)
        kind = gated.GatedMultiheadAttention
        return judge(Case(kind, (), arguments, names=names_of(kind), like=lambda: nn.MultiheadAttention(**arguments)))
    plain, layer = nn.MultiheadAttention(**arguments), opened(gated.GatedMultiheadAttention(**arguments))
    layer.load_state_dict(copy.deepcopy(plain.state_dict()))
    width, batch = arguments["embed_dim"], draw.choice((1, 2))
    q, k = (draw.tensor((draw.choice((1, 2, 4)),) * 1 + (batch, width), hostile=0.0) for _ in range(2))
    if arguments["batch_first"]:
        q, k = q.transpose(0, 1), k.transpose(0, 1)
    given: dict[str, Any] = {"query": q, "key": k, "value": k, "need_weights": draw.chance(0.5)}
    if draw.chance(0.4):
        corrupted(draw, given)
    return judge(Case(layer, (), given, names=tuple(given), like=lambda: plain(**given)))


def transformer(kind: str) -> Callable[[Draw], str | None]:
    build, dense = getattr(gated, f"GatedTransformer{kind}Layer"), getattr(nn, f"Transformer{kind}Layer")

    def target(draw: Draw) -> str | None:
        heads = draw.choice((1, 2))
        arguments: dict[str, Any] = {
            "d_model": heads * draw.choice((2, 4)),
            "nhead": heads,
            "dim_feedforward": draw.size(1),
            "dropout": 0.0,
        }
        arguments |= {
            "batch_first": draw.chance(0.5),
            "norm_first": draw.chance(0.5),
            "activation": draw.choice(("relu", "gelu")),
        }
        if draw.chance(0.4):
            corrupted(draw, arguments)
            own = (
                {"parts": draw.choice((("heads",), "heads", (), ("nonsense",), None, 3, ("sublayers", "neurons")))}
                if draw.chance(0.3)
                else {}
            )
            return judge(Case(build, (), arguments | own, names=names_of(build), like=lambda: dense(**arguments)))
        plain, layer = dense(**arguments), opened(build(**arguments))
        layer.load_state_dict(copy.deepcopy(plain.state_dict()))
        given = {
            name: draw.tensor((2, 3, arguments["d_model"]), hostile=0.0)
            for name in (["src"] if kind == "Encoder" else ["tgt", "memory"])
        }
        if draw.chance(0.4):
            corrupted(draw, given)
        return judge(Case(layer, (), given, names=tuple(given), like=lambda: plain(**given)))

    return target


def gate_layer(draw: Draw) -> str | None:
    shape = tuple(draw.size(1) for _ in range(draw.choice((1, 2, 3))))
    dim = draw.randrange(-len(shape), len(shape))
    arguments: dict[str, Any] = {
        "num_gates": shape[dim],
        "dim": dim,
        "per_sample": draw.chance(0.3) and dim % len(shape) != 0,
    }
    if draw.chance(0.3):
        arguments["index"] = torch.randint(0, arguments["num_gates"], (shape[dim],), generator=draw.torch)
    if draw.chance(0.4):
        corrupted(draw, arguments)
        return judge(Case(gated.Gate, (), arguments, names=names_of(gated.Gate)))
    layer = opened(gated.GatedActivation(**arguments)).train(draw.chance(0.5))
    given: dict[str, Any] = {"x": draw.tensor(shape, draw.dtype())}
    if draw.chance(0.4):
        corrupted(draw, given)
        return judge(Case(layer, (), given, names=("x", "gate", "dim")))
    return judge(Case(layer, (), given, names=("x", "gate", "dim"), valid=True, truth=lambda: given["x"].double()))


def small_layers(draw: Draw) -> str | None:
    """The plain layers that compaction leaves, and what takes modules."""
    linear = nn.Linear(4, 4)
    rnn = nn.LSTM(3, 4)
    makers: tuple[tuple[Any, dict[str, Any]], ...] = (
        (gated.Scale, {"scale": torch.ones(4), "dim": 1}),
        (gated.Residual, {"branch": linear, "scale": torch.ones(1)}),
        (gated.GatedResidual, {"branch": linear, "gate": "hard_concrete", "per_sample": False}),
        (gated.ScaledRNN, {"rnn": rnn, "scale": torch.ones(1, 4)}),
        (gated.StackedRNN, {"layers": [[nn.LSTM(3, 4)], [nn.LSTM(4, 2)]], "dropout": 0.1}),
        (gated.PrunedMultiheadAttention, {"embed_dim": 8, "num_heads": 4, "heads": [0, 2], "head_dim": 2}),
        (gated.GatedHeads.from_dense, {"layer": linear, "heads": 2, "weights_per_gate": 3.0, "gate": "hard_concrete"}),
        (
            gated.GatedLinear.from_dense,
            {"layer": linear, "gate": "hard_concrete", "granularity": "output", "per_sample": False},
        ),
        (gated.GatedLSTM.from_dense, {"layer": rnn, "gate": "hard_concrete", "widths": "own"}),
        (gated.GatedLayerNorm.from_dense, {"layer": nn.LayerNorm(4), "statistics": "open", "per_sample": False}),
        (gated.GatedBatchNorm1d.from_dense, {"layer": nn.BatchNorm1d(4), "activation": "relu", "per_sample": False}),
        (gated.GatedEmbedding.from_dense, {"layer": nn.Embedding(4, 3), "granularity": "input", "per_sample": False}),
        (gated.GatedMultiheadAttention.from_dense, {"layer": nn.MultiheadAttention(4, 2), "per_sample": False}),
        (
            gated.GatedTransformerEncoderLayer.from_dense,
            {"layer": nn.TransformerEncoderLayer(4, 2, 5), "parts": ("heads",)},
        ),
    )
    function, arguments = draw.choice(makers)
    if draw.chance(0.2):
        return judge(Case(function, (), arguments, names=names_of(function), valid=True))
    corrupted(draw, arguments)
    return judge(Case(function, (), arguments, names=names_of(function)))


GATES: tuple[tuple[Any, dict[str, Any]], ...] = (
    (
        gates.HardConcrete,
        {
            "num_gates": 3,
            "beta": 0.5,
            "gamma": -0.2,
            "zeta": 1.2,
            "preset": "median",
            "init_log_alpha": 1.0,
            "device": None,
        },
    ),
    (gates.HardConcrete, {"num_gates": 3, "droprate": 0.5}),
    (
        gates.DiffPrune,
        {
            "num_gates": 3,
            "shape": "A",
            "sharpness": 2.0,
            "init_phi": 0.3,
            "stochastic": True,
            "init_sigma": 0.2,
            "revive": None,
        },
    ),
    (
        gates.DifferentiableMask,
        {"num_gates": 3, "variant": "hard", "threshold": 0.1, "slope": 3.0, "slope_mode": "fixed", "init_alpha": 1.0},
    ),
    (
        gates.DiscriminativeMask,
        {"num_gates": 5, "k": 4.0, "alpha": 1.0, "order": "zero", "shape": "tanh", "init_beta": 1.0, "min_open": 1},
    ),
    (
        gates.DependencyGenerator,
        {"sizes": [3, 4], "direction": "forward", "input_width": 2, "init_scale": 0.5, "bias_init": 3.0},
    ),
    (gates.Fixed, {"values": torch.ones(3)}),
    (gates.PolyakAverage, {"decay": 0.9}),
    (gates.make_gate, {"gate": "dam", "num_gates": 4, "device": "cpu"}),
    (gates.place_gate, {"gate": "hard_concrete", "num_gates": 4, "device": "cpu", "per_sample": True}),
    (gates.foothill, {"x": torch.randn(3), "a": 1.0, "b": 2.0}),
    (gates.geometric_slope, {"step": 3, "steps": 10, "start": 1.0, "end": 50.0}),
    (gates.square_penalty, {"tensors": [torch.randn(3)], "lam": 0.1}),
    (gates.gate_generator, {"model": gated.GatedLinear(2, 2), "seed": 3}),
)


def families(draw: Draw) -> str | None:
    function, arguments = draw.choice(GATES)
    arguments = copy.deepcopy(arguments)
    if draw.chance(0.6):
        corrupted(draw, arguments)
        return judge(Case(function, (), arguments, names=names_of(function)))
    complaint = judge(Case(function, (), arguments, names=names_of(function), valid=True))
    made = function(**arguments)
    if complaint is not None or not isinstance(made, gates.Gate):
        return complaint
    given: dict[str, Any] = {"rows": draw.choice((None, 0, 1, 3))}
    if draw.chance(0.3):
        given["rows"] = nonsense(draw)
        return judge(Case(made, (), given, names=("rows",)))

    def every(rows: Any) -> tuple[Tensor, ...]:
        values = made.train()(rows)
        assert values.shape == ((made.num_gates,) if rows is None else (rows, made.num_gates)), values.shape
        assert torch.equal(made.eval()() != 0, made.is_open()), "is_open is not what evaluation does"
        assert bool(((made.open_probability() >= 0) & (made.open_probability() <= 1)).all()) or not isinstance(
            made, gates.HardConcrete
        )
        return values, made.deterministic()

    return judge(Case(every, (), given, names=("rows",), valid=True))


TARGETS = {
    **{kind: of(kind) for kind in KINDS},
    "GatedEmbedding": embedding,
    "GatedMultiheadAttention": attention,
    "GatedTransformerEncoderLayer": transformer("Encoder"),
    "GatedTransformerDecoderLayer": transformer("Decoder"),
    "Gate": gate_layer,
    "layers": small_layers,
    "families": families,
}
