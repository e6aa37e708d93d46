"""The OpenTelemetry side of tracing: spans with given ids, and their export by the main process.

`tracing` imports it only when tracing is on.  A pool process sends nothing to a collector.  Its
ended spans go to its worker's main process, through a socket that was made before the fork.  So
they survive their pool process, and a worker has one connection to its collector.  If the app has
set a tracer provider, that one is used, with its own exporters.  Begin with `Spans.start`, then
`HandOver` and `Export`.
"""

from __future__ import annotations

import logging
import socket
import threading
from collections.abc import Mapping, Sequence
from importlib.metadata import entry_points
from typing import Any, NamedTuple

import msgspec
from opentelemetry import context as contexts
from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.sdk.resources import SERVICE_NAME, Resource
from opentelemetry.sdk.trace import Event, ReadableSpan, SpanProcessor, Tracer, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter
from opentelemetry.sdk.trace.id_generator import IdGenerator
from opentelemetry.sdk.trace.sampling import ALWAYS_ON
from opentelemetry.sdk.util.instrumentation import InstrumentationScope
from opentelemetry.trace import (
    Link,
    NonRecordingSpan,
    Span,
    SpanContext,
    SpanKind,
    Status,
    StatusCode,
    TraceFlags,
    TraceState,
)

from rlm_tasks.engine.concurrent_work import event_loop

logger = logging.getLogger(__name__)

SERVICE = "rlm-tasks"
MAX_SPAN_BYTES = 2**18
"""Size of the largest span that can be handed over; the system may limit datagrams further."""
HAND_OVER_S = 0.05
"""Longest wait for the main process to take a span; after it the span is lost, and work goes on."""
FLUSH_S = 3.0
"""Longest wait of a stopping worker for its collector."""


class Ids(NamedTuple):
    """The place of a span in its trace; a parent of 0 means none."""

    trace: int
    span: int
    parent: int
    sampled: bool


class Spans:
    """Begin spans with given ids in this process."""

    def __init__(self, processors: Sequence[SpanProcessor] = ()) -> None:
        """`processors` receive the spans, if the app has not set a tracer provider."""
        self._own = TracerProvider(resource=resource(), shutdown_on_exit=False)
        for each in processors:
            self._own.add_span_processor(each)
        self._provider: Any = None
        self._tracer: Tracer | None = None
        self._given = _GivenIds()
        self._here = threading.local()

    def start(
        self, name: str, ids: Ids, start_ns: int, attributes: Mapping[str, Any]
    ) -> Span | None:
        """Begin a span with given ids, and return it.

        The result is None when the app's tracer provider does not support given ids.
        """
        tracer = self._current_tracer()
        if tracer is None:
            return None
        self._given.next(ids)
        parent = SpanContext(
            ids.trace, ids.parent, is_remote=True, trace_flags=TraceFlags(TraceFlags.SAMPLED)
        )
        within = (
            trace.set_span_in_context(NonRecordingSpan(parent), Context())
            if ids.parent
            else Context()
        )
        return tracer.start_span(name, within, attributes=dict(attributes), start_time=start_ns)

    def enter(self, ids: Ids, span: Span | None, *, in_loop: bool) -> None:
        """Make a span the parent of spans that begin in this thread; they follow its sampling."""
        self.leave()
        if isinstance(trace.get_tracer_provider(), trace.ProxyTracerProvider):
            # Set only now, because the app may set its own provider until the first node.
            trace.set_tracer_provider(self._own)
        if span is None:
            span = NonRecordingSpan(
                SpanContext(
                    ids.trace, ids.span, is_remote=False, trace_flags=TraceFlags(int(ids.sampled))
                )
            )
        within = trace.set_span_in_context(span)
        self._here.token = contexts.attach(within)
        if in_loop:
            # An event loop has one context, which was made at its first run.
            event_loop().run(_attach(within))

    def leave(self) -> None:
        """End the effect of `enter`: spans of this thread get no parent of ours."""
        token, self._here.token = getattr(self._here, "token", None), None
        if token is not None:
            contexts.detach(token)

    def _current_tracer(self) -> Tracer | None:
        provider: Any = trace.get_tracer_provider()
        if isinstance(provider, trace.ProxyTracerProvider):
            provider = self._own
        if provider is not self._provider:
            self._provider = provider
            self._tracer = self._with_given_ids(provider.get_tracer("rlm_tasks"))
        return self._tracer

    def _with_given_ids(self, tracer: Any) -> Tracer | None:
        if not isinstance(tracer, Tracer):
            logger.warning(
                "Jobs are not traced: %s gives no tracer of the OpenTelemetry SDK",
                type(self._provider).__name__,
            )
            return None
        # The tracer is ours alone; sampling is decided for the whole job.
        tracer.id_generator, tracer.sampler = self._given, ALWAYS_ON
        return tracer


async def _attach(within: Context) -> None:
    contexts.attach(within)


class _GivenIds(IdGenerator):
    """Returns the ids that were set for the next span of this thread."""

    def __init__(self) -> None:
        self._here = threading.local()

    def next(self, ids: Ids) -> None:
        self._here.ids = ids

    def generate_span_id(self) -> int:
        return self._here.ids.span  # type: ignore[no-any-return]  # a thread's own attribute

    def generate_trace_id(self) -> int:
        return self._here.ids.trace  # type: ignore[no-any-return]  # a thread's own attribute


def resource() -> Resource:
    """Return the resource by the OTEL variables; without a name there, the service is `SERVICE`."""
    found = Resource.create()
    unnamed = str(found.attributes.get(SERVICE_NAME, "")).startswith("unknown_service")
    return found.merge(Resource({SERVICE_NAME: SERVICE})) if unnamed else found


