"""Plans under the trainers of Lightning and transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import dampr
from dampr.prune.measure import count_macs

pl = pytest.importorskip("pytorch_lightning")
transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from dampr.integrations import huggingface, lightning  # noqa: E402
from tests.integrations.test_huggingface import llama, words  # noqa: E402
from tests.integrations.test_lightning import BATCHES, X, loss_of, same  # noqa: E402
from tests.integrations.test_trainer import Texts  # noqa: E402
from tests.long import long_if  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:::pytorch_lightning", "ignore:.*isinstance.*LeafSpec.*is deprecated")


class Net(pl.LightningModule):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return loss_of(self.model, self.global_step, batch)

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), lr=1e-2)


def net(**how: Any) -> tuple[Net, dampr.Plan]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 24), nn.ReLU(), nn.Linear(24, 16), nn.ReLU(), nn.Linear(16, 5))
    return Net(model), dampr.Plan(model, X, **({"macs": 0.4, "steps": 48} | how))


def fit(module: Net, callback: Any, folder: Path, ckpt_path: Any = None, callbacks: Any = (), **how: Any) -> None:
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    where = {
        "accelerator": "cpu",
        "devices": 1,
        "default_root_dir": folder,
        "use_distributed_sampler": False,
        "max_epochs": 6,
    }
    trainer = pl.Trainer(callbacks=[callback, *callbacks], **(quiet | where | how))
    trainer.fit(module, torch.utils.data.DataLoader(BATCHES, batch_size=None), ckpt_path=ckpt_path)


def test_lightning_ends_where_a_loop_of_ones_own_ends(tmp_path: Path) -> None:
    module, plan = net()
    fit(module, lightning.PlanCallback(plan, tmp_path / "run.jsonl"), tmp_path)
    small = plan.finish()
    assert module.model is small
    own, other = net()
    optimizer = own.configure_optimizers()
    for step, batch in enumerate(BATCHES * 6):
        optimizer.zero_grad()
        loss_of(own.model, step, batch).backward()
        optimizer.step()
        other.step(optimizer)
    assert same(small, other.finish())
    assert count_macs(small, X) <= 0.4 * plan.report.budget.total
    rows = dampr.History(tmp_path / "run.jsonl").rows()
    assert rows[-1]["macs_left"] == pytest.approx(plan.report.budget.reached / plan.report.budget.total)


@pytest.mark.parametrize(
    "how",
    [{"precision": "bf16-mixed"}, {"accumulate_grad_batches": 2, "max_epochs": 12}, {"gradient_clip_val": 0.1}],
    ids=str,
)
def test_lightning_with_its_options(how: Any, tmp_path: Path) -> None:
    module, plan = net()
    fit(module, lightning.PlanCallback(plan), tmp_path, **how)
    assert count_macs(plan.finish(), X) <= 0.4 * plan.report.budget.total


def test_lightning_with_a_gradient_scaler(tmp_path: Path) -> None:
    module, plan = net()
    plugin = pl.plugins.MixedPrecision("16-mixed", "cpu", scaler=torch.amp.GradScaler("cpu", init_scale=2.0**10))
    fit(module, lightning.PlanCallback(plan), tmp_path, plugins=[plugin], max_epochs=8)
    assert count_macs(plan.finish(), X) <= 0.4 * plan.report.budget.total


def test_lightning_distils_as_a_loop_does(tmp_path: Path) -> None:
    module, plan = net(distill=1.0)
    fit(module, lightning.PlanCallback(plan), tmp_path)
    own, other = net(distill=1.0)
    optimizer = own.configure_optimizers()
    for step, batch in enumerate(BATCHES * 6):
        optimizer.zero_grad()
        (loss_of(own.model, step, batch) + other.penalty()).backward()
        optimizer.step()
        other.step(optimizer)
    for a, b in zip(plan.finish().state_dict().values(), other.finish().state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("stop", [16, 40])
def test_lightning_resumes(stop: int, tmp_path: Path) -> None:
    module, plan = net()
    keep = pl.callbacks.ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=8, save_top_k=-1)
    fit(module, lightning.PlanCallback(plan), tmp_path, enable_checkpointing=True, callbacks=[keep])
    again, other = net()
    path = tmp_path / f"step={stop}.ckpt"
    with pytest.raises((ValueError, RuntimeError), match=r"call callback.resume|size mismatch|Unexpected key"):
        fit(again, lightning.PlanCallback(other), tmp_path, ckpt_path=path)
    again, other = net()
    callback = lightning.PlanCallback(other)
    callback.resume(path)
    fit(again, callback, tmp_path, ckpt_path=path)
    assert same(plan.finish(), other.finish())


def test_lightning_refuses_what_cannot_work(tmp_path: Path) -> None:
    class DDPStrategy:
        pass

    class Trainer:
        strategy = DDPStrategy()

    with pytest.raises(ValueError, match="strategy=DDPStrategy: not supported with a plan"):
        lightning.PlanCallback(net()[1]).on_train_start(Trainer(), None)
    with pytest.raises(TypeError, match=r"plan='x': expected a dampr.Plan"):
        lightning.PlanCallback("x")  # type: ignore[arg-type]
    module, plan = net()
    module.automatic_optimization = False
    module.configure_optimizers = lambda: [  # type: ignore[method-assign]
        torch.optim.SGD(module.model[i].parameters()) for i in (0, 2)
    ]
    with pytest.raises(ValueError, match="2 optimizers have weights of the plan's model"):
        fit(module, lightning.PlanCallback(plan), tmp_path)


def text_model(**how: Any) -> tuple[Any, dampr.Plan]:
    torch.manual_seed(0)
    model, x = llama()
    return model, huggingface.plan(model, x, **({"macs": 0.6, "steps": 48} | how))


def trainer(model: Any, callback: Any, folder: Path, **how: Any) -> Any:
    options = {
        "max_steps": 48,
        "per_device_train_batch_size": 4,
        "logging_steps": 8,
        "save_steps": 8,
        "use_cpu": True,
        "report_to": "none",
    }
    arguments = transformers.TrainingArguments(folder, disable_tqdm=True, weight_decay=0.01, **(options | how))
    return transformers.Trainer(model, arguments, train_dataset=Texts(), callbacks=[callback])


def test_transformers_trainer_with_its_own_optimizer(tmp_path: Path) -> None:
    model, plan = text_model()
    run = trainer(model, huggingface.PlanCallback(plan, tmp_path / "run.jsonl"), tmp_path)
    run.train()
    small = plan.finish()
    assert small is model
    example = {"input_ids": words, "use_cache": False}
    assert count_macs(small, example) <= 0.6 * plan.report.budget.total
    assert small.config.dampr["linear"]
    huggingface.save_pretrained(small, tmp_path / "small")
    again = huggingface.from_pretrained(tmp_path / "small")
    torch.testing.assert_close(again.eval()(**example).logits, small.eval()(**example).logits)
    log = [entry for entry in run.state.log_history if "loss" in entry]
    assert log[0]["macs_left"] > log[-1]["macs_left"]
    assert log[-1]["macs_left"] == pytest.approx(plan.report.budget.reached / plan.report.budget.total)


@pytest.mark.parametrize("stop", [8, long_if(32, 32)])
def test_transformers_trainer_resumes(stop: int, tmp_path: Path) -> None:
    model, plan = text_model()
    trainer(model, huggingface.PlanCallback(plan), tmp_path).train()
    again, other = text_model()
    callback = huggingface.PlanCallback(other)
    folder = tmp_path / f"checkpoint-{stop}"
    callback.resume(folder)
    trainer(again, callback, tmp_path / "again").train(resume_from_checkpoint=str(folder))
    for a, b in zip(plan.finish().parameters(), other.finish().parameters(), strict=True):
        torch.testing.assert_close(a, b)


def test_transformers_trainer_refuses_what_cannot_work(tmp_path: Path) -> None:
    model, plan = text_model()
    with pytest.raises(ValueError, match="the Trainer takes 12 steps, the plan was made for 48"):
        trainer(model, huggingface.PlanCallback(plan), tmp_path, max_steps=12).train()
    with pytest.raises(ValueError, match="it distills, expected distill=0"):
        huggingface.PlanCallback(text_model(distill=1.0, distill_loss=lambda a, b: F.mse_loss(a.logits, b.logits))[1])
    with pytest.raises(FileNotFoundError):
        huggingface.PlanCallback(plan).resume(tmp_path)
    run = trainer(model, huggingface.PlanCallback(plan), tmp_path)
    run.add_callback(huggingface.PlanCallback(plan))
    with pytest.raises(ValueError, match="at step 0, the plan is at 1: leave all steps of the plan to one callback"):
        run.train()
    with pytest.raises(ValueError, match="at step 0, the plan is at 1: make a new plan"):
        trainer(model, huggingface.PlanCallback(plan), tmp_path).train()
