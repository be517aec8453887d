"""``python -m benchmarks.tables``: write the tables of README.md from the results files. No number in a document is typed by hand.

A table stands between ``<!-- table: NAME -->`` and ``<!-- end -->``; NAME is a file under benchmarks/results without its ending.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

from dampr import demo, report

ROOT = Path(__file__).resolve().parent.parent
PLACE = re.compile(r"(<!-- table: (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)


def render(name: str) -> str:
    """The table of one results file and, below it, where its numbers come from."""
    data = json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text())
    if "models" not in data:
        raise ValueError(f"name={name!r}: expected the result of a demo run")
    found, where = demo.Report.from_dict(data), data["environment"]
    table = report.markdown(report.DEMO_COLUMNS, report.demo_rows(found))
    source = f"{where['cpu']}, {where['threads']} threads, torch {where['torch']}, {where['date'][:10]}"
    link = f"[{name}.json](benchmarks/results/{name}.json)"
    return f"{table}\n\nmax \\|gated - compacted\\| over the test set: {found.max_abs_difference:.1e}. {link}: {source}.\n"


def main() -> None:
    for document in (ROOT / "README.md",):
        text = document.read_text()
        document.write_text(PLACE.sub(lambda m: m[1] + render(m[2]) + m[3], text))


if __name__ == "__main__":
    main()
