"""Models with a residual width that LayerNorms hand on, converted, closed at random and compacted."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import dampr
from dampr.nn import GatedLayerNorm, GatedResidual, GatedTransformerEncoderLayer

E, H, D = 8, 4, 12
words = torch.randint(20, (3, 5), generator=torch.Generator().manual_seed(0))
others = torch.randint(20, (3, 4), generator=torch.Generator().manual_seed(1))


class Block(nn.Module):
    """Pre-norm, every projection a linear layer of its own,
    a learned factor for each channel behind the feed-forward (CaiT).
    """

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

    def __init__(
        self,
        layers: nn.Module,
        norm: nn.Module | None = None,
        first: nn.Module | None = None,
        class_token: bool = False,
    ) -> None:
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
        self.norm, self.attention = (
            nn.LayerNorm(E),
            nn.MultiheadAttention(E, H, add_bias_kv=True, add_zero_attn=True, batch_first=True),
        )

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


def encoder(norm_first: bool = True, layers: int = 2, norm: nn.Module | None = None, **how: Any) -> nn.Module:
    layer = nn.TransformerEncoderLayer(E, H, D, batch_first=True, norm_first=norm_first, **how)
    return nn.TransformerEncoder(layer, layers, norm, enable_nested_tensor=False)


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
        *(GatedResidual(nn.Sequential(nn.LayerNorm(E), nn.Linear(E, D), nn.GELU(), nn.Linear(D, E))) for _ in range(3)),
        nn.LayerNorm(E),
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
    "attention": lambda: (Classifier(nn.Sequential(Attending(), Attending()), nn.LayerNorm(E)), words),
    "branches": lambda: (Classifier(branches()), words),
    "sequence": lambda: (
        nn.Sequential(nn.Embedding(20, E), *encoder().layers, nn.LayerNorm(E), nn.Linear(E, 3)),
        words,
    ),
    "stack": lambda: (nn.Sequential(nn.Embedding(20, E), encoder(norm=nn.LayerNorm(E)), nn.Linear(E, 3)), words),
    "sublayers": lambda: (Classifier(gated_encoder(), nn.LayerNorm(E)), words),
    "translator": lambda: (Translator(), (words, others)),
    "language": lambda: (Language(), words),
    "mlp": lambda: (nn.Sequential(nn.Linear(6, 10), nn.LayerNorm(10), nn.ReLU(), nn.Linear(10, 3)), torch.randn(4, 6)),
}
GATED = {  # the dense counterparts of those that have gates before
    "sublayers": lambda: Classifier(nn.Sequential(*encoder().layers), nn.LayerNorm(E)),
    "branches": lambda: Classifier(
        nn.Sequential(*(dampr.nn.Residual(m.branch) for m in list(branches())[:-1]), nn.LayerNorm(E))
    ),
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
    how["exclude"] = [
        *PROJECTED,
        *(how["exclude"] if isinstance(how.get("exclude"), list) else filter(None, [how.get("exclude")])),
    ]
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
