"""The C++ extension under AddressSanitizer and UBSan: ``python -m tests.sanitize``, or ``make sanitize``.

Builds it into ``build/sanitize``, beside links to the sources, so that the extension in ``dampr`` stays as it is, and
runs the tests of kernels and operators, and the fuzzer for the rest of the time, once with each instruction set that
this machine has. Any report ends it.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "build" / "sanitize"
FLAGS = "-fsanitize=address,undefined -fno-sanitize-recover=all -fno-omit-frame-pointer -g"
TESTS = ["tests/csrc", "tests/ops"]
# what torch.compile makes is no part of the extension
COMPILED = ["tests/ops/test_compile.py", "tests/ops/test_dynamic.py"]


def build() -> None:
    """A package of links, and in it the extension of its own."""
    package = FOLDER / "dampr"
    package.mkdir(parents=True, exist_ok=True)
    for name in ("tests", "csrc", "benchmarks", "pyproject.toml", "README.md", "docs", "CHANGELOG.md"):
        link(ROOT / name, FOLDER / name)
    for source in (ROOT / "dampr").iterdir():
        if source.name != "__pycache__" and not source.name.startswith("_C."):
            link(source, package / source.name)
    os.environ["CXXFLAGS"] = os.environ["LDFLAGS"] = FLAGS
    sys.path.insert(0, str(ROOT))
    sys.argv = ["setup.py", "--version"]  # which builds nothing
    from runpy import run_path

    setup = run_path(str(ROOT / "setup.py"), run_name="sanitize")
    setup["KERNEL_FLAGS"].append("-O1")  # or the checks take a quarter of an hour
    setup["BASELINE_OF_SEVERAL"].clear()
    setup["Toolchain"]().build(FOLDER / "objects", package / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}")


def link(source: Path, target: Path) -> None:
    if not target.is_symlink():
        target.symlink_to(source)


def runtime(name: str) -> str:
    """The sanitizer's library of the compiler, which has to be there before Python is."""
    compiler = os.environ.get("CXX") or shutil.which("c++") or "g++"
    return subprocess.run(
        [*compiler.split(), f"-print-file-name={name}"], capture_output=True, text=True, check=True
    ).stdout.strip()


def environment(isa: str) -> dict[str, str]:
    own = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "CXXFLAGS", "LDFLAGS")}
    own |= {
        "LD_PRELOAD": f"{runtime('libasan.so')}:{runtime('libubsan.so')}",
        "DAMPR_CPU_ISA": isa,
        "OMP_NUM_THREADS": "2",
    }
    # Sizes without sense are for torch to refuse, which sees that there is no memory for them.
    own |= {"ASAN_OPTIONS": "detect_leaks=0:abort_on_error=1:allocator_may_return_null=1"}
    own |= {"UBSAN_OPTIONS": "print_stacktrace=1:halt_on_error=1"}
    return own | {"PYTHONDONTWRITEBYTECODE": "1"}


def usable() -> list[str]:
    """The instruction sets that the extension has and this machine too, the widest first."""
    look = (
        "from dampr import _C; assert 'sanitize' in _C.__file__, _C.__file__; print(_C.isa(), *_C.build_info()['isas'])"
    )
    best, *isas = subprocess.run(
        [sys.executable, "-c", look], cwd=FOLDER, env=environment(""), capture_output=True, text=True, check=True
    ).stdout.split()
    return isas[isas.index(best) :]


def run(isa: str, *command: str) -> int:
    print(f"== {isa}: {' '.join(command)}", flush=True)
    return subprocess.run([sys.executable, *command], cwd=FOLDER, env=environment(isa), check=False).returncode


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.sanitize", description="The C++ extension under AddressSanitizer and UBSan."
    )
    parser.add_argument(
        "--fuzz-minutes", type=float, default=2.0, help="of the fuzzer for each instruction set (default: 2)"
    )
    parser.add_argument("--isa", help="this instruction set alone")
    parser.add_argument(
        "tests", nargs="*", default=TESTS, help="pytest's arguments instead of the tests of kernels and operators"
    )
    given = parser.parse_args()
    build()
    failed, isas = 0, usable()
    if given.isa and given.isa not in isas:
        print(f"--isa {given.isa}: this machine has {', '.join(isas)}; nothing was run")
        return 0
    for isa in [given.isa] if given.isa else isas:
        skipped = [f"--ignore={path}" for path in COMPILED]
        failed |= run(isa, "-m", "pytest", "-q", "-m", "not slow", "-p", "no:cacheprovider", *skipped, *given.tests)
        if given.fuzz_minutes:
            failed |= run(isa, "-m", "tests.fuzz", "--minutes", str(given.fuzz_minutes), "--seed", "1")
    print("sanitizers: " + ("FAILED" if failed else "nothing found"))
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
