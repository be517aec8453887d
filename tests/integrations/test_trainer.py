"""A budget kept by transformers' Trainer."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import dampr

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from dampr.integrations import huggingface  # noqa: E402
from tests.integrations.test_huggingface import llama, words  # noqa: E402
from tests.long import long_if  # noqa: E402


class Texts(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return 32

    def __getitem__(self, i: int) -> dict[str, Any]:
        text = torch.randint(50, (7,), generator=torch.Generator().manual_seed(i))
        return {"input_ids": text, "labels": text}


def built() -> tuple[Any, dampr.Budget]:
    torch.manual_seed(0)
    model, x = llama()
    huggingface.convert(model, example_inputs=x)
    return model, dampr.Budget(model, x, macs=0.6, schedule=4, strength=100.0)


def trainer(model: Any, budget: dampr.Budget, folder: Any, history: Any = None, **how: Any) -> Any:
    gate_lr = 2.0 if budget.controller is None else None
    groups = dampr.param_groups(model, lr=1e-3, gate_lr=gate_lr, weight_decay=0.01)
    options = {
        "max_steps": 6,
        "per_device_train_batch_size": 4,
        "logging_steps": 1,
        "save_steps": 4,
        "use_cpu": True,
        "report_to": "none",
    }
    return transformers.Trainer(
        model,
        transformers.TrainingArguments(folder, disable_tqdm=True, lr_scheduler_type="constant", **(options | how)),
        train_dataset=Texts(),
        callbacks=[huggingface.DamprCallback(budget, history)],
        eval_dataset=Texts(),
        optimizers=(torch.optim.AdamW(groups), None),
    )


def test_gates_close_under_a_trainer_and_the_rest_of_the_log_is_that_of_the_task(tmp_path: Any) -> None:
    model, budget = built()
    run = trainer(model, budget, tmp_path)
    run.train()
    log = [entry for entry in run.state.log_history if "loss" in entry]
    assert budget.steps == len(log) == 6
    assert log[-1]["macs_left"] < log[0]["macs_left"]
    assert log[-1]["gates_open"] < 1
    assert log[-1]["budget_multiplier"] == pytest.approx(float(budget.multiplier))
    assert log[1]["budget_penalty"] > 0
    assert all(3 < entry["loss"] < 5 for entry in log), "log 50 = 3.9, without the penalty"
    report = budget.finalize()
    assert report.reached <= report.target
    assert huggingface.compact(model, example_inputs={"input_ids": words, "use_cache": False}).config.dampr["linear"]


def test_the_log_goes_into_a_history_with_evaluations_in_the_rows_of_their_steps(tmp_path: Any) -> None:
    model, budget = built()
    trainer(model, budget, tmp_path, tmp_path / "run.jsonl", eval_strategy="steps", eval_steps=3).train()
    rows = dampr.History(tmp_path / "run.jsonl").rows()
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert [row["step"] for row in rows if "eval_loss" in row] == [3, 6]
    assert all({"loss", "macs_left", "budget_penalty"} <= row.keys() for row in rows)


@pytest.mark.parametrize("accumulate", [1, 4])
def test_the_gradient_is_that_of_loss_plus_penalty(accumulate: int, tmp_path: Any) -> None:
    """Whatever the number of batches of a step: with no task, gates move by the gradient of the penalty alone."""
    model, budget = built()
    found: list[torch.Tensor] = []

    class Look(transformers.TrainerCallback):
        def on_pre_optimizer_step(self, *_: Any, **__: Any) -> None:
            found.append(parameter.grad.clone())

    parameter = dampr.prune.gated_layers(model)["model.layers.0.mlp.up_proj"].gate.log_alpha
    budget.step()
    (expected,) = torch.autograd.grad(budget.penalty(), parameter)
    assert bool(expected.any())
    how = {"max_steps": 1, "gradient_accumulation_steps": accumulate, "max_grad_norm": 0.0}
    run = trainer(model, budget, tmp_path, **how)
    run.compute_loss_func = lambda outputs, labels, num_items_in_batch=None: 0.0 * outputs.logits.sum()
    run.add_callback(Look)
    run.train()
    torch.testing.assert_close(found[0], expected)


@pytest.mark.parametrize("restore", [False, True])
def test_a_training_that_resumes_goes_on_with_the_budget(restore: bool, tmp_path: Any) -> None:
    model, budget = built()
    trainer(model, budget, tmp_path).train()
    again, other = built()
    resumed = trainer(again, other, tmp_path, restore_callback_states_from_checkpoint=restore)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert other.steps == 6
    assert float(other.multiplier) == pytest.approx(float(budget.multiplier), rel=1e-3)


@pytest.mark.parametrize("when", [long_if(when, "epoch", "steps") for when in ("steps", "epoch", "best")])
@pytest.mark.parametrize("score", ["importance", "learned"])
def test_checkpoints_hold_a_budget_that_owns_its_gates(score: str, when: str, tmp_path: Any) -> None:
    def made() -> tuple[dampr.Budget, Any]:
        torch.manual_seed(0)
        model, x = llama()
        huggingface.convert(model, example_inputs=x)
        budget = dampr.Budget(dampr.gate_generator(model, seed=1), x, macs=0.6, steps=16, score=score)
        how: dict[str, Any] = {"max_steps": 16, "save_steps": 8, "save_strategy": when}
        if when == "best":
            how |= {"metric_for_best_model": "loss", "eval_strategy": "steps", "eval_steps": 8, "save_total_limit": 5}
        return budget, trainer(model, budget, tmp_path, **how)

    def kept(budget: dampr.Budget) -> torch.Tensor:
        assert budget.controller is not None
        return torch.cat([gate.deterministic().detach() for gate in budget.controller.gates])

    budget, run = made()
    run.train()
    other, resumed = made()
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-8"))
    assert (other.steps, other.measured) == (budget.steps, budget.measured) == (16, 16)
    torch.testing.assert_close(kept(other), kept(budget))
    assert other.finalize().reached == budget.finalize().reached


@pytest.mark.parametrize("option", ["weight_decay", "fp16"])
def test_what_would_pull_gates_wrongly_is_refused(option: str, tmp_path: Any) -> None:
    model, budget = built()
    run = trainer(model, budget, tmp_path)
    if option == "weight_decay":
        run.callback_handler.optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.1)
    else:
        run.args.fp16 = True
    with pytest.raises(ValueError, match="weight_decay=0.1 on gates" if option == "weight_decay" else "fp16=True"):
        run.callback_handler.on_train_begin(run.args, run.state, run.control)


def test_a_callback_needs_a_budget() -> None:
    with pytest.raises(TypeError, match="expected a dampr.Budget"):
        huggingface.DamprCallback(0.5)  # type: ignore[arg-type]
