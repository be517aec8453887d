"""What CI runs is in the Makefile, so that it runs here too, and what the Makefile can check is in CI."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

yaml = pytest.importorskip("yaml")
ROOT = Path(__file__).resolve().parents[1]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
TARGETS = set(re.findall(r"^([a-z][a-z-]*):", (ROOT / "Makefile").read_text(), re.M))
IN_CI = {
    "lint",
    "test",
    "test-long",
    "test-latest",
    "test-floor",
    "test-no-extension",
    "test-no-triton",
    "packaging",
    "fuzz",
    "soak",
    "sanitize",
}


def jobs(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load(path.read_text())["jobs"]
    return found


def commands(path: Path) -> list[str]:
    return [step["run"] for job in jobs(path).values() for step in job["steps"] if "run" in step]


def test_there_are_workflows_for_checks_for_the_site_and_for_wheels() -> None:
    assert [path.name for path in WORKFLOWS] == ["ci.yml", "docs.yml", "wheels.yml"]


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_every_step_is_a_target_of_the_makefile(path: Path) -> None:
    for command in commands(path):
        match = re.fullmatch(r"make ([a-z-]+)( [A-Z]+=(\d+|\$\{\{ matrix\.[a-z]+ \}\}))?", command)
        assert match is not None, command
        assert match[1] in TARGETS, command


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_every_job_checks_out_ends_in_time_and_runs_something(path: Path) -> None:
    for name, job in jobs(path).items():
        uses = [step.get("uses", "") for step in job["steps"]]
        assert any(use.startswith("actions/checkout@") for use in uses), name
        assert any(use.startswith("actions/setup-python@") for use in uses), name
        assert any("run" in step for step in job["steps"]), name
        assert 0 < job["timeout-minutes"] <= 120, name


def test_every_check_and_every_python_is_in_ci() -> None:
    ci, docs, wheels = WORKFLOWS
    assert commands(docs) == ["make docs"]
    assert {command.split()[1] for command in commands(ci)} == IN_CI
    assert jobs(ci)["python"]["strategy"]["matrix"]["python"] == ["3.10", "3.11", "3.12", "3.13", "3.14"]
    machines = jobs(wheels)["wheels"]["strategy"]["matrix"]["machine"]
    assert {"ubuntu-latest", "ubuntu-24.04-arm"} < set(machines)
    assert any(machine.startswith("macos") for machine in machines)
    assert {command.split()[1] for command in commands(wheels)} == {"wheels", "sdist"}


def test_the_floor_is_that_of_the_package_and_wheels_are_of_every_python() -> None:
    tomllib = pytest.importorskip("tomllib", reason="needs Python 3.11")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    floor = re.search(r"^torch==([\d.]+)\.\*$", (ROOT / "constraints-floor.txt").read_text(), re.M)
    assert floor is not None
    assert f"torch>={floor[1]}" in project["project"]["dependencies"]
    built = project["tool"]["cibuildwheel"]["build"]
    assert [f"cp3{minor}-*" for minor in range(10, 15)] == built
    assert project["project"]["requires-python"] == ">=3.10"
