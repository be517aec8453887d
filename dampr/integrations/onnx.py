"""Write compacted models as ONNX files, and check them with onnxruntime: ``pip install dampr-torch[onnx]``."""

from __future__ import annotations

import os
import tempfile
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

try:
    import onnx  # noqa: F401  torch's exporter needs it, and onnxscript
    import onnxruntime
    import onnxscript  # noqa: F401
except ImportError as error:
    raise ImportError(
        "dampr.integrations.onnx needs onnx, onnxscript and onnxruntime: pip install dampr-torch[onnx]"
    ) from error

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from dampr.prune import inputs
from dampr.prune.files import check_plain
from dampr.prune.wrapped import sees_through

__all__ = ["ExportError", "export"]


class ExportError(RuntimeError):
    """The ONNX file does not run, or does not compute what the model computes; nothing was written."""


@sees_through
def export(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    example_inputs: Any,
    atol: float = 1e-5,
    rtol: float = 1e-5,
    **how: Any,
) -> None:
    """Write a plain (compacted) model with ``torch.onnx.export``, and check that onnxruntime computes the same from the
    file.

    onnxruntime runs the file on the CPU, on the example inputs and on the same with a little noise, so that a value
    that the exporter took for a constant shows. The file is written completely or not at all. If the weights are too
    large for one file (for torch the limit is 1.5 GiB), they come in a second one, ``path`` + ".data".

    Args:
        model: exported in evaluation mode; not changed. Transformer layers are exported without torch's fused inference
            path, which writes zeros over padding.
        path: the file.
        example_inputs: a tensor, a tuple of positional or a dict of keyword arguments; the file takes inputs of these
            shapes unless ``dynamic_shapes`` says otherwise.
        atol, rtol: how far outputs may differ: |model - onnxruntime| <= atol + rtol |model|.
        how: further arguments of ``torch.onnx.export``: ``dynamic_shapes``, ``input_names``, ``opset_version``, ...

    Raises: TypeError for a model that still has gates (compact it first), or that names the argument; FileNotFoundError
    if the folder of ``path`` does not exist; ExportError; what ``torch.onnx.export`` raises.
    """
    check_plain(model)
    inputs.check(example_inputs)
    target = Path(path)
    if not target.parent.is_dir():
        raise FileNotFoundError(f"path={os.fspath(path)!r}: expected it in a folder that exists")
    args, kwargs = _arguments(example_inputs)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.") as folder:
        partial = Path(folder, target.name)
        with inputs.evaluating(model), inputs.unfused(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's exporter warns about its own code; the result is checked below
            torch.onnx.export(
                model, args, partial, kwargs=kwargs, dynamo=True, **{"external_data": False, "verbose": False} | how
            )
        _prove(model, partial, inputs.samples(model, example_inputs), f"path={os.fspath(path)!r}", atol, rtol)
        # the model last, so that its weights are there when it appears
        for written in sorted(Path(folder).iterdir(), key=lambda file: file == partial):
            os.replace(written, target.parent / written.name)


def _arguments(example_inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """(positional, keyword) arguments from example inputs.

    Raises: TypeError for several ones: a file holds one way through a model.
    """
    if isinstance(example_inputs, inputs.Several):
        raise TypeError("example_inputs=Several(...): expected one of them: a file holds one way through a model")
    if isinstance(example_inputs, Mapping):
        return (), dict(example_inputs)
    return tuple(example_inputs) if isinstance(example_inputs, (tuple, list)) else (example_inputs,), {}


def _prove(model: nn.Module, file: Path, samples: list[Any], where: str, atol: float, rtol: float) -> None:
    """Raise ExportError unless onnxruntime runs the file and its outputs are those of ``model`` on all samples."""
    for sample in samples:
        with inputs.unfused():
            expected = [t.cpu() for t in inputs.evaluate(model, sample)]
        try:
            found = _run(file, sample)
        except Exception as error:
            # onnxruntime's own classes, and whatever numpy makes of a dtype that it does not have
            raise ExportError(f"{where}: onnxruntime does not run it ({error})") from error
        shapes = [tuple(t.shape) for t in expected], [tuple(t.shape) for t in found]
        if shapes[0] != shapes[1]:
            raise ExportError(f"{where}: onnxruntime gives outputs of shapes {shapes[1]}, the model of {shapes[0]}")
        if inputs.differ(expected, found, rtol, atol):
            gap = inputs.gap(expected, found)
            raise ExportError(
                f"{where}: onnxruntime's outputs differ from the model's by up to {gap:.3g} (atol={atol:g}, "
                f"rtol={rtol:g})"
            )


def _run(file: Path, sample: Any) -> list[Tensor]:
    """The outputs of an ONNX file; its inputs are the tensors of ``sample`` in order."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # no log, as failures are raised
    session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    given = [leaf.detach().cpu().numpy() for leaf in pytree.tree_leaves(_arguments(sample)) if isinstance(leaf, Tensor)]
    named = {entry.name: value for entry, value in zip(session.get_inputs(), given, strict=True)}
    return [torch.from_numpy(value) for value in session.run(None, named)]
