"""From any model to a smaller plain one: convert, penalise, report, compact, save."""

from .budget import Budget
from .budget_report import BudgetError, BudgetReport, BudgetWarning
from .compact import CompactionError, compact
from .convert import ConversionError, convert
from .cost import Cost
from .doctor import Finding, calibrate, doctor
from .expand import expand
from .file_content import FileError
from .files import load, save
from .history import History
from .inputs import Several
from .latency import Latency
from .once import prune_once
from .plan import Plan
from .plan_report import PlanError, PlanReport
from .recalibrate import recalibrate
from .shrinker import Shrink, Shrinker
from .sight import SightWarning
from .summary import Summary, distinct_gates, gated_layers, param_groups, penalty, summary
from .times import LayerTime, layer_times
from .verify import GateCheck, Verification, verify_model

__all__ = [
    "Budget",
    "BudgetError",
    "BudgetReport",
    "BudgetWarning",
    "CompactionError",
    "ConversionError",
    "Cost",
    "FileError",
    "Finding",
    "GateCheck",
    "History",
    "Latency",
    "LayerTime",
    "Plan",
    "PlanError",
    "PlanReport",
    "Several",
    "Shrink",
    "Shrinker",
    "SightWarning",
    "Summary",
    "Verification",
    "calibrate",
    "compact",
    "convert",
    "distinct_gates",
    "doctor",
    "expand",
    "gated_layers",
    "layer_times",
    "load",
    "param_groups",
    "penalty",
    "prune_once",
    "recalibrate",
    "save",
    "summary",
    "verify_model",
]
