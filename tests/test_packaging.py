"""Builds under pip's default isolation and without torch, installs, and imports with parts missing,
each in environments of their own.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest
import torch

from tests.limits import HANG

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parent.parent
SOURCES = [
    "csrc",
    "dampr",
    "setup.py",
    "pyproject.toml",
    "MANIFEST.in",
    "constraints.txt",
    "LICENSE",
    "README.md",
    "CONTRIBUTING.md",
]
BLOCK_TRITON = """
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "triton":
            raise ModuleNotFoundError(f"No module named {name!r} (blocked)", name=name)
sys.meta_path.insert(0, Block())
"""
REPORT = (
    "import json, dampr; print(json.dumps({k: str(v) for k, v in dict(dampr.backend_info()).items()}), "
    "dampr.__file__, sep='\\n')"
)


def run(*command: str | Path, cwd: Path, ok: bool = True, **environment: str) -> subprocess.CompletedProcess[str]:
    clean = {
        k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "CXX", "CC", "DAMPR_CPU_ISA", "DAMPR_BACKEND")
    }
    result = subprocess.run(
        [str(c) for c in command],
        cwd=cwd,
        env=clean | environment,
        capture_output=True,
        text=True,
        timeout=HANG,
        stdin=subprocess.DEVNULL,
        check=False,
    )
    assert not ok or result.returncode == 0, f"{command} failed:\n{result.stdout}\n{result.stderr}"
    return result


def make_venv(folder: Path, borrow: bool) -> Path:
    """The interpreter of a fresh environment; ``borrow``: it sees the packages of the one that runs the tests,
    but not its dampr.
    """
    venv.create(folder, with_pip=False, symlinks=True)
    python = folder / "bin" / "python"
    if borrow:
        site = Path(
            run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=folder).stdout.strip()
        )
        # A plain path, so .pth files over there (an editable dampr among them) are not read.
        (site / "borrowed.pth").write_text(str(Path(torch.__file__).resolve().parent.parent) + "\n")
    return python


def pip(python: Path | str, *arguments: str | Path, cwd: Path, **kwargs: str) -> str:
    """Runs this environment's pip for another interpreter; returns all it printed."""
    result = run(
        sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", python, *arguments, cwd=cwd, **kwargs
    )
    return result.stdout + result.stderr


def copy_sources(target: Path) -> Path:
    target.mkdir()
    for name in SOURCES:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, target / name, ignore=shutil.ignore_patterns("__pycache__", "_C*"))
        elif source.exists():
            shutil.copy(source, target / name)
    return target


def compiler(path: Path, line: str) -> str:
    """A compiler: a shell script with this line."""
    path.write_text(f"#!/bin/sh\n{line}\n")
    path.chmod(0o755)
    return str(path)


def build_wheel(python: Path | str, source: Path, target: Path, **environment: str) -> tuple[Path, str]:
    output = pip(
        python, "wheel", "--no-deps", "--no-cache-dir", "-v", "-w", target, source, cwd=target.parent, **environment
    )
    (wheel,) = target.glob("*.whl")
    return wheel, output


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The unpacked source distribution, made through the build backend's own hook."""
    folder = tmp_path_factory.mktemp("sdist")
    source = copy_sources(folder / "checkout")
    code = f"from setuptools import build_meta; print(build_meta.build_sdist({str(folder)!r}))"
    run(sys.executable, "-c", code, cwd=source)
    (archive,) = folder.glob("dampr_torch-*.tar.gz")
    with tarfile.open(archive) as tar:
        tar.extractall(folder / "unpacked", filter="data")
    (unpacked,) = (folder / "unpacked").iterdir()
    return unpacked


