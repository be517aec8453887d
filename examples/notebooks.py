"""Run the notebooks beside this file and write what they print into them: ``python -m examples.notebooks``."""

from __future__ import annotations

import contextlib
import io
import json
from pathlib import Path
from typing import Any

NOTEBOOKS = sorted(Path(__file__).parent.glob("*.ipynb"))


def run(path: Path) -> list[str]:
    """Run the cells of a notebook one after the other, in one namespace; returns what each code cell printed."""
    names: dict[str, Any] = {"__name__": path.stem}
    printed = []
    for cell in json.loads(path.read_text())["cells"]:
        if cell["cell_type"] == "code":
            out = io.StringIO()
            with contextlib.redirect_stdout(out):
                exec(compile("".join(cell["source"]), f"{path.name}[{len(printed)}]", "exec"), names)
            printed.append(out.getvalue())
    return printed


def main() -> None:
    for path in NOTEBOOKS:
        notebook, printed = json.loads(path.read_text()), run(path)
        cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
        for number, (cell, text) in enumerate(zip(cells, printed, strict=True)):
            cell["execution_count"] = number + 1
            lines = text.splitlines(keepends=True)
            cell["outputs"] = [{"name": "stdout", "output_type": "stream", "text": lines}] if lines else []
        path.write_text(json.dumps(notebook, indent=1) + "\n")
        print(path.name)


if __name__ == "__main__":
    main()
