"""accelerate, transformers' Trainer and Lightning on two ranks: callbacks work, or refuse when training begins."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset, TensorDataset

import dampr
from tests.distributed.checks_ddp import X, alike, flat, gated, net, rank


class Rows(Dataset):
    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self.x, self.y = torch.randn(128, 6, generator=generator), torch.randint(3, (128,), generator=generator)

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, row: int) -> dict[str, torch.Tensor]:
        return {"x": self.x[row], "labels": self.y[row]}


class Classifier(nn.Module):
    """Output as a Trainer expects it."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, x: torch.Tensor, labels: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        logits = self.body(x)
        return (
            {"logits": logits}
            if labels is None
            else {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}
        )


def check_accelerate(folder: Path) -> None:
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    model = gated()
    optimizer = torch.optim.Adam(dampr.param_groups(model, lr=0.05))
    loader = DataLoader(TensorDataset(Rows().x, Rows().y), batch_size=8)
    wrapped, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    assert isinstance(wrapped, DistributedDataParallel)
    for x, y in loader:
        accelerator.backward(nn.functional.cross_entropy(wrapped(x), y) + 1e-3 * dampr.penalty(wrapped))
        optimizer.step()
        optimizer.zero_grad()
    alike(flat(model))
    assert type(dampr.compact(wrapped, example_inputs=X)) is nn.Sequential


def trainer(model: nn.Module, folder: Path, callback: Any, optimizer: Any, **how: Any) -> Any:
    from transformers import Trainer, TrainingArguments

    options = {"output_dir": str(folder / f"trainer{rank()}"), "num_train_epochs": 2, "save_strategy": "no"}
    options |= {
        "per_device_train_batch_size": 8,
        "logging_steps": 4,
        "use_cpu": True,
        "report_to": [],
        "disable_tqdm": True,
    }
    arguments = TrainingArguments(**(options | how))
    assert arguments.world_size == distributed.get_world_size()
    return Trainer(model, arguments, train_dataset=Rows(), callbacks=[callback], optimizers=(optimizer, None))


def check_a_trainer_keeps_a_budget(folder: Path) -> None:
    from dampr.integrations.huggingface import DamprCallback

    for how in ({}, {"steps": 12}):
        body = gated()
        budget = dampr.Budget(body, X, macs=0.5, **how)
        model = Classifier(body)
        optimizer = torch.optim.AdamW(dampr.param_groups(model, lr=1e-2), weight_decay=0.0)
        trainer(model, folder, DamprCallback(budget), optimizer).train()
        assert budget.steps == 16
        alike(
            torch.cat([gate.deterministic().detach() for gate in dampr.prune.distinct_gates(body).values()]), str(how)
        )
        report = budget.finalize()
        assert report.reached <= report.target
        alike(flat(dampr.compact(body, example_inputs=X)), str(how))


def check_a_trainer_resumes_what_rank_0_has_saved(folder: Path) -> None:
    from dampr.integrations.huggingface import DamprCallback

    def train(steps: int, resume: str | None) -> tuple[nn.Module, dampr.Budget]:
        body = gated()
        budget = dampr.Budget(body, X, macs=0.5, steps=12)
        model = Classifier(body)
        how = {"max_steps": steps, "save_strategy": "steps", "save_steps": 6, "output_dir": str(folder / "resumed")}
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        trainer(model, folder, DamprCallback(budget), optimizer, **how).train(resume_from_checkpoint=resume)
        return body, budget

    assert train(6, None)[1].steps == 6
    body, budget = train(14, str(folder / "resumed" / "checkpoint-6"))
    assert (budget.steps, budget.measured) == (14, 14)
    report = budget.finalize()
    assert report.reached <= report.target
    alike(flat(dampr.compact(body, example_inputs=X)))


def check_a_trainer_refuses_a_plan(folder: Path) -> None:
    from dampr.integrations.huggingface import PlanCallback

    body = net()
    plan = dampr.Plan(body, X, macs=0.5, steps=40)
    model = Classifier(body)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    with pytest.raises(ValueError, match="world_size=2, n_gpu=0: expected one of each with a plan"):
        trainer(model, folder, PlanCallback(plan), optimizer).train()
    assert plan.steps_taken == 0


