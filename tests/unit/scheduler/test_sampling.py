"""Samples of a host from /proc and /sys/fs/cgroup: memory, CPU and waiting.

Broken files never lead to an error or to a wrong figure.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from scheduler.sampling import Sample, Sampler
from scheduler.settings import PressureSettings

MB = 2**20
PAGE = 4096
UNLIMITED_V1 = "9223372036854771712"


class Host:
    """A root folder with the files of a kernel, and a clock."""

    def __init__(self, root: Path) -> None:
        self.root, self.now, self.cpus = root, 1000.0, {0, 1}
        self.write("proc/meminfo", meminfo(total_mb=16_000, available_mb=12_000))
        self.stat()

    def write(self, path: str, text: str) -> None:
        file = self.root / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="latin-1")

    def stat(self, *busy_and_idle: tuple[int, int], running: int = 1) -> None:
        """Write the ticks of each CPU; a tenth of the idle ticks is spent waiting for a disk."""
        lines = [
            f"cpu{n} {busy} 0 0 {idle - idle // 10} {idle // 10} 0 0 0 {busy} 0"
            for n, (busy, idle) in enumerate(busy_and_idle or [(0, 0)] * 2)
        ]
        total = [
            sum(column)
            for column in zip(*(map(int, line.split()[1:]) for line in lines), strict=True)
        ]
        self.write(
            "proc/stat",
            "\n".join(
                [
                    f"cpu  {' '.join(map(str, total))}",
                    *lines,
                    "ctxt 99",
                    f"procs_running {running}",
                    "",
                ]
            ),
        )

    def pressure(self, resource: str, some_us: int, full_us: int = 0, *, folder: str = "") -> None:
        path = f"{folder}/{resource}.pressure" if folder else f"proc/pressure/{resource}"
        averages = "avg10=99.00 avg60=99.00 avg300=99.00"
        self.write(path, f"some {averages} total={some_us}\nfull {averages} total={full_us}\n")

    def sampler(self, **chosen: Any) -> Sampler:
        return Sampler(
            PressureSettings(**chosen),
            root=self.root,
            clock=lambda: self.now,
            cpus=lambda: self.cpus,
            elsewhere=lambda: None,
        )

    def sample(self, **chosen: Any) -> Sample:
        found = self.sampler(**chosen).sample()
        assert found is not None
        return found


def meminfo(total_mb: int, available_mb: int) -> str:
    return (
        f"MemTotal:       {total_mb * 1024} kB\nMemFree:          1024 kB\nMemAvailable:   "
        f"{available_mb * 1024} kB\nHugePages_Total:       0\n"
    )


def cgroup2(
    host: Host,
    path: str,
    *,
    used_mb: int = 0,
    file_mb: int = 0,
    most: str = "max",
    high: str = "max",
    cpu: str = "max 100000",
) -> str:
    """Make a cgroup of version 2 below its mount; return its folder."""
    folder = f"sys/fs/cgroup{path.rstrip('/')}"
    host.write("sys/fs/cgroup/cgroup.controllers", "cpuset cpu io memory pids\n")
    host.write(f"{folder}/memory.current", f"{used_mb * MB}\n")
    host.write(
        f"{folder}/memory.stat",
        f"anon 1\nfile {file_mb * MB + 5}\ninactive_file {file_mb * MB}\nactive_file 5\n",
    )
    host.write(f"{folder}/memory.max", f"{most}\n")
    host.write(f"{folder}/memory.high", f"{high}\n")
    host.write(f"{folder}/cpu.max", f"{cpu}\n")
    usage2(host, folder)
    return folder


def usage2(
    host: Host, folder: str, used_s: float = 0.0, throttled: int = 0, periods: int = 0
) -> None:
    host.write(
        f"{folder}/cpu.stat",
        (
            f"usage_usec {used_s * 1e6:.0f}\nuser_usec 1\nnr_periods {periods}\nnr_throttled "
            f"{throttled}\nthrottled_usec 9\n"
        ),
    )


def in_cgroup2(host: Host, path: str) -> None:
    host.write("proc/self/cgroup", f"0::{path}\n")


def memory1(
    host: Host, path: str, *, used_mb: int, file_mb: int = 0, limit: str = UNLIMITED_V1
) -> None:
    folder = f"sys/fs/cgroup/memory{path.rstrip('/')}"
    host.write(f"{folder}/memory.usage_in_bytes", f"{used_mb * MB}\n")
    host.write(f"{folder}/memory.limit_in_bytes", f"{limit}\n")
    host.write(
        f"{folder}/memory.stat",
        f"cache 7\ninactive_file 1\ntotal_cache 9\ntotal_inactive_file {file_mb * MB}\n",
    )


def cpu1(
    host: Host,
    path: str,
    *,
    used_s: float,
    quota: int = -1,
    mounts: tuple[str, str] = ("cpu,cpuacct",) * 2,
    throttled: int = 0,
    periods: int = 0,
) -> None:
    folder, accounts = (f"sys/fs/cgroup/{mount}{path.rstrip('/')}" for mount in mounts)
    host.write(f"{folder}/cpu.cfs_quota_us", f"{quota}\n")
    host.write(f"{folder}/cpu.cfs_period_us", "100000\n")
    host.write(
        f"{folder}/cpu.stat", f"nr_periods {periods}\nnr_throttled {throttled}\nthrottled_time 5\n"
    )
    host.write(f"{accounts}/cpuacct.usage", f"{used_s * 1e9:.0f}\n")


def in_cgroup1(host: Host, path: str, *, hybrid: bool = False) -> None:
    lines = [
        "9:name=systemd:/",
        f"4:memory:{path}",
        f"2:cpu,cpuacct:{path}",
        *(["0::/"] if hybrid else []),
    ]
    host.write("proc/self/cgroup", "\n".join(lines) + "\n")


@pytest.fixture
def host(tmp_path: Path) -> Host:
    return Host(tmp_path)


# --- memory -----------------------------------------------------------------------------------


def test_without_a_limit_memory_is_that_of_the_host(host: Host) -> None:
    sample = host.sample()

    assert (sample.memory_pct, sample.memory_mb, sample.memory_limit_mb, sample.available_mb) == (
        25,
        4000,
        16_000,
        12_000,
    )
    assert sample.source == "host"


def test_a_cgroup_of_version_2_compares_its_working_set_with_its_limit(host: Host) -> None:
    in_cgroup2(host, "/system.slice/worker.service")
    cgroup2(host, "/system.slice/worker.service", used_mb=1500, file_mb=500, most=str(2000 * MB))

    sample = host.sample()

    assert (sample.memory_pct, sample.memory_mb, sample.memory_limit_mb, sample.available_mb) == (
        50,
        1000,
        2000,
        1000,
    )
    assert sample.source == "cgroup2"


def test_memory_high_is_a_limit(host: Host) -> None:
    in_cgroup2(host, "/worker")
    cgroup2(host, "/worker", used_mb=900, most=str(2000 * MB), high=str(1000 * MB))

    assert host.sample().memory_pct == 90


def test_a_smaller_limit_of_a_parent_cgroup_counts_with_its_usage(host: Host) -> None:
    in_cgroup2(host, "/pod/worker")
    cgroup2(host, "/pod", used_mb=900, file_mb=100, most=str(1000 * MB))
    cgroup2(host, "/pod/worker", used_mb=300, most=str(2000 * MB))

    sample = host.sample()

    assert (sample.memory_pct, sample.memory_mb, sample.memory_limit_mb) == (80, 800, 1000)


def test_of_equal_limits_that_of_the_parent_cgroup_counts(host: Host) -> None:
    in_cgroup2(host, "/pod/worker")
    cgroup2(host, "/pod", used_mb=900, most=str(1000 * MB))
    cgroup2(host, "/pod/worker", used_mb=300, most=str(1000 * MB))

    assert host.sample().memory_mb == 900


def test_a_limit_above_the_memory_of_the_host_is_ignored(host: Host) -> None:
    in_cgroup2(host, "/worker")
    cgroup2(host, "/worker", used_mb=300, most=str(64_000 * MB))

    assert host.sample().source == "host"


@pytest.mark.parametrize("path", ["/docker/4f1c", "/../../kubepods/pod7", "/.."])
def test_a_cgroup_path_outside_of_the_mount_stands_for_the_mount(host: Host, path: str) -> None:
    in_cgroup2(host, path)
    host.pressure("cpu", 0, folder=cgroup2(host, "/", used_mb=512, most=str(1024 * MB)))

    sample = host.sample()

    assert (sample.memory_pct, sample.source, sample.cpu_waiting_pct) == (50, "cgroup2", 0)


def test_a_cgroup_of_version_1_compares_its_working_set_with_its_limit(host: Host) -> None:
    in_cgroup1(host, "/docker/4f1c")
    memory1(host, "/", used_mb=9000)
    memory1(host, "/docker/4f1c", used_mb=1500, file_mb=300, limit=str(1600 * MB))

    sample = host.sample()

    assert (sample.memory_pct, sample.memory_mb, sample.source) == (75, 1200, "cgroup1")


def test_a_limit_near_2_to_the_63_is_ignored(host: Host) -> None:
    in_cgroup1(host, "/docker/4f1c")
    memory1(host, "/docker/4f1c", used_mb=1500)

    assert host.sample().source == "host"
    (host.root / "proc/meminfo").unlink()
    assert host.sampler().sample() is None, "even when the memory of the host is not known"


def test_a_hybrid_host_has_limits_in_version_1_and_waiting_in_version_2(host: Host) -> None:
    in_cgroup1(host, "/worker", hybrid=True)
    memory1(host, "/worker", used_mb=750, limit=str(1000 * MB))
    host.pressure("cpu", 0, folder="sys/fs/cgroup/unified")
    sampler = host.sampler()
    sampler.sample()
    host.now += 1
    host.pressure("cpu", 300_000, folder="sys/fs/cgroup/unified")

    sample = sampler.sample()

    assert sample is not None
    assert (sample.memory_pct, sample.source) == (75, "cgroup1")
    assert sample.cpu_waiting_pct == pytest.approx(30)


# --- the limit max_memory_mb ------------------------------------------------------------------


def process(
    host: Host, name: str, resident_mb: int, shared_mb: int, threads: dict[str, str]
) -> None:
    """Write the files of a process, with the children of each of its threads."""
    pages = MB // PAGE
    host.write(f"proc/{name}/statm", f"999999 {resident_mb * pages} {shared_mb * pages} 1 0 1 0\n")
    for thread, children in threads.items():
        host.write(f"proc/{name}/task/{thread}/children", children)


@pytest.fixture
def family(host: Host, monkeypatch: pytest.MonkeyPatch) -> Host:
    """A main process of 100 MB, pool processes of 200 and 50 MB, and a child process of 150 MB.

    One of the pool processes belongs to another thread.
    """
    monkeypatch.setattr("scheduler.sampling._PAGE", PAGE)
    process(host, "self", 130, 30, {"10": "21 ", "11": "22 "})
    process(host, "21", 220, 20, {"21": "31 "})
    process(host, "22", 60, 10, {"22": ""})
    process(host, "31", 150, 0, {"31": "77 "})  # 77 has just ended
    return host


def test_max_memory_mb_bounds_this_process_and_its_descendants(family: Host) -> None:
    sample = family.sample(max_memory_mb=1000)

    assert (sample.memory_pct, sample.memory_mb, sample.memory_limit_mb, sample.source) == (
        50,
        500,
        1000,
        "processes",
    )


def test_max_memory_mb_does_not_hide_a_host_that_is_closer_to_its_limit(family: Host) -> None:
    family.write("proc/meminfo", meminfo(total_mb=16_000, available_mb=1600))

    assert (
        family.sample(max_memory_mb=1000).memory_pct,
        family.sample(max_memory_mb=1000).source,
    ) == (90, "host")


def test_max_memory_mb_does_not_hide_a_cgroup_that_is_closer_to_its_limit(family: Host) -> None:
    in_cgroup2(family, "/worker")
    cgroup2(family, "/worker", used_mb=700, most=str(1000 * MB))

    assert family.sample(max_memory_mb=1000).source == "cgroup2"
    assert family.sample(max_memory_mb=600).source == "processes"


# --- CPU --------------------------------------------------------------------------------------


def second(host: Host, sampler: Sampler) -> Sample:
    """Let a second pass before the next sample."""
    host.now += 1
    found = sampler.sample()
    assert found is not None
    return found


def test_the_first_sample_has_memory_and_no_cpu(host: Host) -> None:
    host.stat((500, 100), (500, 100))
    host.pressure("cpu", 999_999)

    sample = host.sample()

    assert (sample.memory_pct, sample.cpu_pct, sample.cpu_waiting_pct, sample.throttled_pct) == (
        25,
        0,
        0,
        0,
    )


def test_without_a_quota_cpu_is_the_use_of_the_cpus_we_may_run_on(host: Host) -> None:
    host.cpus = {1, 2}
    host.stat(*[(0, 0)] * 4)
    sampler = host.sampler()
    sampler.sample()
    host.stat((100, 0), (50, 50), (30, 70), (100, 0))

    assert second(host, sampler).cpu_pct == pytest.approx(40), (
        "guest time is part of user time, and waiting for a disk is idle"
    )


def test_cpus_with_other_numbers_are_taken_together(host: Host) -> None:
    host.cpus = {6, 7}
    host.stat((0, 0), (0, 0))
    sampler = host.sampler()
    sampler.sample()
    host.stat((100, 0), (50, 50))

    assert second(host, sampler).cpu_pct == pytest.approx(75)


@pytest.mark.parametrize(
    ("quota", "cpus", "expected"),
    [("50000 100000", 2, 60), ("150000 100000", 4, 20), ("800000 100000", 2, 15)],
    ids=["half a CPU", "one and a half", "more than there are CPUs"],
)
def test_with_a_quota_of_version_2_cpu_is_the_used_share_of_it(
    host: Host, quota: str, cpus: int, expected: float
) -> None:
    host.cpus = set(range(cpus))
    in_cgroup2(host, "/worker")
    folder = cgroup2(host, "/worker", cpu=quota)
    sampler = host.sampler()
    sampler.sample()
    usage2(host, folder, used_s=0.3, throttled=4, periods=10)

    sample = second(host, sampler)

    assert sample.cpu_pct == pytest.approx(expected)
    assert sample.throttled_pct == 40


def test_a_smaller_quota_of_a_parent_cgroup_counts_with_its_usage(host: Host) -> None:
    in_cgroup2(host, "/pod/worker")
    pod, own = (
        cgroup2(host, "/pod", cpu="100000 100000"),
        cgroup2(host, "/pod/worker", cpu="200000 100000"),
    )
    sampler = host.sampler()
    sampler.sample()
    usage2(host, pod, used_s=0.9)
    usage2(host, own, used_s=0.1)

    assert second(host, sampler).cpu_pct == pytest.approx(90)


@pytest.mark.parametrize("mounts", [("cpu,cpuacct", "cpu,cpuacct"), ("cpu", "cpuacct")])
def test_with_a_quota_of_version_1_cpu_is_the_used_share_of_it(
    host: Host, mounts: tuple[str, str]
) -> None:
    in_cgroup1(host, "/worker")
    cpu1(host, "/worker", used_s=5, quota=100_000, mounts=mounts)
    sampler = host.sampler()
    sampler.sample()
    cpu1(host, "/worker", used_s=5.7, quota=100_000, mounts=mounts, throttled=3, periods=10)

    sample = second(host, sampler)

    assert (sample.cpu_pct, sample.throttled_pct) == (pytest.approx(70), 30)


def test_a_changed_quota_gives_no_wrong_sample(host: Host) -> None:
    in_cgroup2(host, "/worker")
    folder = cgroup2(host, "/worker", cpu="100000 100000")
    sampler = host.sampler()
    sampler.sample()
    host.write(f"{folder}/cpu.max", "200000 100000\n")
    usage2(host, folder, used_s=0.3, throttled=5, periods=10)

    sample = second(host, sampler)

    assert (sample.cpu_pct, sample.throttled_pct) == (0, 0)
    usage2(host, folder, used_s=1.3, throttled=5, periods=20)
    assert second(host, sampler).cpu_pct == pytest.approx(50), "later samples are compared again"


def test_the_run_queue_per_cpu_is_smoothed_and_without_this_process(
    host: Host,
) -> None:
    host.cpus = {0}
    host.stat(*[(0, 0)] * 4, running=1)
    sampler = host.sampler()
    sampler.sample()
    host.stat(*[(0, 0)] * 4, running=9)

    found = [second(host, sampler).load_per_cpu for _ in range(5)]

    assert found[0] == pytest.approx(2 * (1 - math.exp(-1 / 5)))
    assert found[4] == pytest.approx(2 * (1 - math.exp(-1)))


# --- waiting ----------------------------------------------------------------------------------


def test_waiting_is_the_growth_of_the_totals_of_the_own_cgroup_over_time(
    host: Host,
) -> None:
    in_cgroup2(host, "/worker")
    folder = cgroup2(host, "/worker")
    for resource in ("cpu", "memory"):
        host.pressure(resource, 1_000_000, 1_000_000, folder=folder)
        host.pressure(resource, 0)
    sampler = host.sampler()
    sampler.sample()
    host.now += 1
    host.pressure("cpu", 2_000_000, 1_400_000, folder=folder)
    host.pressure("memory", 2_000_000, 1_500_000, folder=folder)

    sample = second(host, sampler)

    assert sample.cpu_waiting_pct == pytest.approx(50), "the waiting of some tasks"
    assert sample.memory_stall_pct == pytest.approx(25), "the waiting of all tasks"


def test_waiting_is_that_of_the_host_where_cgroups_have_none(host: Host) -> None:
    in_cgroup1(host, "/worker")
    host.pressure("cpu", 0)
    sampler = host.sampler()
    sampler.sample()
    host.pressure("cpu", 700_000)

    assert second(host, sampler).cpu_waiting_pct == pytest.approx(70)


def test_a_kernel_without_pressure_figures_gives_none(host: Host) -> None:
    sampler = host.sampler()
    sampler.sample()

    sample = second(host, sampler)

    assert (sample.cpu_waiting_pct, sample.memory_stall_pct) == (None, None)


# --- broken files, and JSON -------------------------------------------------------------------

FILES = (
    "proc/meminfo",
    "proc/stat",
    "proc/self/cgroup",
    "proc/pressure/cpu",
    "proc/pressure/memory",
    "proc/self/statm",
    *(
        f"sys/fs/cgroup/worker/{name}"
        for name in (
            "memory.max",
            "memory.high",
            "memory.current",
            "memory.stat",
            "cpu.max",
            "cpu.stat",
            "cpu.pressure",
        )
    ),
)
BROKEN = (
    "",
    "\n",
    "max",
    "max max",
    "-1",
    "0",
    "0 0",
    "nan",
    "1e9",
    "²",
    "é",
    "9" * 5000,
    "some",
    "some total=",
    "some total=" + "9" * 5000,
    "1 " + "9" * 5000 + " 1",
    "MemTotal: 1 kB\nMemAvailable: 9 kB",
    "cpu0",
    "cpu 1",
    "a:b",
    "MemTotal:",
)


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.dictionaries(
        st.sampled_from(FILES),
        st.sampled_from(BROKEN)
        | st.text(max_size=40).map(
            lambda text: text.encode("latin-1", "replace").decode("latin-1")
        ),
    )
)
def test_broken_files_never_raise_and_give_figures_in_range(
    host: Host, broken: dict[str, str]
) -> None:
    in_cgroup2(host, "/worker")
    cgroup2(host, "/worker", used_mb=100, most=str(200 * MB), cpu="100000 100000")
    host.write("proc/meminfo", meminfo(16_000, 12_000))
    host.stat()
    for path, text in broken.items():
        host.write(path, text)
    sampler = host.sampler(max_memory_mb=100)
    sampler.sample()
    host.now += 1

    sample = sampler.sample()

    if sample is not None:
        assert all(
            math.isfinite(each)
            for each in msgspec.structs.astuple(sample)
            if isinstance(each, int | float)
        )
        assert 0 <= sample.cpu_pct <= 100
        assert sample.memory_limit_mb > 0
        assert sample.memory_pct >= 0
    (host.root / "proc/self/statm").unlink(missing_ok=True)


@pytest.mark.parametrize("gone", ["memory.current", "memory.max"])
def test_a_limit_without_a_usage_or_a_usage_without_a_limit_is_ignored(
    host: Host, gone: str
) -> None:
    in_cgroup2(host, "/worker")
    folder = cgroup2(host, "/worker", used_mb=100, most=str(200 * MB))
    (host.root / folder / gone).unlink()

    assert host.sample().source == "host"


def test_without_proc_and_psutil_there_is_no_sample(tmp_path: Path) -> None:
    for most in (0, 100):
        sampler = Sampler(
            PressureSettings(max_memory_mb=most),
            root=tmp_path,
            cpus=lambda: {0},
            elsewhere=lambda: None,
        )
        assert sampler.sample() is None


def test_without_proc_psutil_gives_the_sample(tmp_path: Path) -> None:
    sample = Sampler(PressureSettings(), root=tmp_path, cpus=lambda: {0}).sample()

    assert sample is not None
    assert 0 < sample.memory_pct < 100
    assert sample.memory_mb + sample.available_mb == pytest.approx(sample.memory_limit_mb)
    assert (sample.cpu_waiting_pct, sample.throttled_pct, sample.source) == (None, 0, "host")


def test_a_clock_that_stands_still_causes_no_division_by_zero(host: Host) -> None:
    host.pressure("cpu", 0)
    sampler = host.sampler()
    sampler.sample()
    host.pressure("cpu", 5)

    again = sampler.sample()

    assert again is not None
    assert again.cpu_waiting_pct == 0


def test_a_sample_survives_json(host: Host) -> None:
    sample = host.sample()

    assert msgspec.json.decode(msgspec.json.encode(sample), type=Sample) == sample


def test_this_machine_can_be_sampled() -> None:
    sampler = Sampler(PressureSettings(max_memory_mb=100_000))
    sampler.sample()

    sample = sampler.sample()

    assert sample is not None
    assert 0 < sample.memory_pct < 100