# --- from a pool process to its main process --------------------------------------------------


class HandOver(SpanProcessor):
    """The sending end, in pool processes: each span is sent when it ends, or is lost."""

    def __init__(self, to: socket.socket) -> None:
        self._to = to
        self._lost = False

    def on_end(self, span: ReadableSpan) -> None:
        """Send an ended span to the main process."""
        if span.context is None or not span.context.trace_flags.sampled:
            return
        try:
            self._to.send(packed(span))
        except OSError as error:
            if not self._lost:
                logger.warning(
                    "A span is lost, and others may be: the worker's main process does not "
                    "receive it: %s",
                    error,
                )
            self._lost = True


class Export(threading.Thread):
    """The receiving end, in the main process: it exports spans in batches (OTEL_BSP_*)."""

    def __init__(self, exporters: Sequence[SpanExporter]) -> None:
        super().__init__(name="rlm-spans", daemon=True)
        self._exporters = exporters
        self._receiver, self.sender = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.sender.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, MAX_SPAN_BYTES)
        self.sender.settimeout(HAND_OVER_S)

    def run(self) -> None:
        """Receive spans until the empty message, then export the last ones."""
        try:
            batches, worker = [BatchSpanProcessor(each) for each in self._exporters], resource()
        except ValueError as error:
            logger.error("Jobs are not traced, see OTEL_BSP_*: %s", error)
            self._receiver.close()
            return
        while data := self._receiver.recv(MAX_SPAN_BYTES):
            span = unpacked(data, worker)
            for batch in batches:
                batch.on_end(span)
        for batch in batches:
            batch.shutdown()  # type: ignore[no-untyped-call]  # OpenTelemetry is partly typed
        self._receiver.close()

    def stop(self) -> None:
        """Export the received spans, within twice `FLUSH_S`."""
        if self.is_alive():
            self.sender.settimeout(FLUSH_S)
            self.sender.send(b"")
            self.join(FLUSH_S)
            self.sender.close()


class _PackedContext(msgspec.Struct, array_like=True, frozen=True):
    """A span context; ids are hex digits, because a trace's id is too large for an integer."""

    trace: str
    span: str
    flags: int
    state: str

    @classmethod
    def of(cls, context: SpanContext) -> _PackedContext:
        ids = format(context.trace_id, "032x"), format(context.span_id, "016x")
        return cls(*ids, int(context.trace_flags), context.trace_state.to_header())

    def unpacked(self) -> SpanContext:
        state = TraceState.from_header([self.state]) if self.state else None
        return SpanContext(
            int(self.trace, 16), int(self.span, 16), True, TraceFlags(self.flags), state
        )


class _Packed(msgspec.Struct, array_like=True, frozen=True):
    """An ended span without its resource, which is the worker's."""

    name: str
    context: _PackedContext
    parent: _PackedContext | None
    attributes: dict[str, Any]
    events: list[tuple[str, int, dict[str, Any]]]
    links: list[tuple[_PackedContext, dict[str, Any]]]
    kind: int
    status: tuple[int, str | None]
    start_ns: int | None
    end_ns: int | None
    scope: tuple[str, str | None, str | None]


_decoder = msgspec.msgpack.Decoder(_Packed)


def packed(span: ReadableSpan) -> bytes:
    """Return an ended span as bytes for another process of this worker."""
    scope, context = span.instrumentation_scope, span.context
    assert context is not None  # it was begun
    fields = _Packed(
        name=span.name,
        context=_PackedContext.of(context),
        parent=_PackedContext.of(span.parent) if span.parent else None,
        attributes=dict(span.attributes or {}),
        events=[(each.name, each.timestamp, dict(each.attributes or {})) for each in span.events],
        links=[
            (_PackedContext.of(each.context), dict(each.attributes or {})) for each in span.links
        ],
        kind=span.kind.value,
        status=(span.status.status_code.value, span.status.description),
        start_ns=span.start_time,
        end_ns=span.end_time,
        scope=(scope.name, scope.version, scope.schema_url) if scope else ("", None, None),
    )
    return msgspec.msgpack.encode(fields)


def unpacked(data: bytes, worker: Resource) -> ReadableSpan:
    """Return the span of these bytes, with the worker's resource."""
    fields = _decoder.decode(data)
    code, description = fields.status
    return ReadableSpan(
        fields.name,
        fields.context.unpacked(),
        fields.parent.unpacked() if fields.parent else None,
        worker,
        fields.attributes,
        [Event(name, attributes, timestamp) for name, timestamp, attributes in fields.events],
        [Link(context.unpacked(), attributes) for context, attributes in fields.links],
        SpanKind(fields.kind),
        status=Status(StatusCode(code), description),
        start_time=fields.start_ns,
        end_time=fields.end_ns,
        instrumentation_scope=InstrumentationScope(*fields.scope),
    )


# --- exporters --------------------------------------------------------------------------------


class NoExporter(Exception):
    """The settings name an exporter that is not installed."""


def exporter(name: str) -> SpanExporter:
    """Return the exporter that OpenTelemetry has registered under a name.

    Raises NoExporter.
    """
    group = "opentelemetry_traces_exporter"
    found = list(entry_points(group=group, name=name))
    if not found:
        known = ", ".join(sorted({each.name for each in entry_points(group=group)}))
        raise NoExporter(
            f"there is no exporter {name!r} here, but {known}; install its package, or set "
            "OTEL_TRACES_EXPORTER"
        )
    return found[0].load()()  # type: ignore[no-any-return]  # an entry point may be anything
