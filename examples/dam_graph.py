"""A graph auto-encoder with a DAM bottleneck (Bu et al. 2021) on a graph of networkx: links that were hidden, and how
many codes they take.

The encoder is that of Kipf and Welling (2016), without the variational part: Z = A ReLU(A X W0) W1 with A the
normalised adjacency, and a link is as probable as sigmoid(z_i z_j). Nodes have no features, so X is the identity.
"""

from __future__ import annotations

import copy
import itertools
import time
from typing import Any

import networkx
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import dampr
from examples import common

CODE, HIDDEN = 32, 32


class GraphAutoEncoder(nn.Module):
    """Features of nodes, (nodes, features), to the logits of their links, (nodes, nodes)."""

    def __init__(self, adjacency: Tensor) -> None:
        super().__init__()
        self.register_buffer("adjacency", normalised(adjacency))
        self.first, self.second = nn.Linear(len(adjacency), HIDDEN, bias=False), nn.Linear(HIDDEN, CODE, bias=False)
        self.gate: nn.Module = dampr.nn.GatedActivation(CODE, -1, gate="dam")

    @torch.no_grad()
    def narrowed(self) -> GraphAutoEncoder:
        """The same with the open codes alone.

        No layer reads the codes, so dampr.compact would leave their number as it is.
        """
        small = copy.deepcopy(self)
        kept = self.gate.gate.is_open()
        small.second = nn.Linear(HIDDEN, int(kept.sum()), bias=False)
        small.second.weight.copy_((self.second.weight * self.gate.gate.deterministic().unsqueeze(1))[kept])
        small.gate = nn.Identity()
        return small

    def forward(self, x: Tensor) -> Tensor:
        z: Tensor = self.gate(self.second(self.adjacency @ F.relu(self.first(self.adjacency @ x))))
        return z @ z.t()


def normalised(adjacency: Tensor) -> Tensor:
    """D^-1/2 (A + I) D^-1/2."""
    a = adjacency + torch.eye(len(adjacency))
    d = a.sum(1).rsqrt()
    return d.unsqueeze(1) * a * d


def split(graph: Any, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """The adjacency without a tenth of its edges, these edges, and as many pairs of nodes that have none; edges as (2,
    count).
    """
    generator = torch.Generator().manual_seed(seed)
    full = torch.from_numpy(networkx.to_numpy_array(graph, weight=None)).float()
    edges = full.triu(1).nonzero()
    edges = edges[torch.randperm(len(edges), generator=generator)]
    count = len(edges) // 10
    hidden, known = edges[:count].t(), edges[count:].t()
    adjacency = torch.zeros_like(full)
    adjacency[known[0], known[1]] = adjacency[known[1], known[0]] = 1
    none = ((full == 0).triu(1)).nonzero()
    return adjacency, hidden, none[torch.randperm(len(none), generator=generator)[:count]].t()


def auc(logits: Tensor, hidden: Tensor, none: Tensor) -> float:
    """The share of pairs of a hidden link and no link in which the hidden link scores higher."""
    linked, other = (logits[pairs[0], pairs[1]] for pairs in (hidden, none))
    return float((linked.unsqueeze(1) > other).float().mean())


def run(graph: Any, lam: float, epochs: int, seed: int) -> tuple[dict[str, Any], nn.Module, Tensor]:
    adjacency, hidden, none = split(graph, seed)
    torch.manual_seed(seed)
    model, x = GraphAutoEncoder(adjacency), torch.eye(len(adjacency))
    target = adjacency + torch.eye(len(adjacency))
    balance = (target.numel() - target.sum()) / target.sum()
    optimizer = torch.optim.Adam(dampr.param_groups(model, lr=1e-2, gate_lr=2e-2))
    for _ in range(epochs):
        loss = F.binary_cross_entropy_with_logits(model(x), target, pos_weight=balance)
        optimizer.zero_grad()
        (loss + dampr.gates.dam_penalty([model.gate.gate], lam)).backward()
        optimizer.step()
    small = model.eval().narrowed()
    with torch.no_grad():
        torch.testing.assert_close(small(x), model(x))
        quality = auc(small(x), hidden, none)
    found = {"lam": lam, "seed": seed, "open": small.second.out_features, "auc": quality}
    print(
        f"lambda {lam:5}  seed {seed}  open codes {found['open']:2} of {CODE}  AUC of hidden links {quality:.3f}",
        flush=True,
    )
    return found, small, x


def main() -> None:
    args = common.arguments(__doc__, epochs=400, seeds=5)
    graph, start = networkx.les_miserables_graph(), time.perf_counter()
    runs, models = [], {}
    for lam, seed in itertools.product((0.0, 0.01, 0.03, 0.1), range(args.seeds)):
        found, models[f"lambda {lam:g}"], x = run(graph, lam, args.epochs, seed)
        runs.append(found)
    quality = {f"lambda {r['lam']:g}": r["auc"] for r in runs}
    rows = common.side_by_side(models, x, quality)
    result = {
        "data": "Les Miserables, 77 characters",
        "epochs": args.epochs,
        "seconds": time.perf_counter() - start,
        "metric": "AUC",
        "runs": runs,
    }
    common.finish(__file__, {**result, "models": rows, "published": "tables not available"}, not args.no_write)


if __name__ == "__main__":
    main()
