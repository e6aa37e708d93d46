"""Measurements of a host: memory against its limit, CPU against its quota, and waiting times.

Figures are those of the cgroup that bounds this process, or the host's if no cgroup does.  The
usage of one is never compared with the limit of the other.  `rlm_tasks.worker.host` takes a sample
each second.  Linux' /proc and /sys are read, 0.3 ms a sample; on other systems psutil.  Begin with
`Sampler.sample`.
"""

from __future__ import annotations

import math
import os
import re
import time
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Literal, NamedTuple

import msgspec

from scheduler.settings import PressureSettings

LOAD_TAU_S = 5.0
"""Time constant of the smoothed run queue.  Single readings vary by 0.2 to 0.8 tasks per CPU from
second to second (measured).
"""
_MB = 2**20
_UNLIMITED_MB = 2**40
"""A limit of this size or more is no limit; cgroup version 1 then has about 2^63 bytes."""
_PAGE = os.sysconf("SC_PAGE_SIZE")
_TOTAL = re.compile(r"^(some|full) .*\btotal=(\d{1,19})$", re.MULTILINE | re.ASCII)

Source = Literal["cgroup2", "cgroup1", "host", "processes"]


class Sample(msgspec.Struct, frozen=True):
    """One measurement of a host.  Figures over time are 0 in the first sample."""

    memory_pct: float
    memory_mb: float
    """Working set: used memory without the file cache that the kernel can drop at once."""
    memory_limit_mb: float
    available_mb: float
    source: Source
    """Owner of the memory figures: a cgroup, the host, or this process and its children."""
    cpu_pct: float = 0.0
    """Used share of the CPU quota, or of the CPUs that this process may run on."""
    cpu_waiting_pct: float | None = None
    """Share of the time in which some task waited for a CPU; None if the kernel does not report
    it.
    """
    memory_stall_pct: float | None = None
    """Share of the time in which all tasks waited for memory; None if the kernel does not report
    it.
    """
    throttled_pct: float = 0.0
    """Share of the quota's periods that ended early."""
    load_per_cpu: float | None = None
    """Runnable tasks of the host for each of its CPUs; None if the kernel does not report them."""


class _Memory(NamedTuple):
    used_mb: float
    limit_mb: float
    source: Source

    @property
    def pct(self) -> float:
        return 100 * self.used_mb / self.limit_mb


class _Counters(NamedTuple):
    """Counters that only grow, each as a part and its whole; two readings make a share."""

    cpu: tuple[float, float]
    """Used and usable: seconds of the quota, or ticks of the CPUs."""
    throttling: tuple[float, float]
    """Number of periods that ended early, and of all periods."""
    cpu_of: str
    """Owner of the quota; two readings are compared only if it is the same."""
    waiting: tuple[float, float] | None
    """Microseconds in which some task waited for a CPU, and of all time."""
    stalled: tuple[float, float] | None
    """Microseconds in which all tasks waited for memory, and of all time."""
    now_s: float


def of_any_system() -> Sample:
    """Return a sample by psutil, for a host without /proc.

    It knows no limits of containers, and no waiting times but the load average.
    """
    import psutil

    memory = psutil.virtual_memory()
    return Sample(
        memory_pct=memory.percent,
        memory_mb=(memory.total - memory.available) / _MB,
        memory_limit_mb=memory.total / _MB,
        available_mb=memory.available / _MB,
        source="host",
        cpu_pct=psutil.cpu_percent(),
        load_per_cpu=psutil.getloadavg()[0] / (psutil.cpu_count() or 1),
    )


