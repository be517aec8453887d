"""dampr: learned gates that prune PyTorch networks while they train, fused so that the gates cost next to nothing.

>>> import torch, dampr
>>> model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 2))
>>> x = torch.randn(4, 8)
>>> model = dampr.convert(model, example_inputs=x)
>>> small = dampr.compact(model, example_inputs=x)
"""

from dampr import functional, gates, integrations, nn
from dampr._version import __version__
from dampr.gates import gate_generator, hold_draws
from dampr.nn.bank import GateBank
from dampr.nn.explain import explain
from dampr.ops import BackendUnavailableError, backend, backend_info
from dampr.prune import (
    Budget,
    BudgetError,
    BudgetReport,
    BudgetWarning,
    CompactionError,
    ConversionError,
    FileError,
    History,
    Plan,
    PlanError,
    PlanReport,
    Several,
    Shrinker,
    Summary,
    Verification,
    compact,
    convert,
    expand,
    load,
    param_groups,
    penalty,
    prune_once,
    save,
    summary,
    verify_model,
)

__all__ = [
    "BackendUnavailableError",
    "Budget",
    "BudgetError",
    "BudgetReport",
    "BudgetWarning",
    "CompactionError",
    "ConversionError",
    "FileError",
    "GateBank",
    "History",
    "Plan",
    "PlanError",
    "PlanReport",
    "Several",
    "Shrinker",
    "Summary",
    "Verification",
    "__version__",
    "backend",
    "backend_info",
    "compact",
    "convert",
    "expand",
    "explain",
    "functional",
    "gate_generator",
    "gates",
    "hold_draws",
    "integrations",
    "load",
    "nn",
    "param_groups",
    "penalty",
    "prune_once",
    "save",
    "summary",
    "verify_model",
]
