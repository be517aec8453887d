"""A budget kept by Lightning's Trainer."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import dampr
from dampr.prune.measure import count_macs

pl = pytest.importorskip("pytorch_lightning")

from dampr.integrations.lightning import DamprCallback  # noqa: E402
from tests.limits import HANG  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:::pytorch_lightning", "ignore:.*isinstance.*LeafSpec.*is deprecated")
ROOT = Path(__file__).parent.parent.parent
X = torch.randn(64, 20, generator=torch.Generator().manual_seed(0))
Y = (X @ torch.randn(20, 5, generator=torch.Generator().manual_seed(1))).argmax(1)
BATCHES = list(zip(X.split(8), Y.split(8), strict=True))


def built(**how: Any) -> tuple[nn.Module, dampr.Budget]:
    torch.manual_seed(0)
    model = dampr.convert(
        nn.Sequential(nn.Linear(20, 24), nn.ReLU(), nn.Linear(24, 16), nn.ReLU(), nn.Linear(16, 5)), example_inputs=X
    )
    return model, dampr.Budget(model, X, **({"macs": 0.4, "schedule": 8, "strength": 20.0} | how))


def loss_of(model: nn.Module, step: int, batch: Any) -> torch.Tensor:
    torch.manual_seed(100 + step)  # the same gates whoever runs the loop, and wherever it begins
    x, y = batch
    return F.cross_entropy(model(x), y)


class Net(pl.LightningModule):
    """One optimizer, stepped by Lightning."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        loss = loss_of(self.model, self.global_step, batch)
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(dampr.param_groups(self.model, lr=1e-2, gate_lr=0.3))


