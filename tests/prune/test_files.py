"""save and load: whole, readable without pickle, and refused when anything is off."""

import copy
import json
import os
import struct
import subprocess
import sys

import pytest
import torch
from torch import nn

import dampr
from dampr.prune import files, inputs
from dampr.prune.measure import count_macs

X = torch.randn(9, 20, generator=torch.Generator().manual_seed(3))


class Custom(nn.Module):
    """An architecture that only its own code can build, with a tied weight."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(20, 16), nn.Linear(16, 16), nn.Linear(16, 3)
        self.b.bias = self.a.bias

    def forward(self, x):
        return self.c(torch.relu(self.b(torch.relu(self.a(x)))))


def sequential():
    norm = nn.BatchNorm1d(30)
    return nn.Sequential(
        nn.Linear(20, 30), norm, nn.ReLU(inplace=True), nn.Dropout(0.1), nn.Linear(30, 4, bias=False), nn.Softmax(dim=1)
    )


def compacted(model, **convert):
    torch.manual_seed(1)
    dampr.convert(model, example_inputs=X, **convert)
    with torch.no_grad():
        for layer in dampr.prune.gated_layers(model).values():
            layer.gate.log_alpha[::3] = -5
    return dampr.compact(model, example_inputs=X).eval()


@pytest.fixture
def saved(tmp_path):
    small = compacted(sequential())
    dampr.save(small, tmp_path / "small.safetensors")
    return small, tmp_path / "small.safetensors"


def test_round_trip_by_the_path_alone(saved):
    small, path = saved
    again = dampr.load(path)
    assert torch.equal(again(X), small(X))
    assert str(again) == str(small)
    assert again.dampr_manifest == small.dampr_manifest
    assert [p.name for p in path.parent.iterdir()] == [path.name], "no partial file stays"


def test_round_trip_into_the_dense_original(saved):
    small, path = saved
    model = sequential()
    assert dampr.load(path, model) is model
    assert torch.equal(model(X), small(X))
    assert model[0].out_features == small[0].out_features == 20
    assert model[1].num_features == 20


def test_custom_model_with_tied_parameters(tmp_path):
    model = Custom()
    small = compacted(model, include=["a"])
    path = tmp_path / "c.safetensors"
    dampr.save(small, path)
    with pytest.raises(dampr.FileError, match="pass the dense original as model="):
        dampr.load(path)
    again = dampr.load(path, Custom())
    assert torch.equal(again(X), small(X))


def test_a_plain_model_that_was_never_gated_round_trips(tmp_path):
    model = sequential().eval()
    dampr.save(model, tmp_path / "plain.safetensors")
    assert torch.equal(dampr.load(tmp_path / "plain.safetensors")(X), model(X))


def test_gated_models_are_refused(tmp_path):
    model = dampr.convert(sequential(), example_inputs=X)
    with pytest.raises(TypeError, match="layer '1' still has gates"):
        dampr.save(model, tmp_path / "x.safetensors")
    assert not list(tmp_path.iterdir())


def _rewrite(path, change):
    """Rewrite the JSON header of a safetensors file."""
    data = path.read_bytes()
    size = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + size])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + size :])


def _manifest(change):
    def apply(header):
        manifest = json.loads(header["__metadata__"]["dampr"])
        change(manifest)
        header["__metadata__"]["dampr"] = json.dumps(manifest)

    return apply


def forge(path, change):
    """Change the manifest as somebody would who knows how to recompute the digest."""
    from safetensors.torch import load_file

    def apply(manifest):
        change(manifest)
        manifest["sha256"] = files._digest(manifest, load_file(path))

    _rewrite(path, _manifest(apply))


def _flip(path):
    data = bytearray(path.read_bytes())
    data[-1] ^= 0x40
    path.write_bytes(bytes(data))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda p: p.write_bytes(p.read_bytes()[:-10]), "not a whole safetensors file"),
        (lambda p: p.write_bytes(p.read_bytes()[:5]), "not a whole safetensors file"),
        (lambda p: p.write_bytes(b""), "not a whole safetensors file"),
        (lambda p: p.write_text("hello, this is text and not tensors at all"), "not a whole safetensors file"),
        (_flip, "do not match the recorded SHA-256"),
        (lambda p: _rewrite(p, lambda h: h.pop("__metadata__")), "no dampr manifest"),
        (lambda p: _rewrite(p, lambda h: h["__metadata__"].update(dampr="{")), "no dampr manifest"),
        (lambda p: _rewrite(p, _manifest(lambda m: m.update(format=99))), "format 99, expected 1"),
        (lambda p: _rewrite(p, lambda h: h["__metadata__"].update(dampr="[1, 2]")), r"format \[1, 2\], expected 1"),
        (lambda p: _rewrite(p, lambda h: h["__metadata__"].update(dampr="[" * 100_000)), "no dampr manifest"),
        (lambda p: _rewrite(p, _manifest(lambda m: m.pop("sha256"))), "do not match the recorded SHA-256"),
        (
            lambda p: _rewrite(p, _manifest(lambda m: m["widths"]["0"].update(out_features=21))),
            "manifest do not match the recorded SHA-256",
        ),
        (
            lambda p: _rewrite(p, _manifest(lambda m: m["architecture"]["children"].pop("2"))),
            "manifest do not match the recorded SHA-256",
        ),
        (
            lambda p: _rewrite(p, _manifest(lambda m: m.update(compaction=None))),
            "manifest do not match the recorded SHA-256",
        ),
    ],
)
def test_damaged_files_are_refused(saved, damage, message):
    _, path = saved
    damage(path)
    with pytest.raises(dampr.FileError, match=message):
        dampr.load(path)


def test_a_file_that_does_not_fit_leaves_the_model_as_it_was(saved):
    _, path = saved
    for other, message in (
        (
            nn.Sequential(nn.Linear(20, 10), nn.BatchNorm1d(10), nn.ReLU(), nn.Dropout(), nn.Linear(10, 4, bias=False)),
            "cannot come from",
        ),
        (nn.Sequential(nn.Linear(20, 30)), "only in the file"),
    ):
        before = {k: v.clone() for k, v in other.state_dict().items()}
        with pytest.raises(dampr.FileError, match=message):
            dampr.load(path, other)
        assert all(torch.equal(before[k], v) for k, v in other.state_dict().items())
        assert other.training


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"path='.*none.safetensors'"):
        dampr.load(tmp_path / "none.safetensors")


def test_no_pickle_is_involved(saved, monkeypatch):
    import pickle

    def forbidden(*args, **kwargs):
        raise AssertionError("pickle was used")

    for name in ("load", "loads", "dump", "dumps", "Unpickler", "Pickler"):
        monkeypatch.setattr(pickle, name, forbidden)
    small, path = saved
    dampr.save(small, path)
    dampr.load(path)


def child(name, **changes):
    return lambda m: m["architecture"]["children"][name].update(changes)


def linear(**arguments):
    return child("0", arguments={"in_features": 20, "out_features": 20, **arguments})


SQUARE = {"in_channels": 2, "out_channels": 2, "kernel_size": 1}
FORGED = [
    (lambda m: m.pop("widths"), "widths has to map"),
    (lambda m: m.update(widths=[1]), "widths has to map"),
    (lambda m: m.update(widths={"0": 3}), "widths has to map"),
    (lambda m: m["widths"]["0"].update(out_features="20"), "widths has to map"),
    (lambda m: m["widths"]["0"].update(out_features=True), "widths has to map"),
    (lambda m: m["widths"]["0"].update(out_features=-20), "widths has to map"),
    (lambda m: m["widths"]["0"].update(out_features=10**30), "widths has to map"),
    (lambda m: m.pop("architecture"), "architecture has to be an object or null"),
    (lambda m: m.update(architecture="Sequential"), "architecture has to be an object or null"),
    (lambda m: m.update(compaction=[1]), "compaction has to be an object or null"),
    (lambda m: m.pop("compaction"), "compaction has to be an object or null"),
    (lambda m: m["widths"].update({"9": {"out_features": 3}}), "model has no size 9.out_features"),
    (lambda m: m["widths"]["0"].update(forward=3), "model has no size 0.forward"),
    (lambda m: m["widths"]["0"].update(num_features=3), "model has no size 0.num_features"),
    (lambda m: m["widths"]["0"].update(out_features=21), "layer '0': its widths .* do not go with 0.weight"),
    (lambda m: m["widths"]["1"].update(num_features=19), "layer '1': its widths .* do not go with 1.weight"),
    (
        lambda m: m["widths"]["4"].update(in_features=10**7, out_features=10**7),
        "layer '4': its widths .* do not go with 4.weight",
    ),
    (lambda m: m["architecture"].pop("type"), "has to be an object with a type"),
    (lambda m: m["architecture"].pop("children"), "comes without children or arguments"),
    (lambda m: m["architecture"].update(children=[1]), "comes without children or arguments"),
    (lambda m: m["architecture"]["children"].update({"0": 7}), "7 has to be an object with a type"),
    (
        lambda m: m["architecture"]["children"].update({"a.b": {"type": "ReLU", "arguments": {}}}),
        "'a.b' cannot be in torch.nn.Sequential",
    ),
    (
        lambda m: m["architecture"]["children"].update({"forward": {"type": "ReLU", "arguments": {}}}),
        "'forward' cannot be in",
    ),
    (lambda m: m["architecture"]["children"].pop("0"), "does not fit model; only in the file"),
    (child("0", type="Module"), "names 'Module': expected a class of torch.nn"),
    (child("0", type="os.system"), "names 'os.system': expected a class of torch.nn"),
    (child("0", type=["Linear"]), "has to be an object with a type"),
    (child("0", type="LazyLinear", arguments={"out_features": 20}), "'0.weight'"),
    (child("0", arguments=None), "comes without children or arguments"),
    (
        linear(out_features=10**7, in_features=10**7),
        r"'0.weight' has shape \(20, 20\), which cannot come from \(10000000, 10000000\)",
    ),
    (linear(out_features=-3), "Linear does not take"),
    (linear(out_features="x"), "Linear does not take"),
    (linear(out_features=[20]), "Linear does not take"),
    (linear(out_features=10**30), "Linear does not take"),
    (linear(device="cpu"), "Linear does not take"),
    (child("1", arguments={"num_features": 20, "eps": "x"}), "BatchNorm1d does not take eps='x', expected"),
    (child("1", arguments={"num_features": 20, "eps": float("nan")}), "BatchNorm1d does not take eps=nan"),
    (child("1", arguments={"num_features": 20, "affine": 1}), "BatchNorm1d does not take affine=1, expected"),
    (child("1", type="ConvTranspose2d", arguments=SQUARE | {"output_padding": "x"}), "output_padding='x'"),
    (child("0", type="LSTM", arguments={"input_size": 3, "hidden_size": 3, "num_layers": 10**9}), "LSTM does not take"),
]


@pytest.mark.parametrize(("change", "message"), FORGED, ids=[message for _, message in FORGED])
def test_a_manifest_with_a_good_digest_is_still_not_believed(saved, change, message):
    _, path = saved
    forge(path, change)
    with pytest.raises(dampr.FileError, match=message):
        dampr.load(path)


def test_widths_of_layers_that_a_file_builds_are_those_they_were_built_with(tmp_path):
    model = nn.Sequential(dampr.nn.PrunedMultiheadAttention(8, 4, heads=(0, 3)))
    dampr.save(model, tmp_path / "attention.safetensors")
    forge(tmp_path / "attention.safetensors", lambda m: m["widths"]["0"].update(head_dim=2**62))
    for original in (None, nn.Sequential(nn.MultiheadAttention(8, 4))):
        with pytest.raises(dampr.FileError, match=r"widths: 0.head_dim=4611686018427387904, expected 2,"):
            dampr.load(tmp_path / "attention.safetensors", original)
    model = nn.Sequential(nn.Conv2d(4, 8, 1), nn.GroupNorm(2, 8), nn.ConvTranspose2d(8, 2, 1))
    dampr.save(model, tmp_path / "groups.safetensors")
    forge(tmp_path / "groups.safetensors", lambda m: m["widths"]["1"].update(num_groups=3))
    with pytest.raises(dampr.FileError, match=r"GroupNorm does not take .*'num_groups': 3"):
        dampr.load(tmp_path / "groups.safetensors", copy.deepcopy(model))
    dampr.save(model, tmp_path / "groups.safetensors")
    how = {"in_channels": 8, "out_channels": 2, "kernel_size": 1, "padding": [0, 0, 0]}
    forge(tmp_path / "groups.safetensors", child("2", arguments=how))
    with pytest.raises(dampr.FileError, match=r"layer '2': ConvTranspose2d.*expected 2 numbers of each argument"):
        dampr.load(tmp_path / "groups.safetensors")


@pytest.mark.parametrize(("change", "message"), FORGED[11:17], ids=[message for _, message in FORGED[11:17]])
def test_forged_widths_leave_the_dense_original_as_it_was(saved, change, message):
    _, path = saved
    forge(path, change)
    model = sequential()
    before, text = copy.deepcopy(model.state_dict()), str(model)
    with pytest.raises(dampr.FileError, match=message):
        dampr.load(path, model)
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert str(model) == text
    assert model.training


def test_other_dtypes_stay_what_they_are(tmp_path):
    path = tmp_path / "half.safetensors"
    mixed = nn.Sequential(nn.Linear(20, 6).bfloat16(), nn.BatchNorm1d(6), nn.Linear(6, 2).double()).eval()
    dampr.save(mixed, path)
    again = dampr.load(path)
    assert {k: v.dtype for k, v in again.state_dict().items()} == {k: v.dtype for k, v in mixed.state_dict().items()}
    wrong = nn.Sequential(nn.Linear(20, 6), nn.BatchNorm1d(6), nn.Linear(6, 2))
    with pytest.raises(dampr.FileError, match=r"'0.weight' is torch.bfloat16, but torch.float32 in model"):
        dampr.load(path, wrong)
    assert wrong[0].weight.dtype == torch.float32
    assert dampr.load(path, copy.deepcopy(mixed))[2].weight.dtype == torch.float64


def test_integers_do_not_become_floats_nor_the_reverse(saved):
    from safetensors.torch import load_file, save_file

    small, path = saved
    tensors = load_file(path)
    tensors["1.num_batches_tracked"] = tensors["1.num_batches_tracked"].float()
    manifest = {"format": 1, "widths": {}, "architecture": files._describe(small), "compaction": None}
    manifest["sha256"] = files._digest(manifest, tensors)
    save_file(tensors, path, metadata={"dampr": json.dumps(manifest)})
    with pytest.raises(dampr.FileError, match=r"1.num_batches_tracked' is torch.float32, but torch.int64"):
        dampr.load(path)


@pytest.mark.parametrize("reader", [nn.Linear(12, 3, bias=False), nn.Linear(12, 3)])
def test_a_bias_that_compaction_added_comes_back(tmp_path, reader):
    """The half of a sigmoid that a closed unit leaves behind moves into the bias of the reader."""
    dense = nn.Sequential(nn.Linear(20, 12), nn.Sigmoid(), reader, nn.Linear(3, 2))
    small = compacted(copy.deepcopy(dense), include=["0"])
    assert small[2].bias is not None
    path = tmp_path / "bias.safetensors"
    dampr.save(small, path)
    for again in (dampr.load(path), dampr.load(path, copy.deepcopy(dense))):
        assert torch.equal(again(X), small(X))
        assert str(again) == str(small)
        assert [n for n, _ in again.named_parameters()] == [n for n, _ in small.named_parameters()]
        assert again[2].bias.requires_grad


def test_only_linear_and_conv_layers_gain_a_bias(tmp_path):
    dampr.save(nn.Sequential(nn.LayerNorm(4)), tmp_path / "n.safetensors")
    with pytest.raises(dampr.FileError, match=r"only in the file: \['0.bias'\]"):
        dampr.load(tmp_path / "n.safetensors", nn.Sequential(nn.LayerNorm(4, bias=False)))
    conv = nn.Sequential(nn.Conv2d(3, 4, 3))
    dampr.save(conv, tmp_path / "c.safetensors")
    again = dampr.load(tmp_path / "c.safetensors", nn.Sequential(nn.Conv2d(3, 4, 3, bias=False)))
    assert torch.equal(again[0].bias, conv[0].bias)


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


def transformers():
    """Attention, transformer layers and stacks of torch.nn, with inputs."""
    x, memory, causal = torch.randn(2, 5, 8), torch.randn(2, 4, 8), nn.Transformer.generate_square_subsequent_mask(5)
    how = {"dim_feedforward": 12, "batch_first": True}
    other = {"dropout": 0.3, "layer_norm_eps": 1e-3, "norm_first": True, "bias": False}
    yield nn.MultiheadAttention(8, 4), (x, x, x)
    yield (
        nn.MultiheadAttention(8, 2, 0.1, bias=False, add_bias_kv=True, add_zero_attn=True, kdim=3, batch_first=True),
        (x, x[..., :3], x),
    )
    yield nn.TransformerEncoderLayer(8, 4, **how), (x, causal)
    yield nn.TransformerEncoderLayer(8, 4, activation="gelu", **how, **other), (x,)
    yield nn.TransformerEncoderLayer(8, 4, activation=nn.LeakyReLU(0.2), **how), (x,)
    yield nn.TransformerDecoderLayer(8, 4, 12), (x.transpose(0, 1), memory.transpose(0, 1))
    yield nn.TransformerDecoderLayer(8, 4, activation=nn.PReLU(), **how, **other), (x, memory, causal)
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 4, **how), 2)
    yield encoder, (x, None, torch.arange(5) >= torch.tensor([[5], [3]]))
    first, second = nn.TransformerEncoderLayer(8, 4, **how), nn.TransformerEncoderLayer(8, 2, 7, batch_first=True)
    unlike = nn.TransformerEncoder(first, 2, nn.LayerNorm(8), enable_nested_tensor=False, mask_check=False)
    unlike.layers[1] = second
    yield unlike, (x,)
    yield nn.TransformerDecoder(nn.TransformerDecoderLayer(8, 4, **how), 2, nn.RMSNorm(8)), (x, memory)
    yield nn.Transformer(8, 2, 1, 2, 12, activation="gelu", batch_first=True), (memory, x)


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


def composite(change, *names):
    """Change the description of a part of a transformer: by "children" and "arguments" on the way."""

    def apply(manifest):
        found = manifest["architecture"]["children"]["0"]
        for name in names:
            found = found["children"][name]
        change(found)

    return apply


LAYER = ("layers", "0")
TRANSFORMER_FORGED = [
    (composite(lambda d: d.pop("arguments")), "TransformerEncoder comes without arguments and children of its own"),
    (composite(lambda d: d["children"].pop("layers")), "TransformerEncoder does not take"),
    (
        composite(lambda d: d["children"].update(layers={"type": "ReLU", "arguments": {}})),
        r"layers=ReLU\(\): expected ModuleList",
    ),
    (
        composite(lambda d: d["children"].update(norm={"type": "os.system"})),
        "names 'os.system': expected a class of torch.nn",
    ),
    (
        composite(lambda d: d["arguments"].update(norm="system")),
        "TransformerEncoder comes without arguments and children of its own",
    ),
    (
        composite(lambda d: (d["children"].pop("norm"), d["arguments"].update(norm="system"))),
        "norm='system': expected Module",
    ),
    (composite(lambda d: d["arguments"].update(use_nested_tensor="yes")), "use_nested_tensor='yes': expected bool"),
    (composite(lambda d: d["arguments"].update(num_layers=10**9)), "TransformerEncoder does not take"),
    (composite(lambda d: d["children"].pop("1"), "layers"), "does not fit model; only in the file: .'0.layers.1"),
    (composite(lambda d: d["arguments"].update(nhead=3), *LAYER), "TransformerEncoderLayer does not take .*divisible"),
    (
        composite(lambda d: d["arguments"].update(d_model=16), *LAYER),
        "tensor '0.layers.0.self_attn.in_proj_weight' has shape",
    ),
    (
        composite(lambda d: d["arguments"].update(dim_feedforward=10**8), *LAYER),
        "tensor '0.layers.0.linear1.weight' has shape",
    ),
    (composite(lambda d: d["arguments"].update(bias=False), *LAYER), "only in the file: .*in_proj_bias"),
    (
        composite(lambda d: d["arguments"].update(activation="os.system"), *LAYER),
        "activation should be relu/gelu, not os.system",
    ),
    (composite(lambda d: d["arguments"].update(activation=7), *LAYER), "activation=7: expected str or Module"),
    (composite(lambda d: d["arguments"].update(dropout="x"), *LAYER), "TransformerEncoderLayer does not take"),
    (
        composite(lambda d: d["arguments"].update(device="cpu"), *LAYER),
        "comes without arguments and children of its own",
    ),
    (composite(lambda d: d.update(type="TransformerDecoderLayer"), *LAYER), "only in the model: .*multihead_attn"),
    (composite(lambda d: d.update(type="MultiheadAttention"), *LAYER), "MultiheadAttention does not take"),
    (
        lambda m: m["widths"]["0.layers.0.self_attn"].update(num_heads=3),
        "layer '0.layers.0.self_attn': .*MultiheadAttention does not take",
    ),
    (
        lambda m: m["widths"]["0.layers.1.linear1"].update(out_features=11),
        "layer '0.layers.1.linear1': its widths .* do not go with",
    ),
]


@pytest.mark.parametrize(("change", "message"), TRANSFORMER_FORGED, ids=[message for _, message in TRANSFORMER_FORGED])
def test_a_forged_transformer_is_not_believed(tmp_path, change, message):
    layer = nn.TransformerEncoderLayer(8, 4, 12, batch_first=True)
    dampr.save(nn.Sequential(nn.TransformerEncoder(layer, 2, nn.LayerNorm(8))), tmp_path / "t.safetensors")
    forge(tmp_path / "t.safetensors", change)
    with pytest.raises(dampr.FileError, match=message):
        dampr.load(tmp_path / "t.safetensors")


def test_layers_used_twice(tmp_path):
    act, tied = nn.ReLU(), nn.Linear(20, 20)
    dampr.save(nn.Sequential(nn.Linear(20, 20), act, nn.Linear(20, 20), act), tmp_path / "act.safetensors")
    assert len(dampr.load(tmp_path / "act.safetensors")) == 4
    model = nn.Sequential(tied, act, tied)
    dampr.save(model, tmp_path / "tied.safetensors")
    with pytest.raises(dampr.FileError, match="pass the dense original as model="):
        dampr.load(tmp_path / "tied.safetensors")
    original = copy.deepcopy(model)
    again = dampr.load(tmp_path / "tied.safetensors", original)
    assert torch.equal(again(X), model(X))
    assert again[0].weight is again[2].weight


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


def leftover(change):
    return lambda m: change(m["leftovers"]["1"])


OWN_FORGED = [
    (lambda m: m.update(leftovers=[1]), "leftovers has to map"),
    (lambda m: m["leftovers"].update({"9": m["leftovers"]["1"]}), "does not fit model; only in the file: .'9'"),
    (leftover(lambda d: d.update(type="System")), "names 'System': expected a class of torch.nn"),
    (leftover(lambda d: d.pop("arguments")), "PrunedMultiheadAttention comes without arguments and children"),
    (leftover(lambda d: d["arguments"].update(heads=[0, 10**9])), "PrunedMultiheadAttention does not take"),
    (
        leftover(lambda d: d["arguments"].update(heads=[0, 1, 2])),
        "layer '1': what it is does not go with 1.in_proj_weight",
    ),
    (
        leftover(lambda d: d["arguments"].update(embed_dim=10**8)),
        "layer '1': what it is does not go with 1.q_proj_weight",
    ),
    (leftover(lambda d: d["arguments"].update(add_bias_kv=True)), "layer '1': what it is does not go with 1.bias_k"),
    (leftover(lambda d: d["arguments"].update(device="cpu")), "comes without arguments and children of its own"),
    (
        leftover(lambda d: d.update(type="Residual", arguments={"branch": {}, "scaled": False})),
        "Residual does not take",
    ),
    (leftover(lambda d: d.update(type="ScaledRNN", arguments={"rnn": "os.system"})), "ScaledRNN does not take"),
    (
        leftover(lambda d: d.update(type="StackedRNN", arguments={"layers": [], "dropout": 0.5})),
        "StackedRNN does not take",
    ),
    (leftover(lambda d: d.update(type="Scale", arguments={"num_features": 10**30, "dim": 1})), "Scale does not take"),
]


@pytest.mark.parametrize(("change", "message"), OWN_FORGED, ids=[message for _, message in OWN_FORGED])
def test_forged_leftovers_leave_the_dense_original_as_it_was(tmp_path, change, message):
    path = tmp_path / "own.safetensors"
    dampr.save(nn.Sequential(nn.Linear(8, 8), dampr.nn.PrunedMultiheadAttention(8, 4, heads=(0, 3))), path)
    forge(path, change)
    model = nn.Sequential(nn.Linear(8, 8), nn.MultiheadAttention(8, 4))
    before, modules = copy.deepcopy(model.state_dict()), list(model.modules())
    with pytest.raises(dampr.FileError, match=message):
        dampr.load(path, model)
    assert list(model.modules()) == modules
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


def test_a_pruned_transformer_loads_into_its_dense_original(tmp_path):
    class Model(nn.Module):
        """What only its own code can build."""

        def __init__(self):
            super().__init__()
            layer = nn.TransformerEncoderLayer(8, 4, 12, batch_first=True)
            self.encoder, self.head = nn.TransformerEncoder(layer, 3), nn.Linear(8, 3)

        def forward(self, x):
            return self.head(self.encoder(x).mean(1))

    model, x = Model(), torch.randn(2, 5, 8)
    dampr.convert(model, example_inputs=x, exclude="encoder.layers.2.self_attn")
    for i, layer in enumerate(dampr.prune.gated_layers(model).values()):
        layer.gate.log_alpha.data[i % 3 :: 2] = -5
    small = dampr.compact(model, example_inputs=x).eval()
    assert [type(layer).__name__[:6] for layer in small.encoder.layers] == ["Pruned", "Pruned", "Transf"]
    dampr.save(small, tmp_path / "t.safetensors")
    again = dampr.load(tmp_path / "t.safetensors", Model())
    assert torch.equal(again(x), small(x))
    assert str(again) == str(small)
    assert again.dampr_manifest == small.dampr_manifest
    with pytest.raises(dampr.FileError, match="pass the dense original as model="):
        dampr.load(tmp_path / "t.safetensors")


def test_a_file_without_leftovers_still_loads(saved):
    small, path = saved
    forge(path, lambda m: m.pop("leftovers"))
    assert torch.equal(dampr.load(path)(X), small(X))


def test_two_processes_may_save_to_one_path(tmp_path):
    """Each writes a file of its own first: what is loaded meanwhile is one of the two, whole."""
    script = (
        "import sys, torch, dampr\ntorch.manual_seed(int(sys.argv[1]))\n"
        "net = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 4))\n"
        "for _ in range(60):\n    dampr.save(net, sys.argv[2])\n"
    )
    path = tmp_path / "model.safetensors"
    dampr.save(nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 4)), path)
    writers = [
        subprocess.Popen([sys.executable, "-W", "ignore", "-c", script, str(seed), str(path)]) for seed in (0, 1)
    ]
    loads = 0
    while any(writer.poll() is None for writer in writers):
        dampr.load(path)  # FileError if damaged
        loads += 1
    assert [writer.wait() for writer in writers] == [0, 0]
    assert loads > 10
    assert [file.name for file in tmp_path.iterdir()] == ["model.safetensors"]


def test_a_save_that_fails_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "model.safetensors"
    dampr.save(nn.Linear(4, 2), path)
    before = path.read_bytes()
    monkeypatch.setattr(os, "fsync", lambda handle: (_ for _ in ()).throw(OSError("no space left")))
    with pytest.raises(OSError, match="no space left"):
        dampr.save(nn.Linear(4, 3), path)
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["model.safetensors"]
    with pytest.raises(FileNotFoundError, match="expected it in a folder that exists"):
        dampr.save(nn.Linear(4, 2), tmp_path / "nowhere" / "model.safetensors")


def writers(folder):
    """What writes files that others read, each twice in one place: (path, how)."""
    from dampr import records
    from dampr.ops import thresholds

    def plan(folder):
        transformers = pytest.importorskip("transformers")
        from dampr.integrations import huggingface

        (folder / "checkpoint-3").mkdir(exist_ok=True)
        made = dampr.Plan(sequential(), torch.randn(4, 20), macs=0.7, steps=50)
        state = transformers.TrainerState(global_step=3, is_world_process_zero=True)
        huggingface.PlanCallback(made).on_save(type("Arguments", (), {"output_dir": str(folder)}), state, None)

    return {
        "model": ("m", lambda: dampr.save(nn.Linear(4, 2), folder / "m")),
        "json": ("r.json", lambda: records.write_json(folder / "r.json", [1])),
        "rows": ("r.jsonl", lambda: records.write_jsonl(folder / "r.jsonl", [{"a": 1}])),
        "thresholds": (thresholds.path(), lambda: thresholds.write(0.5, 0.4)),
        "plan": ("checkpoint-3/dampr_plan.pt", lambda: plan(folder)),
    }


@pytest.mark.parametrize("name", ["model", "json", "rows", "thresholds", "plan"])
def test_whatever_is_written_appears_whole_and_is_on_the_disk_before(tmp_path, monkeypatch, name):
    monkeypatch.setenv("DAMPR_CACHE", str(tmp_path / "cache"))
    path, write = writers(tmp_path)[name]
    write()
    file, seen, replace = tmp_path / path, [], os.replace
    monkeypatch.setattr(os, "fsync", lambda handle: seen.append("fsync"))
    monkeypatch.setattr(os, "replace", lambda a, b: (seen.append((str(a), str(b))), replace(a, b)))
    write()
    assert seen[0] == "fsync"
    partial, target = seen[1]
    assert target == str(file)
    assert partial not in (f"{file}.partial", str(file))
    before = file.read_bytes()
    monkeypatch.setattr(os, "fsync", lambda handle: (_ for _ in ()).throw(OSError("no space left")))
    with pytest.raises(OSError, match="no space left"):
        write()
    assert file.read_bytes() == before
    assert not list(file.parent.glob("*.partial")) + list(file.parent.glob(".*.partial"))


def test_a_link_stays_a_link_and_a_folder_is_no_file(tmp_path):
    (tmp_path / "latest").symlink_to(tmp_path / "model")
    dampr.save(nn.Linear(4, 2), tmp_path / "latest")
    assert (tmp_path / "latest").is_symlink()
    assert dampr.load(tmp_path / "model").in_features == 4
    with pytest.raises(IsADirectoryError, match=r"^path=.*: expected a file, it is a folder"):
        dampr.save(nn.Linear(4, 2), tmp_path)


def test_gains_that_gates_made_are_loaded_into_the_dense_original(tmp_path):
    """A norm without gain has one after compaction, where gates are not 1; of the dtype of the model."""
    torch.manual_seed(0)
    x = torch.randn(4, 3, 8, 8, dtype=torch.float64)
    for how in ({"affine": False}, {"affine": False, "track_running_stats": False}):
        dense = (
            nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8, **how), nn.ReLU(), nn.Conv2d(8, 2, 1)).double().eval()
        )
        gated = dampr.convert(copy.deepcopy(dense), example_inputs=x)
        assert dampr.Budget(gated, x, macs=0.9).total == count_macs(dense, x)
        (gate,) = {layer.gate for layer in dampr.prune.gated_layers(gated).values()}
        gate.set_levels_(torch.where(torch.arange(8) < 3, -1.0, torch.rand(8)))
        small = dampr.compact(gated, example_inputs=x)
        assert small[0].out_channels < 8
        torch.testing.assert_close(small(x), gated(x), rtol=1e-9, atol=1e-9)
        dampr.save(small, tmp_path / "small.safetensors")
        for loaded in (dampr.load(tmp_path / "small.safetensors", dense), dampr.load(tmp_path / "small.safetensors")):
            torch.testing.assert_close(loaded(x), small(x), rtol=1e-12, atol=1e-12)
            assert loaded[1].affine == (loaded[1].weight is not None) == (how == {"affine": False})
