"""Records the numbers of a training run as JSON lines. A file is only ever appended to, so nothing is lost when
training dies.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dampr import _checks

from . import inputs
from .budget import Budget
from .cost import Cost
from .file_content import FileError
from .plan import Plan
from .summary import distinct_gates, penalty

FORMAT = 1
Row = dict[str, float | None]  # "step" and whatever was recorded; None: not a finite number


class History:
    """Records how a training run goes in a file, for ``dampr report TARGET --history FILE``.

    Args:
        path: the file. If it exists already, the run is continued in it. Missing folders are made.
        source: what is recorded in every step besides the numbers given to :meth:`record`. Of a :class:`dampr.Budget`
            or a :class:`dampr.Plan`: its ``readings()``. Of a gated model: ``penalty`` (:func:`dampr.penalty`),
            ``gates_open`` and, with example inputs, ``macs_left``. None: nothing.
        example_inputs: as for :func:`dampr.compact`.

    Raises: TypeError or ValueError that names the argument; FileError, with the number of the line, if the file is no
    history.

    >>> import tempfile, dampr
    >>> model = dampr.convert(nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2)), torch.randn(8, 4))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     history = History(f"{folder}/run.jsonl", dampr.Budget(model, torch.randn(8, 4), macs=0.5))
    ...     history.record(step=1, accuracy=0.75)
    ...     history.rows()[0]["macs_left"]
    1.0
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        source: Budget | Plan | nn.Module | None = None,
        *,
        example_inputs: Any = None,
    ) -> None:
        if not (source is None or isinstance(source, (Budget, Plan, nn.Module))):
            raise TypeError(f"source={source!r:.80}: expected a dampr.Budget, a dampr.Plan, a gated model or None")
        if isinstance(source, nn.Module) and not distinct_gates(source):
            raise ValueError(
                f"source={type(source).__name__}: expected gated layers in it (dampr.convert puts them there)"
            )
        if example_inputs is not None:
            if not isinstance(source, nn.Module):
                raise ValueError("example_inputs: expected a gated model as source with them; a budget has its own")
            inputs.check(example_inputs)
        self.path, self._source = _checks.path("path", path), source
        self._cost = (
            None
            if example_inputs is None or not isinstance(source, nn.Module)
            else Cost(source, example_inputs, "macs")
        )
        self._begun = False
        if self.path.exists():
            read(self.path)

    def record(self, *, step: int, **numbers: Any) -> None:
        """Append the numbers of a step, together with those of the source. A tensor of one element counts as a number.

        Several records of the same step form one row. If the step is lower than the last one, training has gone back to
        it (from a checkpoint, say), and the rows of later steps are dropped when the file is read.

        Raises TypeError or ValueError that names the argument.
        """
        step = _checks.positive_int("step", step, least=0)
        if "dampr_history" in numbers:
            raise ValueError("dampr_history: expected another name, because it marks the first line of a run")
        row = {"step": step} | self._measured() | {name: _finite(name, value) for name, value in numbers.items()}
        if not self._begun:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._append({"dampr_history": FORMAT} | self._head())
            self._begun = True
        self._append(row)

    def rows(self) -> list[Row]:
        """The rows of the file, one for each step."""
        return read(self.path).rows

    @torch.no_grad()
    def _measured(self) -> dict[str, Any]:
        """The numbers that ``source`` (the argument of the constructor) has at this step: name -> number.

        Returns: {} without a source; the ``readings()`` of a budget or plan; of a gated model the penalty, the share of
        open gates and, with example inputs, the share of the multiply-accumulates that is left.
        """
        if self._source is None:
            return {}
        if isinstance(self._source, (Budget, Plan)):
            return {name: _finite(name, value) for name, value in self._source.readings().items()}
        decisions = torch.cat([gate.is_open() for gate in distinct_gates(self._source).values()])
        found = {"penalty": _finite("penalty", penalty(self._source)), "gates_open": float(decisions.float().mean())}
        return (
            found
            if self._cost is None
            else found | {"macs_left": float(self._cost(self._cost.decision())) / self._cost.total}
        )

    def _head(self) -> dict[str, Any]:
        """What the first line of a run says of the source: its metric, total and target."""
        if isinstance(self._source, (Budget, Plan)):
            return {"metric": self._source.metric, "total": self._source.total, "target": self._source.target}
        return {} if self._cost is None else {"metric": "macs", "total": self._cost.total}

    def _append(self, entry: dict[str, Any]) -> None:
        """Append an entry as one line."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry, allow_nan=False) + "\n")


@dataclass
class Run:
    """The content of a history: a row for each step, in order; the metric with its total and target, if the source had
    them.
    """

    rows: list[Row] = field(default_factory=list)
    metric: str | None = None
    total: float | None = None
    target: float | None = None

    def names(self) -> list[str]:
        """The names of the recorded numbers, in the order in which they first appear."""
        return [name for name in dict.fromkeys(name for row in self.rows for name in row) if name != "step"]


def read(path: str | os.PathLike[str]) -> Run:
    """The run in the file of a :class:`History`.

    Raises: FileError, with the number of the line, for a file that is not a history, is damaged or is cut off;
    FileNotFoundError.
    """
    text = Path(path).read_text(encoding="utf-8", errors="replace")
    run = Run()
    for number, line in enumerate(text.splitlines(keepends=True), 1):
        try:
            _take(run, line, first=number == 1)
        except ValueError as error:
            raise FileError(f"{os.fspath(path)}: line {number}: {error}") from None
    if not text:
        raise FileError(f"{os.fspath(path)}: line 1: nothing, expected the first line of a dampr.History")
    return run


def _take(run: Run, line: str, first: bool) -> None:
    """Add a line of the file to a run. Raises ValueError that says what is wrong with the line."""
    if not line.endswith("\n"):
        raise ValueError(f"{line!r:.60} is cut off; delete the line to go on without it")
    try:
        entry = json.loads(line, parse_constant=lambda name: name)
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{line.rstrip()!r:.60} is no JSON ({error})") from None
    if not isinstance(entry, dict):
        raise ValueError(f"{line.rstrip()!r:.60}, expected a JSON object")
    if "dampr_history" in entry:
        _take_head(run, entry)
    elif first:
        raise ValueError(f'{line.rstrip()!r:.60}, expected {{"dampr_history": {FORMAT}, ...}}')
    else:
        _take_row(run.rows, entry)


def _take_head(run: Run, head: dict[str, Any]) -> None:
    """Take over the metric, total and target from the first line of a run. Raises ValueError for wrong ones."""
    if head["dampr_history"] != FORMAT:
        raise ValueError(
            f"dampr_history={head['dampr_history']!r}, expected {FORMAT}; a newer dampr may have written it"
        )
    if not isinstance(head.get("metric"), str | None):
        raise ValueError(f"metric={head['metric']!r}, expected a name")
    for name in ("total", "target"):
        if not (head.get(name) is None or _is_number(head[name])):
            raise ValueError(f"{name}={head[name]!r}, expected a number")
    run.metric, run.total, run.target = (head.get(name) for name in ("metric", "total", "target"))


def _take_row(rows: list[Row], row: dict[str, Any]) -> None:
    """Add a row; it replaces rows of later steps and is merged with a row of the same step. Raises ValueError for a
    wrong one.
    """
    step = row.get("step")
    if not isinstance(step, int) or isinstance(step, bool) or step < 0:
        raise ValueError(f"step={step!r}, expected an integer of at least 0")
    wrong = next((name for name, value in row.items() if not (value is None or _is_number(value))), None)
    if wrong is not None:
        raise ValueError(f"{wrong}={row[wrong]!r:.60}, expected a number or null")
    while rows and int(rows[-1]["step"] or 0) > step:
        rows.pop()
    if rows and rows[-1]["step"] == step:
        rows[-1] |= row
    else:
        rows.append(row)


def _is_number(value: Any) -> bool:
    """Whether ``value`` is a finite int or float."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e300  # false for NaN too


def _finite(name: str, value: Any) -> float | None:
    """A number, a tensor of one element or a NumPy scalar as a float; None if it is not finite or larger than 1e300."""
    try:
        if isinstance(value, (str, bool)):
            raise TypeError
        number = float(value.detach() if isinstance(value, torch.Tensor) else value)
    except OverflowError:  # an integer too large for a float
        return None
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(f"{name}={value!r:.80}: expected a number") from None
    return number if _is_number(number) else None
