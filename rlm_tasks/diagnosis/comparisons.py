"""Findings that compare processes: what workers know, with each other and with this process.

The doctor calls `compare` with the reports of live workers.  Each worker reports its operations,
versions, settings and queues beside its pressure.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence

from rlm_tasks.jobs.spec import SCHEMA
from rlm_tasks.ledger.obstacles import Deployment, connects, deaf, drains, gone, resume
from rlm_tasks.operations import registry
from rlm_tasks.settings.document import fingerprints
from rlm_tasks.settings.model import Settings
from rlm_tasks.version import __version__
from rlm_tasks.words import count, listed
from rlm_tasks.worker.preflight import Finding
from scheduler.board import HostReport, fingerprint, version_on

_OURS, _LLM = "rlm_tasks.", "RLM_LLM__"


def compare(deployment: Deployment, settings: Settings) -> Iterator[Finding]:
    """Yield the findings on live workers; none without a worker.

    `settings` are those of this process.
    """
    hosts = deployment.workers.live
    yield from _workers(deployment)
    if hosts:
        yield from releases(hosts)
        yield from _operations(hosts)
        yield from _settings(hosts, settings)


def _workers(deployment: Deployment) -> Iterator[Finding]:
    """Yield a finding on the number of workers, and one on lost workers."""
    hosts, departed = deployment.workers
    lost = [gone(each) for each in departed if not each.stopped]
    if not hosts:
        last = f"; {gone(departed[0])}" if departed else ""
        advice = (
            f"Type: {deployment.command} worker; if one runs, it must have the same RLM_REDIS_URL "
            f"and RLM_NAMESPACE: {deployment.command} inspect ping"
        )
        yield Finding("workers", "fault", f"no worker reports, so no job runs{last}", advice)
        return
    slots = count(sum(host.slots for host in hosts), "slot")
    yield Finding("workers", "ok", f"{len(hosts)} reporting, with {slots}")
    if found := deaf(hosts):
        advice = f"Check the broker. Type: {deployment.command} inspect active_queues"
        yield Finding("workers", "fault", found, advice)
    if found := connects(hosts):
        yield Finding("workers", "warning", found, "Ask again in a few seconds")
    if ending := [host for host in hosts if host.draining]:
        found = drains(ending).rstrip(".")
        yield Finding("workers", "warning", found, resume(ending, deployment.command))
    if lost:
        found = f"lost within the last hour: {listed(lost)}"
        yield Finding("workers", "warning", found, "See their logs, and those of the system")


def releases(hosts: Sequence[HostReport]) -> Iterator[Finding]:
    """Yield a finding on workers of another release."""
    older = [host.worker for host in hosts if 0 < host.schema < SCHEMA]
    others = [
        f"{host.worker} ({host.version or 'an older release'})"
        for host in hosts
        if host.version != __version__
    ]
    if older:
        found = f"jobs from here (schema {SCHEMA}) are not read by {', '.join(older)}"
        advice = "Upgrade workers before clients: install this release there, and restart them"
        yield Finding("releases", "fault", found, advice)
    elif others:
        found = f"RLM Tasks {__version__} here, and others on {', '.join(others)}"
        advice = "Install one release everywhere, and restart workers one after the other"
        yield Finding("releases", "warning", found, advice)
    else:
        found = f"all workers run RLM Tasks {__version__}, and read jobs of schema {SCHEMA}"
        yield Finding("releases", "ok", found)


# --- operations -------------------------------------------------------------------------------


def _operations(hosts: Sequence[HostReport]) -> Iterator[Finding]:
    """Yield findings on operations that some processes lack, or have in another version."""
    own = {name: module for name in registry.names() if (module := _module(name))}
    missing = [name for name in own if version_on(hosts, name) == 0]
    if missing:
        modules = ",".join(sorted({own[name] for name in missing}))
        yield Finding(
            "operations",
            "fault",
            f"no worker knows {listed(missing)}, so jobs of "
            f"{'it' if len(missing) == 1 else 'them'} do not run",
            f"Set RLM_OPERATIONS={modules} for the workers, and restart them",
        )
    yield from _versions(hosts)
    yield from _unknown_here(hosts)


def _module(name: str) -> str:
    """Return the module of an operation of the user; '' for a built-in one."""
    module = str(getattr(registry.get(name).function, "__module__", ""))
    return "" if module.startswith(_OURS) else module


def _versions(hosts: Sequence[HostReport]) -> Iterator[Finding]:
    here = registry.versions()
    differing = [
        f"{name} has version {here[name]} here, and {theirs} on {host.worker}"
        for name in here
        for host in hosts
        if (theirs := version_on([host], name)) not in (None, 0, here[name])
    ]
    if differing:
        advice = "Install the same code everywhere: jobs of a newer version wait for such a worker"
        yield Finding("operations", "fault", listed(differing), advice)


def _unknown_here(hosts: Sequence[HostReport]) -> Iterator[Finding]:
    known = {*registry.names(), *map(fingerprint, registry.names())}
    theirs = {name for host in hosts for name in host.operations or () if not name.startswith("#")}
    unknown = sorted(name for name in theirs - known if not name.startswith("llm."))
    if unknown:
        found = f"workers know {listed(unknown)}, and this process does not: it cannot submit them"
        advice = "Set RLM_OPERATIONS here to the modules that the workers import"
        yield Finding("operations", "warning", found, advice)


# --- settings ---------------------------------------------------------------------------------


def _settings(hosts: Sequence[HostReport], settings: Settings) -> Iterator[Finding]:
    """Yield a finding on each setting that differs between workers, or from this process."""
    told = {host.worker: host.settings for host in hosts if host.settings is not None}
    apart = _apart(told)
    here = {
        name: value for name, value in fingerprints(settings).items() if not name.startswith(_LLM)
    }
    for name, groups in apart.items():
        parts = " and ".join(listed(each) for each in groups)
        yield Finding(
            "settings",
            "warning",
            f"{name} differs between workers: {parts}",
            f"Set one value of {name} for all workers, and restart them",
        )
    first: Mapping[str, str] = next(iter(told.values()), here)
    theirs = {name: value for name, value in first.items() if not name.startswith(_LLM)}
    own = [name for name in _apart({"here": here, "there": theirs}) if name not in apart]
    if own:
        found = f"this process and the workers differ in {listed(own)}"
        advice = "Set the same values here: clients and workers of one platform share them"
        yield Finding("settings", "warning", found, advice)
    elif told and not apart:
        yield Finding("settings", "ok", "workers and this process agree")


def _apart(told: Mapping[str, Mapping[str, str]]) -> dict[str, list[list[str]]]:
    """Return the settings that differ, each with the groups of processes that agree."""
    found: dict[str, list[list[str]]] = {}
    for name in sorted({each for settings in told.values() for each in settings}):
        groups: dict[str, list[str]] = defaultdict(list)
        for process, settings in told.items():
            groups[settings.get(name, "")].append(process)
        if len(groups) > 1:
            found[name] = list(groups.values())
    return found
