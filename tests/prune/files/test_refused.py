"""Files that are damaged, forged or of another model are refused, and the model stays as it was."""

import copy
import json

import pytest
import torch
from torch import nn

import dampr
from dampr.prune.file_content import digest
from dampr.prune.file_layers import describe
from tests.prune.files.examples import X, forge, rewrite, sequential, with_manifest


def test_gated_models_are_refused(tmp_path):
    model = dampr.convert(sequential(), example_inputs=X)
    with pytest.raises(TypeError, match="layer '1' still has gates"):
        dampr.save(model, tmp_path / "x.safetensors")
    assert not list(tmp_path.iterdir())


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
        (lambda p: rewrite(p, lambda h: h.pop("__metadata__")), "no dampr manifest"),
        (lambda p: rewrite(p, lambda h: h["__metadata__"].update(dampr="{")), "no dampr manifest"),
        (lambda p: rewrite(p, with_manifest(lambda m: m.update(format=99))), "format 99, expected 1"),
        (lambda p: rewrite(p, lambda h: h["__metadata__"].update(dampr="[1, 2]")), r"format \[1, 2\], expected 1"),
        (lambda p: rewrite(p, lambda h: h["__metadata__"].update(dampr="[" * 100_000)), "no dampr manifest"),
        (lambda p: rewrite(p, with_manifest(lambda m: m.pop("sha256"))), "do not match the recorded SHA-256"),
        (
            lambda p: rewrite(p, with_manifest(lambda m: m["widths"]["0"].update(out_features=21))),
            "manifest do not match the recorded SHA-256",
        ),
        (
            lambda p: rewrite(p, with_manifest(lambda m: m["architecture"]["children"].pop("2"))),
            "manifest do not match the recorded SHA-256",
        ),
        (
            lambda p: rewrite(p, with_manifest(lambda m: m.update(compaction=None))),
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


def test_integers_do_not_become_floats_nor_the_reverse(saved):
    from safetensors.torch import load_file, save_file

    small, path = saved
    tensors = load_file(path)
    tensors["1.num_batches_tracked"] = tensors["1.num_batches_tracked"].float()
    manifest = {"format": 1, "widths": {}, "architecture": describe(small), "compaction": None}
    manifest["sha256"] = digest(manifest, tensors)
    save_file(tensors, path, metadata={"dampr": json.dumps(manifest)})
    with pytest.raises(dampr.FileError, match=r"1.num_batches_tracked' is torch.float32, but torch.int64"):
        dampr.load(path)


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
