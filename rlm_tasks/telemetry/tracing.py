"""Traces of jobs: one span for the job, and one for each attempt of a node.

`installation` calls `install_tracing`; in a worker, a `TracedLedger` then makes spans of its calls.
All ids are computed, and messages carry none.  A span's id comes from its job and node, a trace's
from the job, unless the job was submitted under a trace.  So every process knows the parent of a
span, and whether its job is sampled.  Children have as parent the span of the attempt whose FINISH
took effect.  Items, params, results and error messages are never in a span.  OpenTelemetry itself
is imported in `spans` only, when tracing is on.  Begin with `TracedLedger`, then `Tracing`.
"""

from __future__ import annotations

import atexit
import functools
import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import msgspec
from celery import Celery, signals

from resilience.connections import LOST
from resilience.errors import StoreUnavailable
from resilience.keys import TRACED
from resilience.store import Call
from rlm_tasks.errors import JobUnreadable
from rlm_tasks.jobs import spec as specs
from rlm_tasks.jobs.item_failures import outline
from rlm_tasks.jobs.spec import JobSpec
from rlm_tasks.jobs.trace_ids import origin, span_id
from rlm_tasks.ledger.ledger import Ledger
from rlm_tasks.ledger.records import MERGE, PROCESS, Claim, Closed, Finished, Report, Swept
from rlm_tasks.operations import registry
from rlm_tasks.results import Status
from rlm_tasks.settings.environment import traces_exporters
from rlm_tasks.settings.model import Settings

if TYPE_CHECKING:
    from opentelemetry.trace import Span

    from rlm_tasks.telemetry.spans import Ids, Spans

logger = logging.getLogger(__name__)

_BAD = (Status.FAILED, Status.EXPIRED)


# --- spans ------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _CurrentNode:
    """A sampled node that this thread works on."""

    claim: Claim
    name: str
    ids: Ids
    span: Span
    attributes: dict[str, Any]
    start_ns: int


class Tracing:
    """Makes the spans of nodes and jobs."""

    def __init__(
        self,
        spans: Spans,
        sample_rate: float,
        level: Callable[[], str],
        now_ns: Callable[[], int] = time.time_ns,
    ) -> None:
        """`level` returns the pressure level of this process."""
        from rlm_tasks.telemetry.spans import Ids

        self._spans, self._sample_rate = spans, sample_rate
        self._level, self._now_ns, self._ids = level, now_ns, Ids
        self._here = threading.local()

    def begin(self, claim: Claim, worker: str) -> None:
        """Begin the span of a node that this thread has claimed.

        Its parent is the span of the node that was cut to make it, or of the job for a first node.
        """
        spec, start_ns = claim.spec, self._now_ns()
        assert spec is not None  # it was claimed
        source = origin(spec, self._sample_rate)
        ids = self._ids(
            source.trace,
            span_id(spec.job, claim.node),
            span_id(spec.job, *claim.parent.split()),
            source.sampled,
        )
        self._here.node = span = None
        if source.sampled:
            kind = (
                "merge" if claim.node == MERGE else "node" if claim.phase == PROCESS else "validate"
            )
            name, attributes = f"{kind} {spec.operation}", self._attributes(claim, spec, worker)
            span = self._spans.start(name, ids, start_ns, attributes)
            if span is not None:
                self._here.node = _CurrentNode(
                    claim=claim,
                    name=name,
                    ids=ids,
                    span=span,
                    attributes=attributes,
                    start_ns=start_ns,
                )
        self._spans.enter(ids, span, in_loop=claim.node != MERGE and _is_async(spec.operation))

    def _attributes(self, claim: Claim, spec: JobSpec, worker: str) -> dict[str, Any]:
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
        attributes: Mapping[str, Any],
        *,
        took_effect: bool,
        failure: Mapping[str, Any] | None = None,
    ) -> None:
        """End the span of the node that this thread has held under a token.

        An attempt that took no effect is followed by another one, so it gets its own span id.
        """
        node: _CurrentNode | None = getattr(self._here, "node", None)
        if node is not None and (node.claim.job, node.claim.token) == (job, token):
            self._here.node = None
            span = node.span if took_effect else self._attempt(node)
            _close(span, attributes, failure, self._now_ns())
        self._spans.leave()

    def _attempt(self, node: _CurrentNode) -> Span | None:
        """Return a span for an attempt without effect; the node's id is left to the next one."""
        own = span_id(node.claim.job, node.claim.node, node.claim.epoch)
        return self._spans.start(
            node.name, node.ids._replace(span=own), node.start_ns, node.attributes
        )

    def leave(self, **_: Any) -> None:
        """Forget the node of this thread, if a task ended without a report on it."""
        self._here.node = None
        self._spans.leave()

    def samples(self, spec: JobSpec) -> bool:
        """Whether a job is traced."""
        return origin(spec, self._sample_rate).sampled

    def job(self, spec: JobSpec, facts: Mapping[str, str]) -> None:
        """Make the span of an ended job: from its opening to its end, by the ledger's clock."""
        source = origin(spec, self._sample_rate)
        opened_ns, closed_ns = _ns(facts["opened_ms"]), _ns(facts["closed_ms"])
        ids = self._ids(source.trace, span_id(spec.job), source.parent, source.sampled)
        attributes = {
            "rlm.job_id": spec.job,
            "rlm.operation": spec.operation,
            "rlm.priority": spec.priority,
        }
        span = self._spans.start(f"job {spec.operation}", ids, opened_ns, attributes)
        if span is not None and facts.get("started_ms"):
            span.add_event("started", timestamp=_ns(facts["started_ms"]))
        counts = {
            f"rlm.{name}": int(facts[name])
            for name in ("done", "failed", "skipped", "nodes", "splits")
        }
        state = Status(facts["state"])
        error = msgspec.json.decode(facts["error"]) if facts.get("error") else {}
        code = error.get("code") or state.upper()
        failure = {"type": error.get("type", ""), "code": code} if state in _BAD else None
        _close(
            span,
            {**counts, "rlm.items": spec.n, "rlm.state": state, "rlm.reason": facts["stop"]},
            failure,
            closed_ns,
        )