def check_sharding_by_accelerate_is_refused(folder: Path) -> None:
    from accelerate.state import AcceleratorState
    from accelerate.utils import DistributedType

    from dampr.integrations.huggingface import DamprCallback, PlanCallback

    body = gated()
    budget, plan = dampr.Budget(body, X, macs=0.5), dampr.Plan(net(), X, macs=0.5, steps=40)
    before = dict(AcceleratorState._shared_state)
    try:
        AcceleratorState._shared_state["distributed_type"] = DistributedType.FSDP
        for callback in (DamprCallback(budget), PlanCallback(plan)):
            arguments = type("Arguments", (), {})()
            with pytest.raises(ValueError, match="distributed_type=FSDP: not supported"):
                callback.on_train_begin(arguments, None, None)
    finally:
        AcceleratorState._shared_state.clear()
        AcceleratorState._shared_state.update(before)


def check_lightning(folder: Path) -> None:
    pl = pytest.importorskip("pytorch_lightning")
    from dampr.integrations.lightning import DamprCallback, PlanCallback

    os.environ |= {"TORCHELASTIC_RUN_ID": "test", "GROUP_RANK": "0", "LOCAL_WORLD_SIZE": os.environ["WORLD_SIZE"]}

    class Module(pl.LightningModule):
        def __init__(self, body: nn.Module) -> None:
            super().__init__()
            self.body = body

        def training_step(self, batch: Any, _: int) -> torch.Tensor:
            x, y = batch
            return nn.functional.cross_entropy(self.body(x), y)

        def configure_optimizers(self) -> Any:
            return torch.optim.Adam(dampr.param_groups(self, lr=1e-2))

    def fit(module: Any, callback: Any) -> None:
        silent = {
            "logger": False,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
        }
        where = {"accelerator": "cpu", "devices": 2, "strategy": "ddp", "default_root_dir": str(folder)}
        loop = pl.Trainer(max_epochs=2, callbacks=[callback], **silent, **where)
        loop.fit(module, DataLoader(TensorDataset(Rows().x, Rows().y), batch_size=8))

    body = gated()
    budget = dampr.Budget(body, X, macs=0.5)
    fit(Module(body), DamprCallback(budget))
    assert budget.steps == 16
    alike(flat(body))
    alike(flat(dampr.compact(body, example_inputs=X)))
    dense = net()
    plan = dampr.Plan(dense, X, macs=0.5, steps=40)
    with pytest.raises(ValueError, match="strategy=DDPStrategy: not supported with a plan"):
        fit(Module(dense), PlanCallback(plan))


def check_lightning_resumes_a_budget_that_owns_its_gates(folder: Path) -> None:
    pl = pytest.importorskip("pytorch_lightning")
    from dampr.integrations.lightning import DamprCallback

    local = {"TORCHELASTIC_RUN_ID": "test", "GROUP_RANK": "0", "LOCAL_WORLD_SIZE": os.environ["WORLD_SIZE"]}
    os.environ |= local

    class Module(pl.LightningModule):
        def __init__(self, body: nn.Module) -> None:
            super().__init__()
            self.body = body

        def training_step(self, batch: Any, _: int) -> torch.Tensor:
            return nn.functional.cross_entropy(self.body(batch[0]), batch[1])

        def configure_optimizers(self) -> Any:
            return torch.optim.Adam(self.parameters(), lr=1e-2)

    def fit(epochs: int, resume: Path | None) -> tuple[Any, nn.Module, dampr.Budget]:
        body = gated()
        budget = dampr.Budget(body, X, macs=0.5, steps=12)
        how: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
        how |= {"accelerator": "cpu", "devices": distributed.get_world_size(), "strategy": "ddp"}
        loop = pl.Trainer(max_epochs=epochs, callbacks=[DamprCallback(budget)], default_root_dir=str(folder), **how)
        loop.fit(Module(body), DataLoader(TensorDataset(Rows().x, Rows().y), batch_size=8), ckpt_path=resume)
        return loop, body, budget

    fit(1, None)[0].save_checkpoint(folder / "lightning.ckpt")
    _, body, budget = fit(2, folder / "lightning.ckpt")
    assert (budget.steps, budget.measured) == (16, 16)
    report = budget.finalize()
    assert report.reached <= report.target
    alike(flat(dampr.compact(body, example_inputs=X)))