class TwoOptimizers(Net):
    """One for weights and one for gates, stepped by hand, the second one twice."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:  # type: ignore[override]
        for optimizer, step in zip((*self.optimizers(), self.optimizers()[1]), range(3), strict=True):
            optimizer.zero_grad()
            self.manual_backward(loss_of(self.model, 3 * batch_idx + step, batch))
            optimizer.step()

    def configure_optimizers(self) -> Any:
        weights, gates = dampr.param_groups(self.model, lr=1e-2, gate_lr=0.3)
        return torch.optim.SGD([weights]), torch.optim.Adam([gates])


def fit(net: Any, budget: dampr.Budget, folder: Path, ckpt_path: Any = None, history: Any = None, **how: Any) -> Any:
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    where = {"accelerator": "cpu", "devices": 1, "default_root_dir": folder, "use_distributed_sampler": False}
    options: dict[str, Any] = quiet | where | {"log_every_n_steps": 1, "max_epochs": 3} | how
    trainer = pl.Trainer(callbacks=[DamprCallback(budget, history), *options.pop("callbacks", [])], **options)
    trainer.fit(net, torch.utils.data.DataLoader(BATCHES, batch_size=None), ckpt_path=ckpt_path)
    return trainer


def same(model: nn.Module, other: nn.Module) -> bool:
    return all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), other.state_dict().values(), strict=True))


def test_a_run_comes_down_to_the_budget_and_logs_it_beside_the_loss_of_the_task(tmp_path: Path) -> None:
    model, budget = built()
    fit(Net(model), budget, tmp_path, logger=pl.loggers.CSVLogger(tmp_path, flush_logs_every_n_steps=1))
    (file,) = tmp_path.rglob("metrics.csv")
    rows = list(csv.DictReader(file.read_text().splitlines()))
    assert budget.steps == len(rows) == 24
    assert float(rows[0]["macs_left"]) == 1
    assert float(rows[-1]["macs_left"]) == pytest.approx(budget.left())
    assert budget.left() < 0.5
    assert float(rows[-1]["gates_open"]) < 1
    assert float(rows[-1]["budget_multiplier"]) == pytest.approx(float(budget.multiplier))
    assert max(float(row["budget_penalty"]) for row in rows) > 3
    assert all(float(row["loss"]) < 3 for row in rows), "log 5 = 1.6, without the penalty"
    report = budget.finalize()
    assert count_macs(dampr.compact(model, example_inputs=X), X) == report.reached <= report.target
    assert float(budget.readings()["macs_left"]) == pytest.approx(report.reached / report.total)


@pytest.mark.parametrize(
    "how", [{}, {"accumulate_grad_batches": 2}, {"gradient_clip_val": 0.1}, {"strategy": "ddp"}], ids=str
)
def test_the_weights_are_those_of_a_loop_that_adds_the_penalty_to_the_loss(how: dict[str, Any], tmp_path: Path) -> None:
    model, budget = built()
    with mock.patch.dict(os.environ):  # where DDP leaves its address and ranks
        fit(Net(model), budget, tmp_path, **how)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    own, other = built()
    optimizer = torch.optim.Adam(dampr.param_groups(own, lr=1e-2, gate_lr=0.3))
    size = how.get("accumulate_grad_batches", 1)
    for step in range(24 // size):
        for batch in (BATCHES * 3)[step * size : (step + 1) * size]:
            (loss_of(own, step, batch) / size).backward()
        if (penalty := other.penalty()).requires_grad:
            penalty.backward()
        if "gradient_clip_val" in how:
            nn.utils.clip_grad_norm_(
                [p for group in optimizer.param_groups for p in group["params"]], how["gradient_clip_val"]
            )
        optimizer.step()
        optimizer.zero_grad()
        other.step()
    assert same(model, own)
    assert budget.state_dict() == other.state_dict()


def test_of_several_optimizers_the_one_with_the_gates_gets_the_penalty_at_each_of_its_steps(tmp_path: Path) -> None:
    model, budget = built()
    fit(TwoOptimizers(model), budget, tmp_path, max_epochs=1)
    own, other = built()
    weights, gates = TwoOptimizers(own).configure_optimizers()
    for index, batch in enumerate(BATCHES):
        for step, optimizer in enumerate((weights, gates, gates)):
            optimizer.zero_grad()
            loss_of(own, 3 * index + step, batch).backward()
            if optimizer is gates:
                other.penalty().backward()
            optimizer.step()
            if optimizer is gates:
                other.step()
    assert same(model, own)
    assert budget.steps == other.steps == 16


def test_an_optimizer_that_evaluates_the_loss_several_times_takes_one_step_of_the_budget(tmp_path: Path) -> None:
    model, budget = built()
    seen: list[int] = []

    class Count(Net):
        def configure_optimizers(self) -> Any:
            return torch.optim.LBFGS(self.parameters(), lr=0.1, max_iter=3)

        def on_before_optimizer_step(self, optimizer: Any) -> None:
            seen.append(budget.steps)

    fit(Count(model), budget, tmp_path, max_epochs=1)
    assert budget.steps == 8 < len(seen)
    assert seen == sorted(seen)


def test_a_training_that_resumes_ends_where_it_would_have(tmp_path: Path) -> None:
    model, budget = built()
    keep = pl.callbacks.ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=16, save_top_k=-1)
    fit(Net(model), budget, tmp_path, enable_checkpointing=True, callbacks=[keep])
    again, other = built()
    fit(Net(again), other, tmp_path, ckpt_path=tmp_path / "step=16.ckpt")
    assert budget.state_dict() == other.state_dict()
    assert budget.steps == 24
    assert same(model, again)


def test_the_log_goes_into_a_history_at_the_end_of_epochs_and_validations(tmp_path: Path) -> None:
    class Validated(Net):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.log("val_acc", (self.model(batch[0]).argmax(1) == batch[1]).float().mean(), batch_size=8)

        def val_dataloader(self) -> Any:
            return torch.utils.data.DataLoader(BATCHES, batch_size=None)

    model, budget = built()
    fit(Validated(model), budget, tmp_path, history=tmp_path / "run.jsonl", val_check_interval=4)
    rows = dampr.History(tmp_path / "run.jsonl").rows()
    assert [row["step"] for row in rows] == [4, 8, 12, 16, 20, 24], "and not from the sanity check"
    assert all({"loss", "val_acc", "macs_left", "budget_penalty"} <= row.keys() for row in rows)
    assert rows[-1]["macs_left"] == pytest.approx(budget.left())


def decayed(model: nn.Module) -> Any:
    return torch.optim.AdamW(model.parameters(), weight_decay=0.1)


def gateless(model: nn.Module) -> Any:
    return torch.optim.SGD(dampr.param_groups(model, lr=0.1)[0]["params"])


@pytest.mark.parametrize(
    ("optimizer", "message"),
    [
        (decayed, r"weight_decay=0.1 on gates: expected none; return AdamW\(dampr.param_groups"),
        (gateless, "configure_optimizers: 0 optimizers have gates of the budget's model; expected one"),
    ],
)
def test_optimizers_that_would_move_gates_wrongly_are_refused(optimizer: Any, message: str, tmp_path: Path) -> None:
    model, budget = built()
    net = Net(model)
    net.configure_optimizers = lambda: optimizer(model)  # type: ignore[method-assign]
    with pytest.raises(ValueError, match=message):
        fit(net, budget, tmp_path)
    assert budget.steps == 0


def test_gates_in_two_optimizers_are_refused(tmp_path: Path) -> None:
    model, budget = built()
    net = TwoOptimizers(model)
    layers = [layer for layer in model.children() if any(True for _ in layer.parameters())]
    two = [torch.optim.SGD(layer.parameters()) for layer in layers[:2]]
    net.configure_optimizers = lambda: two  # type: ignore[method-assign]
    with pytest.raises(ValueError, match="2 optimizers have gates"):
        fit(net, budget, tmp_path)


def test_scaled_gradients_are_refused(tmp_path: Path) -> None:
    model, budget = built()
    plugin = pl.plugins.MixedPrecision("16-mixed", "cpu", scaler=torch.amp.GradScaler("cpu"))
    with pytest.raises(ValueError, match="precision='16-mixed': not supported with a budget"):
        fit(Net(model), budget, tmp_path, plugins=[plugin])


def test_bf16_trains_to_the_budget_too(tmp_path: Path) -> None:
    model, budget = built()
    fit(Net(model), budget, tmp_path, precision="bf16-mixed")
    assert budget.left() < 0.5


def test_strategies_that_keep_gradients_elsewhere_are_refused() -> None:
    class FSDPStrategy:
        pass

    class Trainer:
        strategy = FSDPStrategy()

    with pytest.raises(ValueError, match="strategy=FSDPStrategy: not supported with a budget"):
        DamprCallback(built()[1]).on_train_start(Trainer(), None)


def test_an_optimizer_is_let_go_when_training_ends_or_fails(tmp_path: Path) -> None:
    model, budget = built()
    optimizer = Net(model).configure_optimizers()
    net = Net(model)
    net.configure_optimizers = lambda: optimizer  # type: ignore[method-assign]
    fit(net, budget, tmp_path, max_epochs=1)
    optimizer.step()
    assert budget.steps == 8

    def fail(batch: Any, batch_idx: int) -> None:
        raise ZeroDivisionError

    net.training_step = fail  # type: ignore[method-assign, assignment]
    with pytest.raises(ZeroDivisionError):
        fit(net, budget, tmp_path)
    optimizer.step()
    assert budget.steps == 8


def test_a_callback_needs_a_budget() -> None:
    with pytest.raises(TypeError, match="expected a dampr.Budget"):
        DamprCallback(0.5)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("modules", "error"),
    [
        ({"lightning": "pytorch_lightning", "lightning.pytorch": "pytorch_lightning"}, None),
        ({"lightning": None, "pytorch_lightning": None}, "needs Lightning: pip install dampr-torch[lightning]"),
    ],
    ids=["lightning.pytorch", "neither"],
)
def test_either_package_will_do_and_dampr_needs_none(modules: dict[str, str | None], error: str | None) -> None:
    code = f"""import importlib, sys, dampr, dampr.prune
assert not {{"lightning", "pytorch_lightning", "tensorboard"}} & set(sys.modules)
for name, stand_in in {modules!r}.items():
    sys.modules[name] = stand_in and importlib.import_module(stand_in)
if "lightning.pytorch" in sys.modules:
    sys.modules["lightning"].pytorch = sys.modules["lightning.pytorch"]
from dampr.integrations.lightning import Callback, DamprCallback
assert issubclass(DamprCallback, Callback) and Callback is sys.modules["lightning"].Callback
"""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, timeout=HANG, cwd=ROOT
    )
    assert (error in done.stderr) if error else (done.returncode == 0), done.stderr