def _ns(ms: str) -> int:
    return int(ms) * 10**6


def _close(
    span: Span | None,
    attributes: Mapping[str, Any],
    failure: Mapping[str, Any] | None,
    end_ns: int,
) -> None:
    """End a span; a failure adds its type and code, but not its message, which may have data."""
    if span is None:
        return
    span.set_attributes({name: value for name, value in attributes.items() if value != ""})
    if failure is not None:
        from opentelemetry.trace import StatusCode

        kind, code = failure.get("type", ""), failure.get("code", "")
        known = (("error.type", kind), ("rlm.code", code))
        span.set_attributes({name: value for name, value in known if value})
        span.set_status(StatusCode.ERROR, " ".join(filter(None, (kind, code))))
    span.end(end_ns)


def _is_async(operation: str) -> bool:
    return operation in registry.names() and registry.get(operation).is_async


# --- the calls of the ledger ------------------------------------------------------------------


class TracedLedger(Ledger):
    """A ledger whose calls begin and end spans.

    Every begin and end of a node, and every end of a job, is a call of the ledger.
    """

    def __init__(self, ledger: Ledger, tracing: Tracing) -> None:
        super().__init__(ledger.store, ledger.keys, ledger.settings, on_outage=ledger.on_outage)
        self.after_close = ledger.after_close
        self._tracing = tracing
        self._here = threading.local()  # its worker's name

    def fail_fast(self) -> TracedLedger:
        """Return this ledger with calls that raise at once."""
        return TracedLedger(super().fail_fast(), self._tracing)

    def claim(self, job: str, node: str, token: str, worker: str, message: int = 0) -> Claim:
        """Claim a node, and begin its span; if this call has closed the job, make the job's."""
        claim = super().claim(job=job, node=node, token=token, worker=worker, message=message)
        if claim.answer == "run":
            self._here.worker = worker
            self._tracing.begin(claim, worker)
        elif claim.answer == "closed":
            self._trace_job(job)
        return claim

    def finish(
        self,
        claim: Claim,
        report: Report,
        partial: bytes,
        *beside: Call,
        once: Sequence[Call] = (),
        more: Sequence[tuple[int, bytes]] = (),
    ) -> Finished:
        """Close a node, and end its span; begin that of the root merge if the caller got it."""
        finished = super().finish(claim, report, partial, *beside, once=once, more=more)
        failure = msgspec.json.decode(report.failures[0][1]) if report.failures else None
        attributes = {
            "rlm.done": report.done,
            "rlm.failed": report.failed_count,
            "rlm.reason": report.why,
        }
        if finished.answer == "stale":
            attributes["rlm.reason"] = "it was given to another worker"
        self._tracing.end(
            claim.job,
            claim.token,
            attributes,
            took_effect=finished.answer == "ok",
            failure=failure,
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
            self._trace_job(claim.job)
        return finished

    def park(self, claim: Claim, wait_ms: int, why: str, tries: int = 0) -> str:
        """Park a node, and end the span of this attempt, which took no effect."""
        waits = super().park(claim, wait_ms, why, tries)
        attributes = {"rlm.reason": outline(why), "rlm.wait_ms": wait_ms}
        self._tracing.end(claim.job, claim.token, attributes, took_effect=False)
        return waits

    def release(
        self, job: str, node: str, token: str, item: int, died_of: str, *, condemned: bool = False
    ) -> bool:
        """Release a node; if it is this thread's own, end the span of its attempt."""
        released = super().release(
            job=job, node=node, token=token, item=item, died_of=died_of, condemned=condemned
        )
        attributes, failure = {"rlm.reason": died_of}, {"type": died_of}
        self._tracing.end(job, token, attributes, took_effect=False, failure=failure)
        return released

    def close(
        self,
        job: str,
        token: str,
        state: str,
        answer: bytes = b"",
        error: Mapping[str, Any] | None = None,
    ) -> Closed:
        """End a job from its root merge, and the spans of both."""
        closed = super().close(job=job, token=token, state=state, answer=answer, error=error)
        self._tracing.end(job, token, {}, took_effect=bool(closed.state), failure=error)
        if closed.state:
            self._trace_job(job)
        return closed

    def stop(
        self,
        job: str,
        reason: str,
        *,
        detail: str = "",
        by: str = "",
        error: Mapping[str, Any] | None = None,
        force: bool = False,
    ) -> str:
        """End a job early, and make its span if that has ended it."""
        state = super().stop(job, reason, detail=detail, by=by, error=error, force=force)
        self._trace_job_if_final(state, job)
        return state

    def sweep(self, job: str) -> Swept:
        """Recover a job's overdue nodes; make the span of a job that ended without tracing."""
        swept = super().sweep(job)
        self._trace_job_if_final(swept.state, job)
        return swept

    def _trace_job_if_final(self, state: str, job: str) -> None:
        if state in list(Status) and Status(state).final:
            self._trace_job(job)

    def _trace_job(self, job: str) -> None:
        """Make the span of an ended job, in the one process that marks the job first."""
        try:
            facts = self.facts(job)
            if not facts or TRACED in facts or not Status(facts["state"]).final:
                return
            spec = specs.load(facts["spec"].encode(), job)
            if self._tracing.samples(spec) and self.store.client.hsetnx(
                self.keys.of(job).job, TRACED, 1
            ):
                self._tracing.job(spec, facts)
        except (StoreUnavailable, JobUnreadable, *LOST) as error:
            logger.info("The trace of job %s has no span of the job itself: %s", job, error)


# --- in a worker ------------------------------------------------------------------------------


def install_tracing(app: Celery, settings: Settings) -> None:
    """Turn on tracing when this process becomes a worker of the app, if the settings want it."""
    if settings.tracing.enabled:
        signals.worker_init.connect(functools.partial(_begin, app, settings), weak=False)


def _begin(app: Celery, settings: Settings, sender: Any, **_: Any) -> None:
    """Prepare tracing before the pool forks; a missing package ends the worker with an error."""
    if sender.app is not app:
        return
    try:
        from rlm_tasks.telemetry.spans import Export, HandOver, NoExporter, Spans, exporter
    except ModuleNotFoundError as error:
        if not (error.name or "").startswith("opentelemetry"):
            raise
        raise SystemExit(
            "Error: RLM_TRACING__ENABLED needs OpenTelemetry: pip install 'rlm-tasks[otel]', or "
            "unset the variable"
        ) from None
    try:
        export = Export([exporter(name) for name in traces_exporters()])
    except NoExporter as error:
        raise SystemExit(f"Error: RLM_TRACING__ENABLED: {error}") from None
    runtime = app.rlm_runtime()
    tracing = Tracing(
        Spans([HandOver(export.sender)]),
        settings.tracing.sample_rate,
        lambda: runtime.page.level.label,
    )
    runtime.ledger = TracedLedger(runtime.ledger, tracing)
    # After an error outside of items, the thread's node is still set.
    signals.task_postrun.connect(tracing.leave, weak=False)
    signals.worker_ready.connect(lambda **_: export.start(), weak=False)
    signals.worker_shutdown.connect(lambda **_: export.stop(), weak=False)
    atexit.register(export.stop)  # a cold shutdown sends no signal
