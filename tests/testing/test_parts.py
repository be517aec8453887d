"""Verification in parts gives what it gives in one."""

from __future__ import annotations

import torch

from dampr.testing import verify


def test_parts_are_the_whole() -> None:
    job = ("sample_gates", "reference", "cpu", torch.float32, False)
    whole = verify.verify_op(*job)
    parts = [verify.verify_op(*job, part=(part, 3)) for part in range(3)]
    assert {part.cases for part in parts} != {whole.cases}
    first, *others = parts
    for other in others:
        first.join(other)
    assert first.as_dict() == whole.as_dict()


def test_several_processes_give_the_rows_of_one() -> None:
    wanted = [job for op in ("noise", "dependency_generator") for job in verify.jobs(op, "reference")]
    assert wanted
    assert [row.as_dict() for row in verify.run_side_by_side(wanted, 2, parts=2)] == [
        verify.verify_op(*job).as_dict() for job in wanted
    ]


def test_a_part_without_cases_joins() -> None:
    row, other = verify.Row("noise", "cpp", "cpu", "float32"), verify.Row("noise", "cpp", "cpu", "float32", part=(5, 6))
    row.join(other)
    assert (row.cases, row.ok, row.worst) == (0, True, None)
