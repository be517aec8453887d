"""Hugging Face's transformers: gates on heads and feed-forward neurons, and pruned models that can be saved and loaded.

>>> import torch
>>> from transformers import LlamaConfig, LlamaForCausalLM
>>> from dampr.integrations import huggingface
>>> sizes = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=4)
>>> config = LlamaConfig(vocab_size=50, **sizes)
>>> words = {"input_ids": torch.randint(50, (2, 5)), "use_cache": False}
>>> model = huggingface.convert(LlamaForCausalLM(config), example_inputs=words)
>>> model.model.layers[0].mlp.up_proj.gate.log_alpha.data[:10] = -9
>>> small = huggingface.compact(model, example_inputs=words)
>>> small.config.dampr["linear"]["model.layers.0.mlp.up_proj"]
[16, 14]
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

try:
    import transformers
except ImportError as error:
    raise ImportError(
        "dampr.integrations.huggingface needs transformers: pip install dampr-torch[huggingface]"
    ) from error

from torch import nn
from transformers import PreTrainedModel

import dampr.prune
from dampr import _checks
from dampr.prune import CompactionError, FileError, inputs, transposed
from dampr.prune import heads as _heads
from dampr.prune.files import check_plain

from . import _uniform, _widths
from ._trainer import DamprCallback, PlanCallback

__all__ = [
    "DamprCallback",
    "PlanCallback",
    "compact",
    "convert",
    "expand",
    "from_pretrained",
    "plan",
    "save_pretrained",
]


def convert(
    model: PreTrainedModel,
    example_inputs: Any,
    *,
    gate: Any = "hard_concrete",
    heads: bool = True,
    neurons: bool = True,
    exclude: Sequence[str | type] | str | type = (),
) -> PreTrainedModel:
    """Put gates on the heads and on the feed-forward neurons of ``model``, in place, keeping its parameters.

    A gate of a head is on the columns of the last projection of its attention (:class:`dampr.nn.GatedHeads`); query
    heads that share a key and a value share a gate. Where a layer multiplies the neurons of another (Llama's
    ``gate_proj``), that other alone has gates. The ``Conv1D`` layers of GPT-2 are ``nn.Linear`` layers until
    :func:`compact`, around the same parameters, which are transposed: make optimizers afterwards. Evaluation outputs
    stay, which is proven on the example inputs.

    Args:
        model: an attention that is not known (BERT, GPT-2, Llama, Mistral, Qwen2, RoBERTa, ViT are) has no gates.
        example_inputs: as for :func:`dampr.convert`, best a dict with ``"use_cache": False`` for a model that
            generates.
        gate: as for :func:`dampr.convert`.
        heads, neurons: what has gates; neurons are those of every linear layer that can be cut, a pooler's too.
        exclude: name globs and types, as for :func:`dampr.convert`.

    Returns: ``model``. Its attribute ``dampr_skipped`` says of layers that were left out why.

    Raises: what :func:`dampr.convert` raises; TypeError or ValueError that names the argument. The model is then as it
    was.
    """
    _check_model(model)
    if not (heads or neurons):
        raise ValueError("heads=False, neurons=False: expected at least one of them")
    conv1d = transposed.to_linear(model)
    try:
        projections = {attention.written for attention in _heads.find(model)}
        unknown = _in_unknown_attention(model)
        wanted = [
            name
            for name, layer in model.named_modules()
            if isinstance(layer, nn.Linear) and name not in unknown and (heads if layer in projections else neurons)
        ]
        dampr.prune.convert(model, gate=gate, include=wanted, exclude=exclude, example_inputs=example_inputs)
    except BaseException:
        transposed.back(model, conv1d)
        raise
    skipped: Any = model.dampr_skipped
    skipped |= unknown
    return model


def compact(
    model: PreTrainedModel,
    example_inputs: Any,
    *,
    uniform: bool = False,
    round_to: int = 1,
    atol: float | None = None,
    rtol: float | None = None,
) -> PreTrainedModel:
    """:func:`dampr.compact` to a model of the stock class, whose config says how wide every layer is.

    The pruned widths are in ``config.dampr``, for :func:`from_pretrained`; transformers alone refuses the folder of
    such a model, because its tensors do not have the shapes that the rest of the config says.

    Args:
        model: with gates from :func:`convert`; it is not changed.
        example_inputs, atol, rtol: as for :func:`dampr.compact`.
        uniform: keep as many heads and neurons in every layer as the widest has, so that entries such as
            ``intermediate_size`` say it all and transformers alone loads the model. Closed ones that stay have weights
            of 0. Heads stay where their width follows from their number (BERT, RoBERTa, GPT-2).
        round_to: with ``uniform``, neurons are a multiple of it, or all.

    Raises: CompactionError; TypeError or ValueError that names the argument, or what a config cannot say.
    """
    _check_model(model)
    round_to = _checks.positive_int("round_to", round_to)
    if round_to > 1 and not uniform:
        raise ValueError(f"round_to={round_to}: expected uniform=True with it")
    atol, rtol = inputs.tolerances(model, [example_inputs], atol, rtol)
    level, notes = _uniform.level(model, round_to) if uniform else (model, {})
    small: Any = dampr.prune.compact(level, example_inputs=example_inputs, atol=atol, rtol=rtol)
    if uniform:
        vars(small.config).pop(_widths.KEY, None)
        _uniform.write(small)
        _as_stock(small)
    else:
        _describe(small)
    small.dampr_manifest["closed_but_kept"] |= notes
    before, after = inputs.evaluate(model, example_inputs), inputs.evaluate(small, example_inputs)
    if inputs.differ(before, after, rtol, atol):
        raise CompactionError(f"outputs differ by up to {inputs.gap(before, after):.3g} (atol={atol:g}, rtol={rtol:g})")
    return small


def plan(
    model: PreTrainedModel,
    example_inputs: Any,
    *,
    steps: int,
    gate: Any = "hard_concrete",
    heads: bool = True,
    neurons: bool = True,
    exclude: Sequence[str | type] | str | type = (),
    **how: Any,
) -> dampr.Plan:
    """A :class:`dampr.Plan` for ``model``, with gates from :func:`convert`; the config of the finished model says its
    widths.

    Args:
        model, example_inputs, gate, heads, neurons, exclude: as for :func:`convert`.
        steps, how: as for :class:`dampr.Plan`. ``trained`` is True unless given, because such models mostly start from
            a checkpoint.

    Raises: what these two raise; if the plan is refused, the model has gates.
    """
    convert(model, example_inputs=example_inputs, gate=gate, heads=heads, neurons=neurons, exclude=exclude)
    return dampr.Plan(model, example_inputs, steps=steps, gate=gate, on_finish=_describe, **({"trained": True} | how))


def _describe(small: Any) -> None:
    """Write the widths of a plain model into its config, and give it the layers of the stock class."""
    setattr(small.config, _widths.KEY, _widths.describe(small))
    _as_stock(small)


def _as_stock(small: Any) -> None:
    """Give ``small`` the ``Conv1D`` layers of its stock class, and check its config."""
    transposed.back(small, transposed.find(_widths.stock(small)))
    _check_config(small)


def expand(model: PreTrainedModel) -> PreTrainedModel:
    """:func:`dampr.expand`; the config of the result says the old widths, so that transformers alone can load it.

    A bias that compaction added stays; ``config.dampr`` then names it and nothing else.

    Args:
        model: the result of :func:`compact`, with its ``dampr_manifest``; not changed.

    Raises: what :func:`dampr.expand` raises; TypeError for another model.
    """
    _check_model(model)
    large: Any = dampr.prune.expand(model)
    conv1d = transposed.to_linear(large)
    if hasattr(large.config, _widths.KEY):
        spec = _widths.describe(large)
        setattr(large.config, _widths.KEY, spec)
        if not (spec["heads"] or spec["linear"] or spec["biases"]):
            delattr(large.config, _widths.KEY)
    elif large.config.model_type in _uniform.FAMILIES:
        _uniform.write(large)
    transposed.back(large, conv1d)
    _check_config(large)
    return large


def save_pretrained(model: PreTrainedModel, folder: str | os.PathLike[str], **how: Any) -> None:
    """Write a compacted model as ``model.save_pretrained`` does, after a check that :func:`from_pretrained` can read
    it.

    Raises: TypeError for a model with gates; ValueError where its config does not say its widths.
    """
    _check_model(model)
    check_plain(model, "huggingface.compact")
    _check_config(model)
    model.save_pretrained(folder, **how)


def from_pretrained(
    folder: str | os.PathLike[str], *, model_class: type[PreTrainedModel] | None = None, **how: Any
) -> PreTrainedModel:
    """Read what :func:`save_pretrained` wrote, or any other model of transformers.

    The stock class is built from the config and narrowed to the widths in it; then transformers loads the weights.

    Args:
        folder: as for ``from_pretrained`` of transformers.
        model_class: the class; None: the one that the config names.
        how: further arguments of ``from_pretrained`` of transformers: ``dtype``, ``device_map``, ...

    Returns: a model of that class, in evaluation mode.

    Raises: FileError if the widths have not the right form, or do not fit the class or the weights; what transformers
    raises.
    """
    config = transformers.AutoConfig.from_pretrained(folder)
    where = f"folder={os.fspath(folder)!r}"
    kind = _class_of(config, where) if model_class is None else model_class
    spec = getattr(config, _widths.KEY, None)
    if spec is not None:
        _widths.check(spec)
    narrowed: Any = kind if spec is None else _narrowed(kind, spec)
    try:
        model, found = narrowed.from_pretrained(folder, config=config, output_loading_info=True, **how)
    except RuntimeError as error:
        if isinstance(error, FileError):
            raise
        raise FileError(
            f"{where}: its weights do not fit {kind.__name__} with the widths of its config ({error})"
        ) from error
    wrong = {what: sorted(map(str, names))[:3] for what, names in found.items() if names}
    if wrong:
        raise FileError(f"{where}: its weights do not fit {kind.__name__} with the widths of its config: {wrong}")
    model.__class__ = kind
    return model


def _narrowed(kind: type[PreTrainedModel], spec: dict[str, Any]) -> Any:
    """A class of the same name whose instances have the pruned widths from the start, so that transformers finds no
    mismatch.
    """

    def build(self: Any, config: Any, *args: Any, **how: Any) -> None:
        kind.__init__(self, config, *args, **how)
        _widths.narrow(self, spec)

    return type(kind.__name__, (kind,), {"__init__": build, "__module__": kind.__module__})


def _class_of(config: Any, where: str) -> type[PreTrainedModel]:
    """The class that the config names. Raises FileError unless it names one class of transformers; ``where`` is for
    errors.
    """
    names = config.architectures or []
    kind = getattr(transformers, names[0], None) if len(names) == 1 else None
    if not (isinstance(kind, type) and issubclass(kind, PreTrainedModel)):
        raise FileError(f"{where}: architectures={names}, expected one class of transformers; or pass model_class=")
    return kind


def _check_model(model: Any) -> None:
    """Raise TypeError unless ``model`` is a model of transformers."""
    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"model={model!r:.80}: expected a transformers.PreTrainedModel")


def _check_config(model: PreTrainedModel) -> None:
    """Raise ValueError if the config of a plain model says other widths than the model has."""
    whole = _widths.stock(model)
    if (spec := getattr(model.config, _widths.KEY, None)) is not None:
        _widths.narrow(whole, spec)
    own, said = ({name: tuple(t.shape) for name, t in m.state_dict().items()} for m in (model, whole))
    wrong = next((name for name in sorted(own.keys() | said.keys()) if own.get(name) != said.get(name)), None)
    if wrong is not None:
        raise ValueError(
            f"config of {type(model).__name__}: it says {said.get(wrong)} for {wrong!r}, which is {own.get(wrong)}"
        )


def _in_unknown_attention(model: nn.Module) -> dict[str, str]:
    """name -> reason, for linear layers in an attention whose heads cannot be found."""
    known = {module for attention in _heads.find(model) for module in attention.module.modules()}
    return {
        f"{name}.{inner}": f"{name!r} is a {type(module).__name__}, whose heads dampr does not know"
        for name, module in model.named_modules()
        if "Attention" in type(module).__name__ and module not in known
        for inner, layer in module.named_modules()
        if isinstance(layer, nn.Linear) and layer not in known and inner
    }