class Sampler:
    """Measures the host of this process; to be called once a second, from one thread.

    **Memory**: the smallest limit of this process's cgroup and the cgroups around it, if it is
    smaller than the host's memory; else the host's memory.

    `settings.max_memory_mb` is a second limit, for this process and all its descendants.  Their
    resident memory counts, without the pages that they share with a file or with each other on
    purpose.  Pages that a child has not written since its fork count in parent and child: the exact
    share would cost 3 ms per 300 MB.  This needs /proc/*/task/*/children, which the kernels of
    distributions have.  If both limits apply, the sample has the one that is closer to its bound.

    **Run queue**: procs_running of /proc/stat, smoothed.  The load average is steadier, but it
    remembers a load for minutes after its end, and it counts tasks that wait for a disk.
    """

    def __init__(
        self,
        settings: PressureSettings,
        *,
        root: Path = Path("/"),
        clock: Callable[[], float] = time.monotonic,
        cpus: Callable[[], Collection[int]] = lambda: os.sched_getaffinity(0),
        elsewhere: Callable[[], Sample | None] = of_any_system,
    ) -> None:
        """`elsewhere` measures a system without /proc."""
        self._elsewhere = elsewhere
        self._max_memory_mb, self._clock, self._cpus = settings.max_memory_mb, clock, cpus
        self._proc, self._cgroup = root / "proc", _Cgroup(root)
        self._before: _Counters | None = None
        self._load: float | None = None

    def sample(self) -> Sample | None:
        """Return a sample of now, and of the time since the last call; None if not even memory can
        be measured.
        """
        if (memory := self._memory()) is None:
            return self._elsewhere()
        stat = _text(self._proc / "stat")
        now = self._counters(stat)
        before, self._before = self._before or now, now
        cpu_before = before if before.cpu_of == now.cpu_of else now
        return Sample(
            memory_pct=memory.pct,
            memory_mb=memory.used_mb,
            memory_limit_mb=memory.limit_mb,
            available_mb=max(0.0, memory.limit_mb - memory.used_mb),
            source=memory.source,
            cpu_pct=_share(cpu_before.cpu, now.cpu),
            cpu_waiting_pct=_share(before.waiting or now.waiting, now.waiting)
            if now.waiting
            else None,
            memory_stall_pct=_share(before.stalled or now.stalled, now.stalled)
            if now.stalled
            else None,
            throttled_pct=_share(cpu_before.throttling, now.throttling),
            load_per_cpu=self._smoothed(_run_queue(stat), now.now_s - before.now_s),
        )

    # --- memory --------------------------------------------------------------------------------

    def _memory(self) -> _Memory | None:
        host = self._host_memory()
        outer = self._cgroup.memory(host.limit_mb if host else _UNLIMITED_MB) or host
        bounds = [each for each in (outer, self._own_memory()) if each]
        return max(bounds, key=lambda bound: bound.pct, default=None)

    def _host_memory(self) -> _Memory | None:
        numbers = _numbers(_text(self._proc / "meminfo"))
        total, available = numbers.get("MemTotal:", 0), numbers.get("MemAvailable:")
        return (
            _Memory(max(0, total - available) / 1024, total / 1024, "host")
            if total > 0 and available is not None
            else None
        )

    def _own_memory(self) -> _Memory | None:
        if not self._max_memory_mb:
            return None
        pages = 0
        for process in self._family("self"):
            words = _text(self._proc / process / "statm").split()
            _, resident, shared, *_ = [*(_int(each) or 0 for each in words), 0, 0, 0]
            pages += max(0, resident - shared)
        return _Memory(pages * _PAGE / _MB, self._max_memory_mb, "processes") if pages else None

    def _family(self, process: str) -> Iterator[str]:
        yield process
        for children in (self._proc / process / "task").glob("*/children"):
            for child in _text(children).split():
                yield from self._family(child)

    # --- time ----------------------------------------------------------------------------------

    def _counters(self, stat: str) -> _Counters:
        cpus, now_s = self._cpus(), self._clock()
        quota = self._cgroup.cpu(len(cpus))
        return _Counters(
            cpu=(quota.used_s, now_s * quota.cpus) if quota else _ticks(stat, cpus),
            throttling=quota.throttling if quota else (0, 0),
            cpu_of=f"{quota.cpus:g} of {quota.folder}" if quota else "host",
            waiting=self._pressure("cpu", "some", now_s),
            stalled=self._pressure("memory", "full", now_s),
            now_s=now_s,
        )

    def _pressure(self, resource: str, kind: str, now_s: float) -> tuple[float, float] | None:
        """Return microseconds of waiting and of time: of the own cgroup, or of the host if the
        kernel keeps none for cgroups.
        """
        for file in (
            self._cgroup.unified / f"{resource}.pressure",
            self._proc / "pressure" / resource,
        ):
            if (waited := dict(_TOTAL.findall(_text(file))).get(kind)) is not None:
                return int(waited), now_s * 1e6
        return None

    def _smoothed(self, load: float | None, elapsed_s: float) -> float | None:
        if load is not None and self._load is not None:
            load = self._load + (load - self._load) * -math.expm1(-max(0.0, elapsed_s) / LOAD_TAU_S)
        self._load = load
        return load


