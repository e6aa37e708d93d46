"""What a job looks like as a trace: its id, its spans, and who is whose parent.

Every id is worked out, none is carried: a span's from its job and node, a trace's from the job,
unless the job was submitted under a trace.  So every process knows the parent of a span, and
whether its job is sampled, and messages do not grow.  What is traced is what the ledger is told and
answers; the span that children hang under is that of the one attempt whose FINISH was true.  Items,
params, results and what errors say are never in a span.  Refuses to know OpenTelemetry, which is
imported where tracing is on (see `spans`)."""

from __future__ import annotations

import atexit
import functools
import logging
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import msgspec
from celery import Celery, signals

from resilience.errors import StoreUnavailable
from resilience.keys import TRACED
from resilience.store import LOST, Call
from rlm_tasks.jobs import spec as specs
from rlm_tasks.jobs.spec import JobSpec
from rlm_tasks.jobs.trace_ids import origin, span_id
from rlm_tasks.ledger.ledger import Ledger
from rlm_tasks.ledger.records import MERGE, PROCESS, Claim, Finished, Report, Swept
from rlm_tasks.operations import registry
from rlm_tasks.results import Status
from rlm_tasks.settings.environment import traces_exporters
from rlm_tasks.settings.model import Settings

if TYPE_CHECKING:
    from opentelemetry.trace import Span

    from rlm_tasks.telemetry.spans import Ids, Spans

logger = logging.getLogger(__name__)

_BAD = (Status.FAILED, Status.EXPIRED)


# --- ids --------------------------------------------------------------------------------------


# --- spans ------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Begun:
    """A sampled node that this thread works on."""

    claim: Claim
    name: str
    ids: Ids
    span: Span
    attributes: dict[str, Any]
    start_ns: int


class Tracing:
    """Tell of nodes and jobs in spans."""

    def __init__(
        self,
        spans: Spans,
        sample_rate: float,
        level: Callable[[], str],
        now_ns: Callable[[], int] = time.time_ns,
    ) -> None:
        """`level` says at which pressure this process works."""
        from rlm_tasks.telemetry.spans import Ids

        self._spans, self._sample_rate, self._level, self._now_ns, self._ids = (
            spans,
            sample_rate,
            level,
            now_ns,
            Ids,
        )
        self._here = threading.local()

    def begin(self, claim: Claim, worker: str) -> None:
        """A node is worked on from now on, in this thread; a node without a parent has the job for
        one.
        """
        spec, start_ns = claim.spec, self._now_ns()
        assert spec is not None  # it was claimed
        where = origin(spec, self._sample_rate)
        ids = self._ids(
            where.trace,
            span_id(spec.job, claim.node),
            span_id(spec.job, *claim.parent.split()),
            where.sampled,
        )
        self._here.begun = span = None
        if where.sampled:
            kind = (
                "merge" if claim.node == MERGE else "node" if claim.phase == PROCESS else "validate"
            )
            name, attributes = f"{kind} {spec.operation}", self._about(claim, spec, worker)
            span = self._spans.start(name, ids, start_ns, attributes)
            self._here.begun = (
                _Begun(
                    claim=claim,
                    name=name,
                    ids=ids,
                    span=span,
                    attributes=attributes,
                    start_ns=start_ns,
                )
                if span is not None
                else None
            )
        self._spans.enter(ids, span, in_loop=claim.node != MERGE and _is_async(spec.operation))

    def _about(self, claim: Claim, spec: JobSpec, worker: str) -> dict[str, Any]:
        return {
            "rlm.job_id": spec.job,
            "rlm.node_id": claim.node,
            "rlm.parent_id": claim.parent,
            "rlm.depth": claim.depth,
            "rlm.operation": spec.operation,
            "rlm.lo": claim.lo,
            "rlm.hi": claim.hi,
            "rlm.attempt": claim.epoch,
            "rlm.worker": worker,
            "rlm.level": self._level(),
        }

    def end(
        self,
        job: str,
        token: str,
        about: Mapping[str, Any],
        *,
        came_to: bool,
        failure: Mapping[str, Any] | None = None,
    ) -> None:
        """The node that this thread has held under a token is done; unless that `came_to`
        something, another attempt follows.
        """
        begun: _Begun | None = getattr(self._here, "begun", None)
        if begun is not None and (begun.claim.job, begun.claim.token) == (job, token):
            self._here.begun = None
            _close(begun.span if came_to else self._attempt(begun), about, failure, self._now_ns())
        self._spans.leave()

    def _attempt(self, begun: _Begun) -> Span | None:
        """Return a span beside the node's, which is that of the attempt that comes to something."""
        own = span_id(begun.claim.job, begun.claim.node, begun.claim.epoch)
        return self._spans.start(
            begun.name, begun.ids._replace(span=own), begun.start_ns, begun.attributes
        )

    def leave(self, **_: Any) -> None:
        """This thread works on no node, whatever has become of the last one."""
        self._here.begun = None
        self._spans.leave()

    def samples(self, spec: JobSpec) -> bool:
        """Whether a job is traced."""
        return origin(spec, self._sample_rate).sampled

    def job(self, spec: JobSpec, facts: Mapping[str, str]) -> None:
        """Tell of a job that has ended: from its opening to its end, by the ledger's clock."""
        where = origin(spec, self._sample_rate)
        opened_ns, closed_ns = _ns(facts["opened_ms"]), _ns(facts["closed_ms"])
        ids = self._ids(where.trace, span_id(spec.job), where.parent, where.sampled)
        about = {
            "rlm.job_id": spec.job,
            "rlm.operation": spec.operation,
            "rlm.priority": spec.priority,
        }
        span = self._spans.start(f"job {spec.operation}", ids, opened_ns, about)
        if span is not None and facts.get("started_ms"):
            span.add_event("started", timestamp=_ns(facts["started_ms"]))
        counts = {
            f"rlm.{name}": int(facts[name])
            for name in ("done", "failed", "skipped", "nodes", "splits")
        }
        state, error = (
            Status(facts["state"]),
            msgspec.json.decode(facts["error"]) if facts.get("error") else {},
        )
        failure = (
            {"type": error.get("type", ""), "code": error.get("code") or state.upper()}
            if state in _BAD
            else None
        )
        _close(
            span,
            {**counts, "rlm.items": spec.n, "rlm.state": state, "rlm.reason": facts["stop"]},
            failure,
            closed_ns,
        )


