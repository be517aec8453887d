"""Residual widths that have no gates, and why; closed channels that cannot be cut after all."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import nn

import dampr
from dampr.gates import HardConcrete
from dampr.nn import GatedLayerNorm
from dampr.prune.cost import Cost
from tests.residual import Classifier, D, E, H, built, call, close, compacted, encoder, norms, words


class Reading(nn.Module):
    """A decoder whose memory comes from outside."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(20, E), nn.Linear(E, 3)
        self.decoder = nn.TransformerDecoder(
            nn.TransformerDecoderLayer(E, H, D, batch_first=True, norm_first=True), 1, nn.LayerNorm(E)
        )

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
        self.grouped, self.rms = nn.Conv1d(E, E, 1, groups=2), nn.RMSNorm(E)
        used = {"read before": ("up", "down"), "flattened": ("scores",), "shared": ("same", "other")}
        used |= {"groups": ("grouped",), "rms": ("rms",)}
        kept = used.get(what, ()) if what in ("shared", "flattened") else (*used.get(what, ()), "head")
        for name in ("up", "down", "scores", "same", "other", "grouped", "rms", "head"):
            if name not in kept:  # what nothing reads might have the width of the stream
                delattr(self, name)

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
    "attention that reads it without a norm": (  # torch's own wants as many channels as its heads have
        lambda: (Classifier(encoder(False)), words),
        "reads Embedding 'embedding' without a LayerNorm between|reads Parameter 'position' without a LayerNorm "
        "between",
    ),
    "attention, and no final norm": (
        lambda: (Classifier(encoder()), words),
        "Linear 'head' reads .* without a LayerNorm between",
    ),
    "the input": (
        lambda: (nn.Sequential(nn.LayerNorm(E), nn.Linear(E, 3)), torch.randn(2, E)),
        "its width is the model's own input",
    ),
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
    "softmax": (odd("softmax"), "computes something else, so these are mixed or rearranged on the way"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_cut_has_no_gates_and_says_why(case: str) -> None:
    build, reason = REFUSED[case]
    torch.manual_seed(0)
    model, x = build()
    before = call(model.eval(), x)
    places = [name for name, m in model.named_modules() if isinstance(m, nn.LayerNorm)]
    with pytest.raises(
        dampr.ConversionError, match="^residual=True: no width that norms read can have gates "
    ) as raised:
        dampr.convert(model, example_inputs=x, residual=True)
    assert not norms(model)
    assert torch.equal(call(model, x), before)
    assert all(f"{name!r}: " in str(raised.value) for name in places)
    assert re.search(f"no gates for its width: .*({reason})", str(raised.value))


def test_norms_that_are_left_out_leave_out_their_stream() -> None:
    for how in ({"exclude": "layers.1.norm2"}, {"include": ["*.norm1", nn.Linear]}, {"exclude": nn.LayerNorm}):
        with pytest.raises(dampr.ConversionError, match=" is left out"):
            built("blocks", **how)
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
    before = (
        [(name, type(m), id(m)) for name, m in model.named_modules()],
        {name: id(p) for name, p in model.named_parameters()},
    )
    with pytest.raises(ArithmeticError, match="only plain norms here"):
        dampr.convert(model, example_inputs=words, residual=True)
    assert (
        [(name, type(m), id(m)) for name, m in model.named_modules()],
        {name: id(p) for name, p in model.named_parameters()},
    ) == before


def test_closed_channels_that_cannot_be_cut_are_an_error() -> None:
    """A norm made by hand whose width is the model's output: a plain one would count what it leaves out."""
    gate = HardConcrete(6)
    model = nn.Sequential(nn.Linear(4, 6), GatedLayerNorm(6, gate=gate, statistics="open"))
    x = torch.randn(3, 4)
    assert type(dampr.compact(model, example_inputs=x)[1]) is nn.LayerNorm
    gate.log_alpha.data[:2] = -9.0
    with pytest.raises(
        dampr.CompactionError, match="1: 2 closed channels cannot stay, .* its width is the model's own output"
    ):
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
            self.stem, self.norms, self.heads = (
                nn.Linear(4, 6),
                nn.ModuleList(own),
                nn.ModuleList([nn.Linear(6, 2), nn.Linear(6, 2)]),
            )

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
        with pytest.raises(
            ValueError,
            match="residual=True with .*: expected granularity 'output', one draw per call, and example inputs",
        ):
            dampr.convert(model, residual=True, **how)