class _Quota(NamedTuple):
    folder: Path
    cpus: float
    used_s: float = 0.0
    throttling: tuple[float, float] = (0, 0)


class _Cgroup:
    """The cgroup of this process and the cgroups around it, of either version.

    A missing or unreadable value counts as not set.
    """

    def __init__(self, root: Path) -> None:
        mount = root / "sys/fs/cgroup"
        lines = [
            line.split(":", 2)
            for line in _text(root / "proc/self/cgroup").splitlines()
            if line.count(":") > 1
        ]
        paths = {
            controller: path
            for _, controllers, path in lines
            for controller in controllers.split(",")
        }
        mounts = {name: mount / name for name in ("memory", "cpu", "cpuacct")}
        if (both := mount / "cpu,cpuacct").is_dir():
            mounts |= {"cpu": both, "cpuacct": both}
        own = {
            name: _upwards(folder, paths[name])
            for name, folder in mounts.items()
            if name in paths and folder.is_dir()
        }
        second = _upwards(
            mount if (mount / "cgroup.controllers").exists() else mount / "unified",
            paths.get("", "/"),
        )
        self.unified = second[0]
        self._memory_version = 1 if "memory" in own else 2
        self._cpu_version = 1 if "cpu" in own else 2
        self._memory, self._cpu, self._mounts = (
            own.get("memory", second),
            own.get("cpu", second),
            mounts,
        )

    def memory(self, below_mb: float) -> _Memory | None:
        """Return the memory of the cgroup with the smallest limit below the host's; None without a
        limit.

        Among equal limits the outermost cgroup counts, because it holds most.
        """
        files = _MEMORY_FILES[self._memory_version]
        limits = (
            (limit / _MB, each)
            for each in reversed(self._memory)
            if (limit := _least(each, files.limits))
        )
        for limit_mb, folder in sorted(
            (each for each in limits if each[0] < below_mb), key=lambda each: each[0]
        ):
            if (used := _number(folder / files.usage)) is not None:
                droppable = _numbers(_text(folder / "memory.stat")).get(files.droppable, 0)
                return _Memory(max(0, used - droppable) / _MB, limit_mb, files.source)
        return None

    def cpu(self, allowed: int) -> _Quota | None:
        """Return the smallest quota in CPUs, `allowed` at most, and its used time; None without a
        quota.
        """
        quotas = [quota for each in self._cpu if (quota := self._quota(each))]
        for folder, cpus, *_ in sorted(quotas, key=lambda quota: quota.cpus):
            stat = _numbers(_text(folder / "cpu.stat"))
            if (used_s := self._used_s(folder, stat)) is not None:
                throttling = (stat.get("nr_throttled", 0), stat.get("nr_periods", 0))
                return _Quota(folder, min(cpus, allowed), used_s, throttling)
        return None

    def _quota(self, folder: Path) -> _Quota | None:
        if self._cpu_version == 2:
            words = _text(folder / "cpu.max").split()
            quota, period = (_int(each) for each in words) if len(words) == 2 else (None, None)
        else:
            quota, period = (
                _number(folder / "cpu.cfs_quota_us"),
                _number(folder / "cpu.cfs_period_us"),
            )
        return _Quota(folder, quota / period) if quota and period else None

    def _used_s(self, folder: Path, stat: dict[str, int]) -> float | None:
        if self._cpu_version == 2:
            return stat["usage_usec"] / 1e6 if "usage_usec" in stat else None
        used = _number(
            self._mounts["cpuacct"] / folder.relative_to(self._mounts["cpu"]) / "cpuacct.usage"
        )
        return None if used is None else used / 1e9


