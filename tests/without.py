"""pytest with a module hidden: ``python -m tests.without triton -m "not slow"``, as if it were not installed.

It is hidden from the processes that tests start, too.
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
STARTED = "import sys\nfrom tests.without import Hidden\nsys.meta_path.insert(0, Hidden({name!r}))\n"


class Hidden:
    """Makes the import of a module, and of all in it, fail as that of one that is not there."""

    def __init__(self, name: str) -> None:
        self.name = name

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
        if name == self.name or name.startswith(f"{self.name}."):
            raise ModuleNotFoundError(f"No module named {name!r} (hidden)", name=name)


def hide(name: str, folder: str) -> None:
    """Hide a module from this process and from those that it starts, by a ``sitecustomize.py`` in ``folder``."""
    sys.meta_path.insert(0, Hidden(name))  # type: ignore[arg-type]
    Path(folder, "sitecustomize.py").write_text(STARTED.format(name=name))
    os.environ["PYTHONPATH"] = os.pathsep.join([folder, str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])


def main() -> int:
    hidden, *arguments = sys.argv[1:]
    with tempfile.TemporaryDirectory() as folder:
        hide(hidden, folder)
        import pytest

        import dampr

        backend = {"dampr._C": "cpp", "triton": "triton"}[hidden]
        assert dampr.backend_info()[backend].startswith("missing"), dampr.backend_info()
        return int(pytest.main(arguments))


if __name__ == "__main__":
    sys.exit(main())
