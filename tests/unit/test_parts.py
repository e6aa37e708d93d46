"""The small parts that others stand on: packing, the shared page, keys, settings, errors,
results.
"""

from __future__ import annotations

import math
import os
from typing import Any

import fakeredis
import pytest
from hypothesis import given
from hypothesis import strategies as st

from resilience.keys import Keys
from resilience.store import Call, Script, Store, masked
from rlm_tasks import InvalidRequest, operation
from rlm_tasks.engine.shared_page import Held, SharedPage
from rlm_tasks.jobs import codec
from rlm_tasks.jobs.item_failures import failure_of
from rlm_tasks.operations.builtin import aggregate, sum_items
from rlm_tasks.operations.code_metrics import measure_file, merge_reports
from rlm_tasks.operations.context import Context
from rlm_tasks.operations.registry import get
from rlm_tasks.results import SuccessfulItems
from rlm_tasks.settings.environment import settings
from rlm_tasks.settings.model import Settings
from scheduler.slots import SlotBoard

PLAIN = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.text(st.characters(codec="utf-8"))
    | st.binary(),
    lambda inner: (
        st.lists(inner)
        | st.dictionaries(st.text(st.characters(codec="utf-8")) | st.integers(0, 9), inner)
    ),
    max_leaves=20,
)


@given(PLAIN)
def test_plain_data_comes_back_as_it_was(value: Any) -> None:
    assert codec.unpack(codec.pack(value)) == value


def test_what_has_no_plain_shape_is_a_type_error() -> None:
    for value in (1j, object(), {"a": {1j}}, "\ud800"):
        with pytest.raises(TypeError):
            codec.pack(value)


def test_long_data_is_compressed() -> None:
    assert len(codec.pack(["the same"] * 1000)) < 200


# --- the shared page --------------------------------------------------------------------------


def test_the_page_tells_what_each_process_holds() -> None:
    page = SharedPage()
    first, second = page.slot(0), page.slot(7)
    first.hold(11, "job-a", "node-a", "00112233aabbccdd", 1.5)
    second.hold(12, "job-b", "node-b", "ff" * 8, 2.5)

    second.start_item(42)
    second.limit(30.0)
    first.start_item(41)
    first.boundary(9.5)

    held = {each.pid: each for each in page.held()}
    assert held[11] == Held(11, "job-a", "node-a", "00112233aabbccdd", -1, 9.5, 0.0)
    assert held[12].item == 42
    first.let_go()
    assert [each.pid for each in page.held()] == [12]


def test_a_forked_process_writes_to_the_same_page() -> None:
    page = SharedPage()
    child = os.fork()
    if child == 0:
        page.slot(1).hold(os.getpid(), "job", "node", "00" * 8, 0.0)
        os._exit(0)
    os.waitpid(child, 0)

    assert [each.pid for each in page.held()] == [child]
    page.draining = page.hungry = True
    assert (page.draining, page.hungry) == (True, True)


# --- Redis ------------------------------------------------------------------------------------


def test_the_password_is_masked_in_every_form_of_url() -> None:
    assert masked("redis://user:secret@host:1/0") == "redis://user:***@host:1/0"
    assert masked("rediss://:secret@host") == "rediss://:***@host"
    assert masked("redis://host:6379/0") == "redis://host:6379/0"


def test_a_flushed_script_is_sent_again_and_errors_are_raised() -> None:
    store = Store("redis://fake", client=fakeredis.FakeRedis())
    double = Script("double", "return tonumber(ARGV[1]) * 2", "0" * 40)
    broken = Script("broken", "return redis.error_reply('TILING no')", "1" * 40)

    assert store.call(Call(double, (), (4,)), Call(double, (), (5,))) == [8, 10]
    with pytest.raises(Exception, match="TILING no"):
        store.call(Call(double, (), (4,)), Call(broken, (), ()))


def test_keys_of_a_job_share_its_hash_tag_and_its_namespace() -> None:
    keys = Keys("acme").of("j1")

    assert all(key.startswith("acme:{j1}:") for key in keys)
    assert len(set(keys)) == len(keys)


def test_free_slots_are_taken_once() -> None:
    store, keys = Store("redis://fake", client=fakeredis.FakeRedis()), Keys("unit")
    board = SlotBoard(store, keys)
    store.call(board.publish("a", 4, 2, ["high", "normal"]), board.publish("b", 4, 3, ["normal"]))

    assert store.call(board.take("normal", 4)) == [[4, 8]]
    assert store.call(board.take("normal", 4)) == [[1, 8]]
    assert store.call(board.take("high", 4)) == [[0, 4]]
    assert store.call(board.take("low", 4)) == [[0, 0]]
    store.call(board.publish("a", 4, 1, ["high", "normal"]))
    board.withdraw("b")
    assert store.call(board.take("normal", 4)) == [[1, 4]]


