"""Which layers a file tells without their own code: those of torch.nn, and those that compaction leaves."""

import copy

import pytest
import torch
from torch import nn

import dampr
from dampr.prune import inputs
from tests.prune.files.examples import transformers

LAYERS = [
    *(kind() for kind in (nn.Sigmoid, nn.Tanh, nn.Identity, nn.LogSigmoid, nn.Softsign, nn.Tanhshrink, nn.ReLU6,
    nn.Flatten)),
    nn.Hardtanh(-2, 3), nn.Softmax(1), nn.GELU("tanh"), nn.LeakyReLU(0.2), nn.ELU(0.5), nn.Softplus(2),
    nn.Threshold(0.1, 2), nn.PReLU(3),
    nn.Linear(4, 3, bias=False), nn.Bilinear(2, 3, 4), nn.Embedding(7, 3), nn.Embedding(7, 3, padding_idx=2,
    max_norm=1.5, sparse=True),
    nn.EmbeddingBag(7, 3, mode="sum"), nn.LSTM(4, 3), nn.LSTM(4, 3, 2, bias=False, batch_first=True,
    bidirectional=True, proj_size=2),
    nn.GRU(4, 3, 2, dropout=0.5), nn.RNN(4, 3, nonlinearity="relu"), nn.LSTMCell(4, 3), nn.RNNCell(4, 3,
    nonlinearity="relu"),
    nn.Conv1d(2, 4, 3, padding="same", groups=2), nn.Conv2d(2, 4, (3, 1), stride=(2, 1), padding_mode="circular",
    bias=False),
    nn.ConvTranspose2d(4, 2, 3, output_padding=1, stride=2, groups=2), nn.BatchNorm2d(3, affine=False),
    nn.BatchNorm1d(3, track_running_stats=False), nn.LayerNorm((3, 2), elementwise_affine=False), nn.GroupNorm(2, 4),
    nn.RMSNorm(4),
    nn.MaxPool2d(2, padding=1), nn.AdaptiveAvgPool2d((1, None)),
    nn.Upsample(scale_factor=2.0, mode="bilinear"), nn.Unflatten(1, (2, 3)), nn.Dropout2d(0.3), nn.PixelShuffle(2),
    nn.ZeroPad2d(1),
]  # fmt: skip


@pytest.mark.parametrize("layer", LAYERS, ids=str)
def test_layers_of_torch_nn_load_by_the_path_alone(tmp_path, layer):
    path = tmp_path / "layer.safetensors"
    model = nn.ModuleDict({"a": nn.Sequential(layer)})
    dampr.save(model, path)
    again = dampr.load(path)
    assert str(again) == str(model)
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in again.state_dict().items())
    plain = {
        k: v for k, v in vars(layer).items() if isinstance(v, bool | int | float | str | tuple) and k != "training"
    }
    assert {k: vars(again["a"][0])[k] for k in plain} == plain
    assert not any(t.is_meta for t in (*again.parameters(), *again.buffers()))


def test_a_recurrent_layer_computes_with_the_tensors_of_the_file(tmp_path):
    model = nn.LSTM(4, 3, 2, bidirectional=True).eval()
    dampr.save(model, tmp_path / "r.safetensors")
    x = torch.randn(5, 2, 4)
    for again in (
        dampr.load(tmp_path / "r.safetensors"),
        dampr.load(tmp_path / "r.safetensors", nn.LSTM(4, 3, 2, bidirectional=True)),
    ):
        assert torch.equal(again(x)[0], model(x)[0])


TRANSFORMERS = list(transformers())


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype stage:UserWarning")
@pytest.mark.parametrize(("model", "x"), TRANSFORMERS, ids=[type(model).__name__ for model, _ in TRANSFORMERS])
def test_transformers_load_by_the_path_alone(tmp_path, model, x):
    model.eval()
    for p in model.parameters():
        p.data.add_(torch.randn_like(p) * 0.1)
    dampr.save(model, tmp_path / "t.safetensors")
    again = dampr.load(tmp_path / "t.safetensors")
    with torch.no_grad():  # and without torch's fused paths, which ask other attributes
        right, found = (torch.utils._pytree.tree_leaves(m(*x)) for m in (model, again))
        assert all(torch.equal(a, b) for a, b in zip(right, found, strict=True))
    with inputs.unfused():
        right, found = (torch.utils._pytree.tree_leaves(m(*x)) for m in (model, again))
        assert all(torch.equal(a, b) for a, b in zip(right, found, strict=True))
    names = "training", "_qkv_same_embed_dim"
    for one, other in zip(model.modules(), again.modules(), strict=True):
        kept = {
            k: v
            for k, v in vars(one).items()
            if isinstance(v, bool | int | float | str | tuple) and (k[0] != "_" or k in names)
        }
        assert {k: vars(other)[k] for k in kept} == kept


@pytest.mark.parametrize("activation", ["relu", nn.Sigmoid()])
def test_a_compacted_transformer_loads_by_the_path_alone(tmp_path, activation):
    layer = nn.TransformerEncoderLayer(8, 4, 12, activation=activation, batch_first=True)
    words = torch.randint(20, (3, 5))
    model = nn.Sequential(
        nn.Embedding(20, 8), nn.TransformerEncoder(layer, 3, enable_nested_tensor=False), nn.Flatten(), nn.Linear(40, 3)
    )
    dampr.convert(model, example_inputs=words, exclude="1.layers.2.self_attn")
    for i, gated in enumerate(dampr.prune.gated_layers(model).values()):
        gated.gate.log_alpha.data[i % 3 :: 2] = -5
    small = dampr.compact(model, example_inputs=words).eval()
    assert [type(layer).__name__[:6] for layer in small[1].layers] == ["Pruned", "Pruned", "Transf"]
    dampr.save(small, tmp_path / "t.safetensors")
    again = dampr.load(tmp_path / "t.safetensors")
    assert torch.equal(again(words), small(words))
    assert str(again) == str(small)
    assert again.dampr_manifest == small.dampr_manifest


