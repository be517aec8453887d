"""From any model to a smaller plain one: convert, penalise, report, compact, save."""

from .compact import CompactionError, compact
from .convert import ConversionError, convert
from .files import FileError, load, save
from .summary import Summary, gated_layers, param_groups, penalty, summary

__all__ = [
    "CompactionError",
    "ConversionError",
    "FileError",
    "Summary",
    "compact",
    "convert",
    "gated_layers",
    "load",
    "param_groups",
    "penalty",
    "save",
    "summary",
]
