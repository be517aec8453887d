"""``python -m benchmarks.tables``: write the tables of README.md and docs/performance.md from the results files; none is typed by hand.

A table stands between ``<!-- table: NAME -->`` and ``<!-- end -->``; NAME is a file under benchmarks/results without its ending.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from dampr import demo, report
from dampr.bench import linear, records

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = (ROOT / "README.md", ROOT / "docs" / "performance.md")
PLACE = re.compile(r"(<!-- table: (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)


def render(name: str, document: Path) -> str:
    """The table of one results file and, below it, where its numbers come from."""
    path = next(p for ending in ("json", "jsonl") if (p := ROOT / "benchmarks" / "results" / f"{name}.{ending}").exists())
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.suffix == ".jsonl" else [json.loads(path.read_text())]
    where = lines[0]["environment"]
    up = "../" * (len(document.relative_to(ROOT).parts) - 1)
    run = f"{records.device_of(where)}, torch {where['torch']}, {where['date'][:10]}, commit {where['commit']}"
    source = f"[{path.name}]({up}{path.relative_to(ROOT)}): {run}."
    return f"{_table(lines)} {source}\n"


def _table(lines: list[dict[str, Any]]) -> str:
    head, *points = lines
    if "models" in head:
        found = demo.Report.from_dict(head)
        table = report.markdown(report.DEMO_COLUMNS, report.demo_rows(found))
        return f"{table}\n\nmax \\|gated - compacted\\| over the test set: {found.max_abs_difference:.1e}."
    if "ceilings" in head:
        unit = {"copy_bytes_per_second": ("GB/s", 1e9)}
        rows = [
            (name, f"{value / unit.get(name, ('', 1e12))[1]:.3g} {unit.get(name, ('TFLOP/s', 0))[0]}")
            for name, value in head["ceilings"].items()
        ]
        return report.markdown(("ceiling", "measured"), rows) + "\n\n"
    columns, *rows = linear.table([linear.Point(**{**p, "shape": tuple(p["shape"])}) for p in points], head["verified"])
    return report.markdown(columns, rows) + "\n\n"


def main() -> None:
    for document in DOCUMENTS:
        text = document.read_text()
        document.write_text(PLACE.sub(lambda m, document=document: m[1] + render(m[2], document) + m[3], text))


if __name__ == "__main__":
    main()