def unknown_transformers():
    """An activation without a name, a part of another kind, and a norm of its own."""
    layer, normed = nn.TransformerEncoderLayer(4, 2), nn.TransformerDecoderLayer(4, 2)
    layer.self_attn, normed.norm2 = nn.Identity(), nn.LayerNorm(4, eps=0.1)
    return nn.TransformerEncoderLayer(4, 2, activation=torch.sigmoid), layer, normed


def test_what_a_constructor_cannot_tell_needs_the_original(tmp_path):
    class Sub(nn.Linear):
        pass

    renamed = nn.Linear(3, 2)
    renamed.register_buffer("more", torch.zeros(2))
    for layer in (Sub(3, 2), renamed, nn.CrossEntropyLoss(weight=torch.ones(3)), *unknown_transformers()):
        dampr.save(nn.Sequential(layer), tmp_path / "x.safetensors")
        with pytest.raises(dampr.FileError, match="pass the dense original as model="):
            dampr.load(tmp_path / "x.safetensors")
        dampr.load(tmp_path / "x.safetensors", nn.Sequential(copy.deepcopy(layer)))


def test_a_layer_that_contradicts_itself_is_not_saved(tmp_path):
    model = nn.Sequential(nn.Linear(20, 6))
    model[0].out_features = 7
    with pytest.raises(dampr.FileError, match="model: layer '0': its widths .* do not go with 0.weight"):
        dampr.save(model, tmp_path / "x.safetensors")
    assert not list(tmp_path.iterdir())


def own_layers():
    """Every plain layer of dampr.nn, with the dense layer that it is put in the place of, and an input."""
    x, memory = torch.randn(5, 2, 8), torch.randn(4, 2, 8)
    rnn = nn.LSTM(8, 3, 2, bidirectional=True, proj_size=2)
    how = {"dropout": 0.2, "activation": "gelu", "layer_norm_eps": 1e-4, "norm_first": True}
    stock = {"norm_first": True, "dim_feedforward": 12}
    yield dampr.nn.Scale(torch.rand(8), -1), nn.ReLU(), (x,)
    yield dampr.nn.Residual(nn.Sequential(nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 8))), nn.Linear(8, 8), (x,)
    yield dampr.nn.Residual(dampr.nn.Scale(torch.rand(8), -1), torch.rand(1)), nn.ReLU(), (x,)
    yield dampr.nn.ScaledRNN(rnn, torch.rand(4, 2)), nn.LSTM(8, 4, 2), (x,)
    parts = [[nn.LSTM(8, 3), nn.LSTM(8, 2)], [nn.LSTM(5, 1), nn.LSTM(5, 4, proj_size=2)]]
    yield dampr.nn.StackedRNN(parts, 0.5), nn.LSTM(8, 4, 2, bidirectional=True), (x,)
    yield dampr.nn.PrunedMultiheadAttention(8, 4, 0.1, heads=(0, 3)), nn.MultiheadAttention(8, 4), (x, x, x)
    arguments = {"bias": False, "add_bias_kv": True, "add_zero_attn": True, "kdim": 3, "batch_first": True}
    inputs = torch.randn(2, 5, 8), torch.randn(2, 4, 3), torch.randn(2, 4, 8)
    yield (
        dampr.nn.PrunedMultiheadAttention(8, 4, **arguments, heads=(2,)),
        nn.MultiheadAttention(8, 4, **arguments),
        inputs,
    )
    yield (
        dampr.nn.PrunedTransformerEncoderLayer(8, 4, 3, **how, heads=(1, 2)),
        nn.TransformerEncoderLayer(8, 4, **stock),
        (x,),
    )
    yield (
        dampr.nn.PrunedTransformerEncoderLayer(8, 4, 0, bias=False, heads=None),
        nn.TransformerEncoderLayer(8, 4, 12),
        (x,),
    )
    left = {"heads": (), "memory_heads": (3,)}
    yield (
        dampr.nn.PrunedTransformerDecoderLayer(8, 4, 5, **how, **left),
        nn.TransformerDecoderLayer(8, 4, **stock),
        (x, memory),
    )
    yield nn.Identity(), nn.Linear(8, 8), (x,)


OWN = list(own_layers())


@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN:UserWarning")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("layer", "dense", "x"), OWN, ids=[type(layer).__name__ for layer, _, _ in OWN])
def test_plain_layers_of_dampr_round_trip(tmp_path, layer, dense, x, dtype):
    model = nn.ModuleDict({"a": nn.ModuleList([copy.deepcopy(layer)])}).to(dtype).eval()
    for p in model.parameters():
        p.data.add_(torch.randn_like(p) * 0.1)
    dampr.save(model, tmp_path / "own.safetensors")
    originals = nn.ModuleDict({"a": nn.ModuleList([copy.deepcopy(dense)])}).to(dtype)
    x = [t.to(dtype) for t in x]
    for again in (dampr.load(tmp_path / "own.safetensors"), dampr.load(tmp_path / "own.safetensors", originals)):
        assert str(again) == str(model)
        assert {n: (t.dtype, tuple(t.shape)) for n, t in again.state_dict().items()} == {
            n: (t.dtype, tuple(t.shape)) for n, t in model.state_dict().items()
        }
        assert not any(t.is_meta for t in (*again.parameters(), *again.buffers()))
        if dtype == torch.float32:
            right, found = (torch.utils._pytree.tree_leaves(m["a"][0](*x)) for m in (model, again))
            assert all(a is None or torch.equal(a, b) for a, b in zip(right, found, strict=True))