def _ns(ms: str) -> int:
    return int(ms) * 10**6


def _close(
    span: Span | None, about: Mapping[str, Any], failure: Mapping[str, Any] | None, end_ns: int
) -> None:
    """End a span; of a failure its type and code are told, for what it says is the user's."""
    if span is None:
        return
    span.set_attributes({name: value for name, value in about.items() if value != ""})
    if failure is not None:
        from opentelemetry.trace import StatusCode

        kind, code = failure.get("type", ""), failure.get("code", "")
        span.set_attributes(
            {name: told for name, told in (("error.type", kind), ("rlm.code", code)) if told}
        )
        span.set_status(StatusCode.ERROR, " ".join(filter(None, (kind, code))))
    span.end(end_ns)


def _is_async(operation: str) -> bool:
    return operation in registry.names() and registry.get(operation).is_async


# --- what is told -----------------------------------------------------------------------------


class TracedLedger(Ledger):
    """A ledger that has told of everything in spans: it alone hears when a node begins, how it
    ends, and of what a job ends.
    """

    def __init__(self, ledger: Ledger, tracing: Tracing) -> None:
        super().__init__(ledger.store, ledger.keys, ledger.settings, on_outage=ledger.on_outage)
        self._tracing = tracing
        self._here = threading.local()  # its worker's name

    def fail_fast(self) -> TracedLedger:
        """Return the same ledger whose calls raise at once."""
        return TracedLedger(super().fail_fast(), self._tracing)

    def claim(self, job: str, node: str, token: str, worker: str, message: int = 0) -> Claim:
        """Take a node, and begin its span; a closed job may have been closed by this very call."""
        claim = super().claim(job=job, node=node, token=token, worker=worker, message=message)
        if claim.answer == "run":
            self._here.worker = worker
            self._tracing.begin(claim, worker)
        elif claim.answer == "closed":
            self._tell_end(job)
        return claim

    def finish(self, claim: Claim, report: Report, partial: bytes, *beside: Call) -> Finished:
        """Close a node, and end its span; a merge that is now the caller's begins."""
        finished = super().finish(claim, report, partial, *beside)
        failure = msgspec.json.decode(report.failures[0][1]) if report.failures else None
        about = {
            "rlm.done": report.done,
            "rlm.failed": len(report.failed),
            "rlm.reason": report.why,
        }
        if finished.answer == "stale":
            about["rlm.reason"] = "it was given to another worker"
        self._tracing.end(
            claim.job, claim.token, about, came_to=finished.answer == "ok", failure=failure
        )
        if finished.outcome == MERGE and claim.spec is not None:
            merge = Claim(
                answer="run",
                job=claim.job,
                node=MERGE,
                token=claim.token,
                epoch=1,
                lo=0,
                hi=claim.spec.n,
                spec=claim.spec,
            )
            self._tracing.begin(merge, self._here.worker)
        elif finished.outcome == "closed":
            self._tell_end(claim.job)
        return finished

    def park(self, claim: Claim, wait_ms: int, why: str, tries: int = 0) -> str:
        """Let a node wait; this attempt has come to nothing."""
        waits = super().park(claim, wait_ms, why, tries)
        self._tracing.end(
            claim.job, claim.token, {"rlm.reason": why, "rlm.wait_ms": wait_ms}, came_to=False
        )
        return waits

    def release(
        self, job: str, node: str, token: str, item: int, died_of: str, *, condemned: bool = False
    ) -> bool:
        """Give a node back; when it is this thread's own, its attempt has come to nothing."""
        released = super().release(
            job=job, node=node, token=token, item=item, died_of=died_of, condemned=condemned
        )
        self._tracing.end(
            job, token, {"rlm.reason": died_of}, came_to=False, failure={"type": died_of}
        )
        return released

    def close(
        self,
        job: str,
        token: str,
        state: str,
        answer: bytes = b"",
        error: Mapping[str, Any] | None = None,
    ) -> str:
        """End a job from its root merge, and the spans of both."""
        ended = super().close(job=job, token=token, state=state, answer=answer, error=error)
        self._tracing.end(job, token, {}, came_to=bool(ended), failure=error)
        if ended:
            self._tell_end(job)
        return ended

    def stop(
        self,
        job: str,
        reason: str,
        *,
        detail: str = "",
        error: Mapping[str, Any] | None = None,
        force: bool = False,
    ) -> str:
        """End a job early; when none of its nodes runs it has ended."""
        state = super().stop(job, reason, detail=detail, error=error, force=force)
        self._tell_end_in(state, job)
        return state

    def sweep(self, job: str) -> Swept:
        """Recover a job's overdue nodes; what has ended where nobody traces is seen here."""
        swept = super().sweep(job)
        self._tell_end_in(swept.state, job)
        return swept

    def _tell_end_in(self, state: str, job: str) -> None:
        if state in list(Status) and Status(state).final:
            self._tell_end(job)

    def _tell_end(self, job: str) -> None:
        """Tell of a job's end, once: whoever writes it down first is the one."""
        try:
            facts = self.facts(job)
            if not facts or TRACED in facts or not Status(facts["state"]).final:
                return
            spec = specs.load(facts["spec"].encode())
            if self._tracing.samples(spec) and self.store.client.hsetnx(
                self.keys.of(job).job, TRACED, 1
            ):
                self._tracing.job(spec, facts)
        except (StoreUnavailable, *LOST) as error:
            logger.info("The trace of job %s has no span of the job itself: %s", job, error)


