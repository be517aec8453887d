"""``python -m dampr``: without arguments which parts are there; with arguments the ``dampr`` command,
if its packages are installed.
"""

from __future__ import annotations

import sys

import dampr


def main() -> None:
    if len(sys.argv) > 1:
        from dampr.cli import main as command

        command()
        return
    print(f"dampr {dampr.__version__}")
    for name, state in dampr.backend_info().items():
        print(f"{name:10} {state}")


if __name__ == "__main__":
    main()