class _MemoryFiles(NamedTuple):
    limits: tuple[str, ...]
    usage: str
    droppable: str
    source: Source


_MEMORY_FILES = {
    1: _MemoryFiles(
        ("memory.limit_in_bytes",), "memory.usage_in_bytes", "total_inactive_file", "cgroup1"
    ),
    2: _MemoryFiles(("memory.max", "memory.high"), "memory.current", "inactive_file", "cgroup2"),
}


def _upwards(mount: Path, path: str) -> list[Path]:
    """Return a cgroup's folder and the folders around it, from the inside out.

    Inside a container the path may lie outside of the mount; then the mount is the own cgroup.
    """
    own = mount / path.strip("/")
    if ".." in own.parts or not own.is_dir():
        return [mount]
    return [own, *(each for each in own.parents if each.is_relative_to(mount))]


def _least(folder: Path, files: tuple[str, ...]) -> int | None:
    """Return the smallest number in some files of a folder; files without a number above 0 do not
    count.
    """
    return min((number for each in files if (number := _number(folder / each))), default=None)


# --- files ------------------------------------------------------------------------------------


def _text(file: Path) -> str:
    """Return the text of a file; '' if it is missing or unreadable."""
    try:
        with open(file, encoding="ascii", errors="replace") as opened:  # noqa: PTH123  # Path.open costs 5 us more
            return opened.read()
    except OSError:
        return ""


def _int(word: str) -> int | None:
    """Return a word as a count; None for "max", -1 and any other word that is no count."""
    word = word.strip()
    return int(word) if word.isascii() and word.isdecimal() and len(word) < 20 else None


def _number(file: Path) -> int | None:
    return _int(_text(file))


def _numbers(text: str) -> dict[str, int]:
    """Return the counts of lines such as ``inactive_file 4096`` and ``MemTotal: 16 kB``."""
    words = (line.split() for line in text.splitlines())
    return {
        each[0]: count for each in words if len(each) > 1 and (count := _int(each[1])) is not None
    }


def _ticks(stat: str, cpus: Collection[int]) -> tuple[float, float]:
    """Return the busy ticks and all ticks of these CPUs.

    If /proc/stat numbers the CPUs in another way (LXC), all CPUs count.
    """
    names = {f"cpu{each}" for each in cpus}
    lines = [line.split() for line in stat.splitlines() if line.startswith("cpu")]
    chosen = [each for each in lines if each[0] in names] or [
        each for each in lines if each[0] == "cpu"
    ]
    busy = total = 0
    for _, *fields in chosen:
        ticks = [_int(each) or 0 for each in fields[:8]]  # later fields are contained in user time
        total += sum(ticks)
        busy += sum(ticks) - sum(ticks[3:5])  # less idle ticks, and idle ticks with disk I/O
    return busy, total


def _run_queue(stat: str) -> float | None:
    """Return the runnable tasks without this one, for each CPU of the host; None if unknown."""
    cpus = len(re.findall(r"^cpu\d", stat, re.MULTILINE))
    running = _numbers(stat).get("procs_running")
    return max(0, running - 1) / cpus if cpus and running is not None else None


def _share(before: tuple[float, float], now: tuple[float, float]) -> float:
    part, whole = now[0] - before[0], now[1] - before[1]
    return min(100.0, max(0.0, 100 * part / whole)) if whole > 0 else 0.0


def held_mb(pid: int) -> float:
    """Return the resident memory of a process of this machine, in MB; 0 if it has just ended, or is
    unknown.
    """
    try:
        return int(Path(f"/proc/{pid}/statm").read_text(encoding="ascii").split()[1]) / (
            _MB / _PAGE
        )
    except (OSError, IndexError, ValueError):
        return 0.0
