"""The operation that measures source code."""

from __future__ import annotations

from typing import Any

from rlm_tasks.operations.code_metrics import measure_file, merge_reports


def test_code_metrics_do_not_depend_on_the_split(tmp_path: Any) -> None:
    source = (
        "def f(x):\n    if x:\n        return 1\n    elif x > 2:\n        return 2\n    return [i "
        "for i in x]\n\nclass C:\n    pass\n"
    )
    paths = []
    for name in ("a", "b", "c"):
        (tmp_path / f"{name}.py").write_text(source)
        paths.append(str(tmp_path / f"{name}.py"))
    reports = [measure_file(path) for path in paths]

    whole = merge_reports(reports)

    assert whole == merge_reports([merge_reports(reports[:1]), merge_reports(reports[1:])])
    assert (
        whole["files"],
        whole["lines"],
        whole["functions"],
        whole["classes"],
        whole["branches"],
    ) == (3, 27, 3, 3, 9)
    assert whole["deepest"] == [2, paths[2]]
    assert whole["complex"][0] == [4, paths[2], 1, "f"]