@pytest.fixture(
    scope="module", params=[True, pytest.param(False, marks=pytest.mark.long)], ids=["quick", "as users do"]
)
def wheel(request: pytest.FixtureRequest, sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from the source distribution, in an environment without torch, with pip's default isolation; quickly, or as
    users build it.
    """
    folder = tmp_path_factory.mktemp("wheel")
    python = make_venv(folder / "venv", borrow=False)
    assert run(python, "-c", "import torch", cwd=folder, ok=False).returncode != 0
    how = {"CXX": compiler(folder / "quick", 'exec c++ "$@" -O0')} if request.param else {}
    return build_wheel(python, sdist, folder / "wheels", **how)[0]


@pytest.fixture(scope="module")
def pure_wheel(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Built where the compiler does not work, and what the build printed."""
    folder = tmp_path_factory.mktemp("pure")
    python = make_venv(folder / "venv", borrow=False)
    return build_wheel(python, sdist, folder / "wheels", CXX="/bin/false", CC="/bin/false")


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("installed")
    python = make_venv(folder / "venv", borrow=True)
    pip(python, "install", "--no-deps", wheel, cwd=folder)
    return python


@pytest.fixture(scope="module")
def installed_pure(pure_wheel: tuple[Path, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("installed_pure")
    python = make_venv(folder / "venv", borrow=True)
    pip(python, "install", "--no-deps", pure_wheel[0], cwd=folder)
    return python


def backend_info(python: Path, cwd: Path, prelude: str = "") -> dict[str, str]:
    info, where = run(python, "-c", prelude + REPORT, cwd=cwd).stdout.strip().splitlines()[-2:]
    assert str(ROOT) not in where, "dampr was imported from the checkout"
    return json.loads(info)


def test_the_wheel_holds_the_extension_and_the_package_data(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert sum(name.startswith("dampr/_C.") for name in names) == 1
    assert "dampr/py.typed" in names
    assert not [name for name in names if name.startswith(("tests/", "csrc/", "benchmarks/"))]
    expected = {str(p.relative_to(ROOT)) for pattern in ("*.py", "*.json") for p in (ROOT / "dampr").rglob(pattern)}
    assert expected <= set(names)


def test_the_build_requires_no_torch() -> None:
    tomllib = pytest.importorskip("tomllib", reason="needs Python 3.11")
    requires = tomllib.loads((ROOT / "pyproject.toml").read_text())["build-system"]["requires"]
    assert not [requirement for requirement in requires if "torch" in requirement]


def test_an_installed_wheel_imports_from_anywhere(installed: Path, tmp_path: Path) -> None:
    info = backend_info(installed, tmp_path)
    assert "missing" not in info["cpp"]
    assert run(installed, "-m", "dampr", cwd=tmp_path).stdout.strip()
    assert run(installed.parent / "dampr", "--help", cwd=tmp_path).returncode == 0


def test_without_a_compiler_the_wheel_is_pure_and_the_build_says_why(pure_wheel: tuple[Path, str]) -> None:
    wheel, output = pure_wheel
    assert wheel.name.endswith("-py3-none-any.whl")
    assert not [name for name in zipfile.ZipFile(wheel).namelist() if "_C." in name]
    assert "WITHOUT its C++ kernels" in output
    assert "/bin/false cannot build an extension module" in output


def test_without_the_extension_it_imports_and_says_what_is_missing(installed_pure: Path, tmp_path: Path) -> None:
    assert "missing" in backend_info(installed_pure, tmp_path)["cpp"]


def test_without_triton_it_imports_and_says_what_is_missing(
    installed: Path, installed_pure: Path, tmp_path: Path
) -> None:
    for python in (installed, installed_pure):
        assert "missing" in backend_info(python, tmp_path, BLOCK_TRITON)["triton"]


def copy_unbuilt(sdist: Path, target: Path) -> Path:
    shutil.copytree(sdist, target, ignore=shutil.ignore_patterns("build", "*.egg-info"))
    return target


def test_an_editable_install_builds_in_place(sdist: Path, tmp_path: Path) -> None:
    source = copy_unbuilt(sdist, tmp_path / "a folder with spaces")
    python = make_venv(tmp_path / "venv", borrow=True)
    quick = compiler(tmp_path / "quick", 'exec c++ "$@" -O0')
    pip(python, "install", "--no-deps", "-e", source, cwd=tmp_path, CXX=quick)
    assert list((source / "dampr").glob("_C.*"))
    assert "missing" not in backend_info(python, tmp_path)["cpp"]


def test_without_ninja_and_with_a_compiler_that_knows_no_avx_the_baseline_is_built(sdist: Path, tmp_path: Path) -> None:
    source = copy_unbuilt(sdist, tmp_path / "source")
    refuse = 'case "$*" in *-mavx*) echo "error: no AVX" >&2; exit 1;; esac'
    old = compiler(tmp_path / "old-compiler", f'{refuse}\nexec c++ "$@" -O0')
    code = (
        "import runpy, shutil, sys\n"
        "sys.modules['ninja'] = None\n"
        "which = shutil.which\n"
        "shutil.which = lambda name, *a, **k: None if name == 'ninja' else which(name, *a, **k)\n"
        "sys.argv = ['setup.py', '-q', 'build_ext', '--inplace']\n"
        "runpy.run_path('setup.py', run_name='__main__')"
    )
    run(sys.executable, "-c", code, cwd=source, CXX=old)
    assert not list(source.rglob("build.ninja"))
    isas = run(
        sys.executable, "-c", "import torch; from dampr import _C; print(_C.build_info()['isas'], _C.isa())", cwd=source
    )
    assert isas.stdout.strip() == "['baseline'] baseline"
