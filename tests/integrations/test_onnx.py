"""Compacted models as ONNX files: onnxruntime computes what they compute, or nothing is written."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dampr
from dampr.prune import inputs
from tests import models
from tests.prune.test_models import close_at_random, trained

onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

from dampr.integrations import onnx  # noqa: E402
from tests.long import long_if  # noqa: E402


def run(path: Path, *given: Tensor) -> list[Tensor]:
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    named = {entry.name: x.numpy() for entry, x in zip(session.get_inputs(), given, strict=True)}
    return [torch.from_numpy(y) for y in session.run(None, named)]


def check(model: nn.Module, path: Path, example: Any, *given: Tensor, **how: Any) -> None:
    """Export, and hold what the file says to what the model says on other inputs, relative to their norm."""
    onnx.export(model, path, example_inputs=example, **how)
    with inputs.unfused(), torch.no_grad():
        expected = inputs.tensors(model.eval()(**example) if isinstance(example, dict) else model.eval()(*given))
    found = run(path, *given)
    assert [y.shape for y in found] == [y.shape for y in expected]
    for y, right in zip(found, expected, strict=True):
        assert float((y - right).norm()) <= 1e-5 * float(right.norm())
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def compacted(name: str) -> tuple[nn.Module, nn.Module, Tensor]:
    model, x = models.ALL[name]()
    dampr.convert(trained(model), example_inputs=x)
    close_at_random(model)
    return model, dampr.compact(model, example_inputs=x), x


@pytest.mark.parametrize("name", [long_if(name, "resnet50", "mobilenet_v3", "shufflenet") for name in models.ALL])
def test_onnxruntime_computes_what_a_compacted_model_does(name: str, tmp_path: Path) -> None:
    _, small, x = compacted(name)
    check(small, tmp_path / "small.onnx", x, torch.randn_like(x))


def test_the_file_of_a_pruned_model_is_smaller_by_what_was_cut(tmp_path: Path) -> None:
    _, small, x = compacted("vgg")
    dense, _ = models.vgg()
    for name, model in (("dense", dense), ("small", small)):
        onnx.export(model, tmp_path / name, example_inputs=x)
    cut = sum(p.numel() for p in dense.parameters()) - sum(p.numel() for p in small.parameters())
    assert (tmp_path / "dense").stat().st_size - (tmp_path / "small").stat().st_size > 0.9 * 4 * cut > 0


class Tagger(nn.Module):
    def __init__(self, kind: Any) -> None:
        super().__init__()
        self.embedding, self.rnn, self.head = nn.Embedding(20, 8), kind(8, 6, 2, batch_first=True), nn.Linear(6, 3)

    def forward(self, words: Tensor) -> Tensor:
        return self.head(torch.tanh(self.rnn(self.embedding(words))[0]))


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
def test_recurrent_models_with_what_gates_leave_of_them(kind: Any, tmp_path: Path) -> None:
    model, words = Tagger(kind), torch.randint(20, (3, 5))
    dampr.convert(model, example_inputs=words)
    close_at_random(model)
    model.rnn.gate.log_alpha.data[-1] = 0.5  # a gate between 0 and 1
    small = dampr.compact(model, example_inputs=words)
    assert type(small.rnn) is dampr.nn.ScaledRNN
    check(small, tmp_path / "small.onnx", words, torch.randint(20, (3, 5)))


@pytest.mark.parametrize("kind", [long_if(kind, nn.LSTM, nn.RNN) for kind in (nn.LSTM, nn.GRU, nn.RNN)])
def test_recurrent_layers_with_widths_of_their_own(kind: Any, tmp_path: Path) -> None:
    model, words = Tagger(kind), torch.randint(20, (3, 5))
    model.rnn = kind(8, 3, 2, batch_first=True, bidirectional=True)
    dampr.convert(model, example_inputs=words)
    model.rnn.widths = "own"
    model.rnn.gate.log_alpha.data[[0, 1, 4, 9]] = -9
    small = dampr.compact(model, example_inputs=words)
    assert small.rnn.widths == [1, 2, 3, 2]
    check(small, tmp_path / "small.onnx", words, torch.randint(20, (3, 5)))


class Translator(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        how = {"dim_feedforward": 12, "batch_first": True}
        self.encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 4, **how), 2)
        self.decoder = nn.TransformerDecoder(nn.TransformerDecoderLayer(8, 4, **how), 2)

    def forward(self, src: Tensor, tgt: Tensor, padding: Tensor) -> Tensor:
        memory = self.encoder(src, src_key_padding_mask=padding)
        return self.decoder(tgt, memory, memory_key_padding_mask=padding)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype stage:UserWarning")
def test_pruned_transformer_layers(tmp_path: Path) -> None:
    model, padding = Translator(), torch.arange(5) >= torch.tensor([[5], [3]])
    example = {"src": torch.randn(2, 5, 8), "tgt": torch.randn(2, 4, 8), "padding": padding}
    dampr.convert(model, example_inputs=example)
    close_at_random(model)
    small = dampr.compact(model, example_inputs=example)
    kinds = {type(layer).__name__ for layer in small.modules()}
    assert {"PrunedTransformerEncoderLayer", "PrunedTransformerDecoderLayer", "PrunedMultiheadAttention"} <= kinds
    check(small, tmp_path / "small.onnx", example, *example.values())


def test_a_pruned_model_of_transformers(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    from tests.integrations.test_huggingface import pruned

    _, x, small = pruned("bert")
    check(small, tmp_path / "small.onnx", x, *x.values())


def test_keywords_reach_the_exporter_and_the_model_keeps_its_mode(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Dropout(), nn.Linear(4, 2))
    model[1].eval()
    modes = [module.training for module in model.modules()]
    path = tmp_path / "any.onnx"
    onnx.export(model, path, example_inputs=torch.randn(4, 3), dynamic_shapes=({0: "batch"},), input_names=["x"])
    assert [module.training for module in model.modules()] == modes
    x = torch.randn(9, 3)
    torch.testing.assert_close(run(path, x)[0], model.eval()(x))
    assert onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"]).get_inputs()[0].name == "x"


def test_weights_beside_the_model_are_found_there(tmp_path: Path) -> None:
    model, x = nn.Linear(3, 2), torch.randn(4, 3)
    onnx.export(model, tmp_path / "a.onnx", example_inputs=x, external_data=True)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a.onnx", "a.onnx.data"]
    torch.testing.assert_close(run(tmp_path / "a.onnx", x)[0], model(x))


class Shifted(nn.Module):
    """Another function for whoever exports it."""

    def forward(self, x: Tensor) -> Tensor:
        return x + 0.25 * torch.compiler.is_exporting()


class Shortened(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x[:1] if torch.compiler.is_exporting() else x


class Constant(nn.Module):
    """Right on the example inputs alone."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.zeros_like(x) if torch.compiler.is_exporting() else x - x.round()


