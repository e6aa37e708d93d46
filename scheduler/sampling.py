"""How hard a host is pressed, as numbers: memory against its limit, CPU against its quota, and how
long work waited.

Decides whose figures count: those of the cgroup that bounds this process, and the host's where none
does; never the usage of one against the limit of the other.  Refuses to know what is too much.
Reads Linux' /proc and /sys, 0.3 ms a sample; psutil tells of other systems."""

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
"""The run queue is smoothed over this.  One look at it varies by 0.2 to 0.8 tasks per CPU from
second to second (measured).
"""
_MB = 2**20
_UNLIMITED_MB = 2**40
"""A limit from here on is none; of version 1 it is near 2^63 bytes then."""
_PAGE = os.sysconf("SC_PAGE_SIZE")
_TOTAL = re.compile(r"^(some|full) .*\btotal=(\d{1,19})$", re.MULTILINE | re.ASCII)

Source = Literal["cgroup2", "cgroup1", "host", "processes"]


class Sample(msgspec.Struct, frozen=True):
    """One look at a host.  What is counted over time is 0 in the first."""

    memory_pct: float
    memory_mb: float
    """Working set: without the file cache that the kernel can drop at once."""
    memory_limit_mb: float
    available_mb: float
    source: Source
    """Whose memory it is."""
    cpu_pct: float = 0.0
    """Of the CPU quota, or of the CPUs this process may run on."""
    cpu_waiting_pct: float | None = None
    """Share of the time in which some task waited for a CPU; None where the kernel does not
    tell.
    """
    memory_stall_pct: float | None = None
    """Share of the time in which all tasks waited for memory; None where the kernel does not
    tell.
    """
    throttled_pct: float = 0.0
    """Share of the quota's periods that ended early."""
    load_per_cpu: float | None = None
    """Tasks that run or want to, of the host, for each of its CPUs; None where the kernel does not
    tell.
    """


class _Memory(NamedTuple):
    used_mb: float
    limit_mb: float
    source: Source

    @property
    def pct(self) -> float:
        return 100 * self.used_mb / self.limit_mb


class _Counters(NamedTuple):
    """What only grows, each as a part and its whole; two of them make a share."""

    cpu: tuple[float, float]
    """Used and usable: seconds of the quota, or ticks of the CPUs."""
    throttling: tuple[float, float]
    """Periods that ended early, and all."""
    cpu_of: str
    """Whose quota; two are compared only when it is the same."""
    waiting: tuple[float, float] | None
    stalled: tuple[float, float] | None
    at: float


