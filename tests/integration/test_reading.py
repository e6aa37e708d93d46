"""Items in a real worker: new at each attempt, files that change, and files outside of the root."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from rlm_tasks import Client, Files, ItemsUnreadable, JobRequest, Lines, Options
from rlm_tasks.client import submission
from rlm_tasks.diagnosis.doctor import examine
from rlm_tasks.errors import FileOutsideRoot, InvalidRequest
from rlm_tasks.jobs.stored_items import STAGED_S
from rlm_tasks.testing import embedded
from tests.integration.conftest import client_of, environment_of


def rows(marker: Path, **special: int) -> list[dict[str, Any]]:
    """Return nine rows; `once=3` gives the fourth one a marker file under `once`."""
    marks: dict[int, dict[str, Any]] = {
        index: {mark: True if mark == "bad" else str(marker)} for mark, index in special.items()
    }
    return [{"v": i, **marks.get(i, {})} for i in range(9)]


@pytest.mark.parametrize(
    ("operation", "special", "failed"),
    [
        ("take_out", {"bad": 3}, [3]),
        ("take_out_batch", {"bad": 3}, [3]),
        ("take_out_retried", {"once": 2}, []),
        ("take_out_async", {"once": 2}, []),
    ],
)
def test_an_operation_may_change_its_item_in_place(
    client: Client, tmp_path: Path, operation: str, special: dict[str, int], failed: list[int]
) -> None:
    items = rows(tmp_path / "marker", **special)

    result = client.execute(operation=operation, items=items, continue_on_error=True, timeout=30)

    assert [failure.index for failure in result.failed] == failed
    assert result.output == [i for i in range(9) if i not in failed]


def test_one_bad_byte_costs_one_line(client: Client, tmp_path: Path) -> None:
    lines = [b"%d" % i for i in range(20_000)]
    lines[778] = b"caf\xe9"
    (path := tmp_path / "lines.txt").write_bytes(b"\n".join(lines))

    result = client.execute(
        operation="collect", items=Lines(path), continue_on_error=True, timeout=60
    )

    assert [(each.index, each.type) for each in result.failed] == [(778, "UnicodeDecodeError")]
    assert result.output == [str(i) for i in range(20_000) if i != 778]


def test_a_file_that_changed_fails_at_once_and_is_read_again_when_mended(
    client: Client, tmp_path: Path
) -> None:
    (path := tmp_path / "orders.csv").write_text("1\n" * 60_000)
    options = Options(continue_on_error=True)
    request = JobRequest(operation="collect", items=Lines(path), options=options)
    stored = client._submission.store_items(client._submission.check(request))
    path.write_text("2\n" * 60_000 + "more\n")

    [id] = client._submission.start([stored])

    job = client.job(id)
    result = job.result(timeout=30, propagate=False)

    assert (result.done, result.failed_count, result.skipped) == (0, 60_000, 0)
    kept = client.ledger.store.client.zcard(client.ledger.keys.of(job.id).failed)
    assert kept <= result.metrics.nodes, "one range for a node"
    assert list(result.successful) == []
    assert len(result.failed) == 1000
    assert result.failed[0].type == "ItemsUnreadable"
    assert f"{path} has changed since the job was submitted" in result.failed[0].message
    with pytest.raises(ItemsUnreadable, match=r"retry_failed\(reread=True\)"):
        job.retry_failed()
    again = job.retry_failed(reread=True)
    assert again.result(timeout=60).output == ["2"] * 60_000


def test_a_file_that_is_gone_fails_its_items_in_an_async_operation(
    client: Client, tmp_path: Path
) -> None:
    (path := tmp_path / "numbers.txt").write_text("1\n" * 5000)
    request = JobRequest(
        operation="take_out_async", items=Lines(path), options=Options(continue_on_error=True)
    )
    stored = client._submission.store_items(client._submission.check(request))
    path.unlink()

    [id] = client._submission.start([stored])

    result = client.job(id).result(timeout=30, propagate=False)
    assert (result.done, result.failed_count, result.skipped) == (0, 5000, 0)
    assert f"{path} cannot be read: No such file or directory" in result.failed[0].message


# --- RLM_FILES_ROOT ----------------------------------------------------------------------------


def test_client_and_worker_read_below_the_root_only(
    server: embedded.Server, logs: Path, tmp_path: Path
) -> None:
    (root := tmp_path / "data").mkdir()
    (inside := root / "good.py").write_text("x = 1\n")
    (outside := tmp_path / "passwd").write_text("root:x:0:0:secret\n")
    (link := root / "link.py").symlink_to(outside)
    (wrong := root / "wrong.py").write_text("root:x:0:0:secret\n")
    open_to_all = environment_of(server.url, "rooted")
    environment = {**open_to_all, "RLM_FILES_ROOT": str(root)}

    with (
        client_of(environment) as rooted,
        client_of(open_to_all) as attacker,
        embedded.worker(environment, log=logs / "rooted.log", slots=1),
    ):
        for items in (Lines(outside), Lines(link), Files(f"{root}/*.py")):
            with pytest.raises(FileOutsideRoot, match="RLM_FILES_ROOT"):
                rooted.submit(operation="collect", items=items)
        forged = attacker.submit(operation="collect", items=Lines(outside))
        lines = forged.result(timeout=30, propagate=False)
        files = [str(each) for each in (inside, outside, link, wrong, os.devnull)]
        measured = rooted.execute(
            operation="code_metrics", items=files, continue_on_error=True, timeout=30
        )
        [told] = [each.found for each in examine(rooted, rooted.app) if each.check == "files"]

    assert [each.type for each in lines.failed] == ["FileOutsideRoot"]
    assert (lines.done, measured.output["files"]) == (0, 1)
    assert [each.index for each in measured.failed] == [1, 2, 3, 4]
    assert told == f"jobs read files below {root} only"
    shown = [each.message + each.traceback for each in (*lines.failed, *measured.failed)]
    assert not [text for text in shown if "root:x" in text]
    assert all(f"RLM_FILES_ROOT={root}" in text for text in (shown[0], shown[1], shown[2]))


def test_a_pattern_without_files_is_refused_before_anything_is_stored(client: Client) -> None:
    with pytest.raises(InvalidRequest, match="matches no file"):
        client.submit(operation="collect", items=Files("nope/*.csv"))


def test_an_item_that_redis_does_not_take_is_refused_by_size(server: embedded.Server) -> None:
    with client_of(environment_of(server.url, "bulky")) as client:
        redis = client.ledger.store.client
        kept = redis.config_get("proto-max-bulk-len")
        redis.config_set("proto-max-bulk-len", 2 << 20)
        try:
            with pytest.raises(InvalidRequest, match=r"items\[1\].*proto-max-bulk-len 2097152"):
                client.submit(operation="collect", items=["small", os.urandom(3 << 20)])
        finally:
            redis.config_set("proto-max-bulk-len", str(kept["proto-max-bulk-len"]))

        assert list(redis.scan_iter("bulky:*staged*")) == []


def test_items_that_expired_while_others_were_stored_are_refused(
    client_without_worker: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    client, redis = client_without_worker, client_without_worker.ledger.store.client
    hours = itertools.count(0, STAGED_S)
    monkeypatch.setattr(submission, "time", SimpleNamespace(monotonic=lambda: next(hours)))

    def slow() -> Iterator[str]:
        redis.delete(*redis.scan_iter(f"{client.settings.namespace}:*staged*"))
        yield "last"

    requests = [JobRequest(operation="collect", items=each) for each in (["first"], slow())]
    with pytest.raises(InvalidRequest, match="gave no item for more than 3600 s"):
        client.batch_submit(requests)

    assert client.jobs() == []