# --- in a worker ------------------------------------------------------------------------------


def install(app: Celery, settings: Settings) -> None:
    """Have this process trace the jobs it works on, should it become a worker of the app."""
    if settings.tracing.enabled:
        signals.worker_init.connect(functools.partial(_begin, app, settings), weak=False)


def _begin(app: Celery, settings: Settings, sender: Any, **_: Any) -> None:
    """Prepare everything before the pool forks; what is missing ends the worker with a sentence."""
    if sender.app is not app:
        return
    try:
        from rlm_tasks.telemetry.spans import Export, HandOver, NoExporter, Spans, exporter
    except ModuleNotFoundError as error:
        if not (error.name or "").startswith("opentelemetry"):
            raise
        raise SystemExit(
            "Error: RLM_TRACING__ENABLED needs OpenTelemetry: pip install 'rlm-tasks[otel]', or unset the variable"
        ) from None
    try:
        export = Export([exporter(name) for name in traces_exporters()])
    except NoExporter as error:
        raise SystemExit(f"Error: RLM_TRACING__ENABLED: {error}") from None
    runtime = app.rlm_runtime()
    tracing = Tracing(
        Spans([HandOver(export.way)]),
        settings.tracing.sample_rate,
        lambda: runtime.page.level.label,
    )
    runtime.ledger = TracedLedger(runtime.ledger, tracing)
    signals.task_postrun.connect(
        tracing.leave, weak=False
    )  # an error outside of items leaves a node open
    signals.worker_ready.connect(lambda **_: export.start(), weak=False)
    signals.worker_shutdown.connect(lambda **_: export.stop(), weak=False)
    atexit.register(export.stop)  # a cold shutdown sends no signal