# --- settings ---------------------------------------------------------------------------------


def test_settings_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RLM_REDIS_URL", "redis://somewhere:1/2")
    monkeypatch.setenv("RLM_LEDGER__LEASE_S", "3")
    monkeypatch.setenv("RLM_OPERATIONS", "a.b, c")

    found = Settings()

    assert (found.redis_url, found.broker_url, found.result_backend) == (
        "redis://somewhere:1/2",
    ) * 3
    assert (found.ledger.lease_s, found.ledger.sweep_s) == (3.0, 5.0)
    assert found.operations == ("a.b", "c")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("RLM_NAMESPACE", "no spaces"),
        ("RLM_LEDGER__LEASE_S", "0"),
        ("RLM_MAX_RESULT_BYTES", "many"),
    ],
)
def test_a_setting_out_of_range_is_named(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    monkeypatch.setenv(name, value)
    settings.cache_clear()

    with pytest.raises(InvalidRequest, match=f"{name}='{value}'"):
        settings()


# --- results and failures ---------------------------------------------------------------------


@given(st.sets(st.integers(0, 60)), st.integers(0, 60), st.integers(0, 60))
def test_successful_items_behave_as_the_list_they_stand_for(
    failed: set[int], middle: int, hi: int
) -> None:
    ranges = [(0, middle), (middle, max(middle, hi))]
    wanted = [index for index in range(max(middle, hi)) if index not in failed]

    found = SuccessfulItems(ranges, sorted(failed))

    assert list(found) == wanted
    assert len(found) == len(wanted)
    assert found[1:3] == wanted[1:3]
    assert not wanted or found[-1] == wanted[-1]
    assert all((index in found) == (index in wanted) for index in range(62))


def test_a_failure_tells_the_users_frames_only() -> None:
    try:
        get("sum").apply(["one"], Context("j", {}))
    except TypeError as error:
        failure = failure_of(4, error)

    assert (failure["index"], failure["type"], failure["message"]) == (
        4,
        "TypeError",
        "not a number: 'one'",
    )
    assert "operations.py" not in failure["traceback"]
    assert "sum_items" in failure["traceback"]


# --- operations -------------------------------------------------------------------------------


def test_a_bare_operation_is_named_after_its_function_and_can_be_called() -> None:
    @operation
    def unit_bare(item: int) -> int:
        return item + 1

    assert get("unit_bare") is unit_bare
    assert unit_bare(2) == 3
    assert unit_bare.apply(2, Context("j", {})) == 3


def test_an_operation_takes_the_context_when_it_has_a_second_parameter() -> None:
    @operation("unit_context")
    def with_context(item: int, ctx: Context, factor: int = 3) -> int:
        return item * factor + ctx.index

    @operation("unit_default")
    def with_default(item: int, factor: int = 2) -> int:
        return item * factor

    assert with_context.apply(2, Context("j", {}, index=1)) == 7
    assert with_default.apply(2, Context("j", {})) == 4


@pytest.mark.parametrize("about", [{"concurrency": 0}, {"concurrency": 5}])
def test_options_that_make_no_sense_are_refused(about: dict[str, int]) -> None:
    with pytest.raises(InvalidRequest, match="concurrency"):
        operation("unit_wrong", **about)(lambda item: item)


@given(st.lists(st.integers() | st.floats(-1e12, 1e12), min_size=1), st.data())
def test_sum_and_aggregate_are_exact_under_any_split(
    numbers: list[float], data: st.DataObject
) -> None:
    cut = data.draw(st.integers(0, len(numbers)))
    parts = [part for part in (numbers[:cut], numbers[cut:]) if part]

    for each in (sum_items, aggregate):
        assert each.merge is not None
        whole, split = each(numbers), each.merge([each(part) for part in parts])
        assert each.shaped(each.merge([whole])) == each.shaped(split)
    assert math.isclose(
        sum_items.shaped(sum_items(numbers)), math.fsum(numbers), rel_tol=1e-12, abs_tol=1e-300
    )


def test_sums_of_what_is_not_finite_follow_arithmetic() -> None:
    assert sum_items.shaped(sum_items([1.0, math.inf])) == math.inf
    assert math.isnan(sum_items.shaped(sum_items([math.inf, -math.inf])))
    assert sum_items.shaped(sum_items([0.1] * 10)) == 1.0
    assert sum_items.shaped(sum_items([2**80, 1])) == 2**80 + 1


def test_code_metrics_do_not_depend_on_the_split(tmp_path: Any) -> None:
    source = "def f(x):\n    if x:\n        return 1\n    elif x > 2:\n        return 2\n    return [i for i in x]\n\nclass C:\n    pass\n"
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