def of_any_system() -> Sample:
    """Return what psutil knows of a host without /proc: no limits of containers, and no waiting but
    the load average.
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
    """Measures the host of this process; once a second, from one thread.

    Memory is that of the smallest limit that is smaller than the host's memory, among the limits of
    this process's cgroup and those around it; without one it is the host's.
    `settings.max_memory_mb` bounds our own processes, wherever they run: this one and all below it,
    by their resident memory without what they share with a file or with each other by intent.
    Pages that a child has not written since its fork count in each (the exact share costs 3 ms per
    300 MB). It needs /proc/*/task/*/children, as distributions' kernels have it.  Of the two, the
    one closer to its bound is told.

    The run queue is procs_running of /proc/stat, smoothed, not the load average: that is steadier
    still, but remembers a load for minutes after its end, and counts tasks that wait for a disk.
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
        """`elsewhere` measures where there is no /proc."""
        self._elsewhere = elsewhere
        self._max_memory_mb, self._clock, self._cpus = settings.max_memory_mb, clock, cpus
        self._proc, self._cgroup = root / "proc", _Cgroup(root)
        self._before: _Counters | None = None
        self._load: float | None = None

    def sample(self) -> Sample | None:
        """Return what is measured now and since the call before; None where not even memory can
        be.
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
            load_per_cpu=self._smoothed(_run_queue(stat), now.at - before.at),
        )

    # --- memory --------------------------------------------------------------------------------

    def _memory(self) -> _Memory | None:
        host = self._host_memory()
        found = [
            self._cgroup.memory(host.limit_mb if host else _UNLIMITED_MB) or host,
            self._own_memory(),
        ]
        return max((each for each in found if each), key=lambda each: each.pct, default=None)

    def _host_memory(self) -> _Memory | None:
        told = _numbers(_text(self._proc / "meminfo"))
        total, available = told.get("MemTotal:", 0), told.get("MemAvailable:")
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
            _, resident, shared, *_ = [
                *(_int(each) or 0 for each in _text(self._proc / process / "statm").split()),
                0,
                0,
                0,
            ]
            pages += max(0, resident - shared)
        return _Memory(pages * _PAGE / _MB, self._max_memory_mb, "processes") if pages else None

    def _family(self, process: str) -> Iterator[str]:
        yield process
        for children in (self._proc / process / "task").glob("*/children"):
            for child in _text(children).split():
                yield from self._family(child)

    # --- time ----------------------------------------------------------------------------------

    def _counters(self, stat: str) -> _Counters:
        cpus, at = self._cpus(), self._clock()
        bound = self._cgroup.cpu(len(cpus))
        return _Counters(
            cpu=(bound.used_s, at * bound.cpus) if bound else _ticks(stat, cpus),
            throttling=bound.throttling if bound else (0, 0),
            cpu_of=f"{bound.cpus:g} of {bound.folder}" if bound else "host",
            waiting=self._pressure("cpu", "some", at),
            stalled=self._pressure("memory", "full", at),
            at=at,
        )

    def _pressure(self, resource: str, kind: str, at: float) -> tuple[float, float] | None:
        """Return the µs of waiting and of time: of the own cgroup, or of the host where the kernel
        keeps none for cgroups.
        """
        for file in (
            self._cgroup.unified / f"{resource}.pressure",
            self._proc / "pressure" / resource,
        ):
            if (waited := dict(_TOTAL.findall(_text(file))).get(kind)) is not None:
                return int(waited), at * 1e6
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
    """The cgroup of this process and those around it, of either version; what a file does not tell
    is not there.
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
        """Return the memory of the smallest limit below the host's; of equal ones the outermost,
        which holds most.
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
        """Return the smallest quota, in CPUs and at most those `allowed`, and what was used of
        it.
        """
        found = (self._quota(each) for each in self._cpu)
        for folder, cpus, *_ in sorted(
            (each for each in found if each), key=lambda each: each.cpus
        ):
            told = _numbers(_text(folder / "cpu.stat"))
            if (used_s := self._used_s(folder, told)) is not None:
                throttling = (told.get("nr_throttled", 0), told.get("nr_periods", 0))
                return _Quota(folder, min(cpus, allowed), used_s, throttling)
        return None

    def _quota(self, folder: Path) -> _Quota | None:
        if self._cpu_version == 2:
            told = _text(folder / "cpu.max").split()
            quota, period = (_int(each) for each in told) if len(told) == 2 else (None, None)
        else:
            quota, period = (
                _number(folder / "cpu.cfs_quota_us"),
                _number(folder / "cpu.cfs_period_us"),
            )
        return _Quota(folder, quota / period) if quota and period else None

    def _used_s(self, folder: Path, told: dict[str, int]) -> float | None:
        if self._cpu_version == 2:
            return told["usage_usec"] / 1e6 if "usage_usec" in told else None
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
    """Return a cgroup's folder and those around it; inside a container its path may lie outside the
    mount, which then is it.
    """
    own = mount / path.strip("/")
    if ".." in own.parts or not own.is_dir():
        return [mount]
    return [own, *(each for each in own.parents if each.is_relative_to(mount))]


def _least(folder: Path, files: tuple[str, ...]) -> int | None:
    """Return the smallest number in some files, of those that have one above 0."""
    return min((number for each in files if (number := _number(folder / each))), default=None)


# --- files ------------------------------------------------------------------------------------


def _text(file: Path) -> str:
    """Return what a file says; '' when it is not there, or not for us."""
    try:
        with open(file, encoding="ascii", errors="replace") as opened:  # noqa: PTH123  # Path.open costs 5 us more
            return opened.read()
    except OSError:
        return ""


def _int(word: str) -> int | None:
    """Return a count; None for "max", -1 and whatever else is none."""
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
    """Return the ticks in which these CPUs were busy, and all; of all CPUs where those have other
    numbers (LXC).
    """
    names = {f"cpu{each}" for each in cpus}
    lines = [line.split() for line in stat.splitlines() if line.startswith("cpu")]
    chosen = [each for each in lines if each[0] in names] or [
        each for each in lines if each[0] == "cpu"
    ]
    busy = total = 0
    for _, *fields in chosen:
        ticks = [
            _int(each) or 0 for each in fields[:8]
        ]  # what follows, guests' time, is contained in user time
        total += sum(ticks)
        busy += sum(ticks) - sum(ticks[3:5])  # idle, and idle with a disk at work
    return busy, total


def _run_queue(stat: str) -> float | None:
    """Return how many tasks want a CPU, without the one that asks, for each CPU of the host."""
    cpus = len(re.findall(r"^cpu\d", stat, re.MULTILINE))
    running = _numbers(stat).get("procs_running")
    return max(0, running - 1) / cpus if cpus and running is not None else None


def _share(before: tuple[float, float], now: tuple[float, float]) -> float:
    part, whole = now[0] - before[0], now[1] - before[1]
    return min(100.0, max(0.0, 100 * part / whole)) if whole > 0 else 0.0


def held_mb(pid: int) -> float:
    """Return how much memory a process of this machine holds, in MB; 0 when it has just ended, or
    nobody can say.
    """
    try:
        return int(Path(f"/proc/{pid}/statm").read_text(encoding="ascii").split()[1]) / (
            _MB / _PAGE
        )
    except (OSError, IndexError, ValueError):
        return 0.0