@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN:UserWarning")
@pytest.mark.parametrize(
    ("model", "x", "message"),
    [
        (Shifted(), torch.randn(3), "differ from the model's by up to 0.25 .atol=1e-05, rtol=1e-05"),
        (Shortened(), torch.randn(3), r"outputs of shapes \[\(1,\)\], the model of \[\(3,\)\]"),
        (Constant(), torch.ones(3), "differ from the model's by up to"),
        (nn.Linear(3, 2).bfloat16(), torch.randn(4, 3).bfloat16(), "onnxruntime does not run it"),
        (nn.LSTM(3, 4, proj_size=2), torch.randn(5, 2, 3), "onnxruntime does not run it"),
    ],
)
def test_a_file_that_computes_something_else_is_not_written(
    model: nn.Module, x: Tensor, message: str, tmp_path: Path
) -> None:
    path = tmp_path / "a.onnx"
    path.write_text("what was there before")
    with pytest.raises(onnx.ExportError, match=f"path='.*a.onnx': .*{message}"):
        onnx.export(model, path, example_inputs=x)
    assert path.read_text() == "what was there before"
    assert [file.name for file in tmp_path.iterdir()] == ["a.onnx"]


def test_errors_come_before_any_work(tmp_path: Path) -> None:
    x = torch.randn(4, 3)
    with pytest.raises(TypeError, match=r"layer '0' still has gates; expected a compacted model \(dampr.compact\)"):
        onnx.export(nn.Sequential(dampr.nn.GatedLinear(3, 2)), tmp_path / "a.onnx", example_inputs=x)
    with pytest.raises(TypeError, match="example_inputs=7: expected a tensor"):
        onnx.export(nn.Linear(3, 2), tmp_path / "a.onnx", example_inputs=7)
    with pytest.raises(FileNotFoundError, match="path='.*b/a.onnx': expected it in a folder that exists"):
        onnx.export(nn.Linear(3, 2), tmp_path / "b" / "a.onnx", example_inputs=x)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("missing", ["onnx", "onnxscript", "onnxruntime"])
def test_what_is_missing_is_named_with_the_extra_that_brings_it(missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, missing, None)
    monkeypatch.delitem(sys.modules, "dampr.integrations.onnx")
    with pytest.raises(ImportError, match=r"pip install dampr-torch\[onnx\]"):
        importlib.import_module("dampr.integrations.onnx")
