"""The OpenTelemetry side of tracing: how a span gets the id it must have, and how it leaves a pool
process.

Imported where tracing is on, and nowhere else.  A pool process sends nothing to a collector: it
hands each span to the main process of its worker when it ends, through a socket that was made
before the fork.  What has ended is safe there, whatever becomes of the pool process; and a worker
has one connection to its collector.  A tracer provider that somebody else has set is used as it is,
with its own way out.  Refuses to know what is traced."""

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
LONGEST = 2**18
"""Bytes of the largest span that can be handed over, as far as the system lets a datagram be so
long.
"""
HAND_OVER_S = 0.05
"""A main process that takes no span for this long gets none: work goes on, and the span is lost."""
FLUSH_S = 3.0
"""A worker that stops waits no longer than this for its collector."""


class Ids(NamedTuple):
    """Where a span stands; a parent of 0 is none."""

    trace: int
    span: int
    parent: int
    sampled: bool


class Spans:
    """Begin spans in this process, and take those of its pool out of it."""

    def __init__(self, processors: Sequence[SpanProcessor] = ()) -> None:
        """`processors` say where spans go that nobody else has provided for."""
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
        """Begin a span under an id that is known; None when the provider in force takes no such
        ids.
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
        """Let spans that are begun in this thread hang under this one, or be left out with it."""
        self.leave()
        if isinstance(trace.get_tracer_provider(), trace.ProxyTracerProvider):
            trace.set_tracer_provider(
                self._own
            )  # not before: whoever sets another does it before the first node
        if span is None:
            span = NonRecordingSpan(
                SpanContext(
                    ids.trace, ids.span, is_remote=False, trace_flags=TraceFlags(int(ids.sampled))
                )
            )
        within = trace.set_span_in_context(span)
        self._here.token = contexts.attach(within)
        if in_loop:
            event_loop().run(
                _attach(within)
            )  # an event loop has one context, made when it ran first

    def leave(self) -> None:
        """Let spans of this thread hang under none of ours."""
        token, self._here.token = getattr(self._here, "token", None), None
        if token is not None:
            contexts.detach(token)

    def _current_tracer(self) -> Tracer | None:
        provider: Any = trace.get_tracer_provider()
        if isinstance(provider, trace.ProxyTracerProvider):
            provider = self._own
        if provider is not self._provider:
            self._provider, self._tracer = (
                provider,
                self._with_given_ids(provider.get_tracer("rlm_tasks")),
            )
        return self._tracer

    def _with_given_ids(self, tracer: Any) -> Tracer | None:
        if not isinstance(tracer, Tracer):
            logger.warning(
                "Jobs are not traced: %s gives no tracer of the OpenTelemetry SDK",
                type(self._provider).__name__,
            )
            return None
        tracer.id_generator, tracer.sampler = (
            self._given,
            ALWAYS_ON,
        )  # it is our own; what is sampled is decided by job
        return tracer


async def _attach(within: Context) -> None:
    contexts.attach(within)


class _GivenIds(IdGenerator):
    """Answers with the ids that the next span of this thread must have."""

    def __init__(self) -> None:
        self._here = threading.local()

    def next(self, ids: Ids) -> None:
        self._here.ids = ids

    def generate_span_id(self) -> int:
        return self._here.ids.span  # type: ignore[no-any-return]  # a thread's own attribute

    def generate_trace_id(self) -> int:
        return self._here.ids.trace  # type: ignore[no-any-return]  # a thread's own attribute


def resource() -> Resource:
    """Return what the OTEL variables say of this service; its name is ours where they say none."""
    told = Resource.create()
    unnamed = str(told.attributes.get(SERVICE_NAME, "")).startswith("unknown_service")
    return told.merge(Resource({SERVICE_NAME: SERVICE})) if unnamed else told


# --- from a pool process to its main process --------------------------------------------------


class HandOver(SpanProcessor):
    """The end of the way that pool processes see: each span goes at once, or not at all."""

    def __init__(self, to: socket.socket) -> None:
        self._to = to
        self._lost = False

    def on_end(self, span: ReadableSpan) -> None:
        """Send a span."""
        if span.context is None or not span.context.trace_flags.sampled:
            return
        try:
            self._to.send(packed(span))
        except OSError as error:
            if not self._lost:
                logger.warning(
                    "A span is lost, and others may be, for the worker's main process does not take it: %s",
                    error,
                )
            self._lost = True


class Export(threading.Thread):
    """The other end, in the main process: spans are taken as they come and exported in batches
    (OTEL_BSP_*).
    """

    def __init__(self, exporters: Sequence[SpanExporter]) -> None:
        super().__init__(name="rlm-spans", daemon=True)
        self._exporters = exporters
        self._taken, self.way = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.way.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, LONGEST)
        self.way.settimeout(HAND_OVER_S)

    def run(self) -> None:
        """Take spans until the empty message, then export the last ones."""
        try:
            batches, of = [BatchSpanProcessor(each) for each in self._exporters], resource()
        except ValueError as error:
            logger.error("Jobs are not traced, see OTEL_BSP_*: %s", error)
            self._taken.close()
            return
        while data := self._taken.recv(LONGEST):
            span = unpacked(data, of)
            for batch in batches:
                batch.on_end(span)
        for batch in batches:
            batch.shutdown()  # type: ignore[no-untyped-call]  # OpenTelemetry is partly typed
        self._taken.close()

    def stop(self) -> None:
        """Export what has been handed over, in bounded time."""
        if self.is_alive():
            self.way.settimeout(FLUSH_S)
            self.way.send(b"")
            self.join(FLUSH_S)
            self.way.close()


class _Place(msgspec.Struct, array_like=True, frozen=True):
    """A span context; ids are hex digits, for a trace's is longer than an integer may be."""

    trace: str
    span: str
    flags: int
    state: str

    @classmethod
    def of(cls, context: SpanContext) -> _Place:
        ids = format(context.trace_id, "032x"), format(context.span_id, "016x")
        return cls(*ids, int(context.trace_flags), context.trace_state.to_header())

    def context(self) -> SpanContext:
        state = TraceState.from_header([self.state]) if self.state else None
        return SpanContext(
            int(self.trace, 16), int(self.span, 16), True, TraceFlags(self.flags), state
        )


class _Packed(msgspec.Struct, array_like=True, frozen=True):
    """An ended span, but for its resource: that is the worker's."""

    name: str
    place: _Place
    parent: _Place | None
    attributes: dict[str, Any]
    events: list[tuple[str, int, dict[str, Any]]]
    links: list[tuple[_Place, dict[str, Any]]]
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
    told = _Packed(
        name=span.name,
        place=_Place.of(context),
        parent=_Place.of(span.parent) if span.parent else None,
        attributes=dict(span.attributes or {}),
        events=[(each.name, each.timestamp, dict(each.attributes or {})) for each in span.events],
        links=[(_Place.of(each.context), dict(each.attributes or {})) for each in span.links],
        kind=span.kind.value,
        status=(span.status.status_code.value, span.status.description),
        start_ns=span.start_time,
        end_ns=span.end_time,
        scope=(scope.name, scope.version, scope.schema_url) if scope else ("", None, None),
    )
    return msgspec.msgpack.encode(told)


def unpacked(data: bytes, of: Resource) -> ReadableSpan:
    """Return the span, as one of a resource."""
    told = _decoder.decode(data)
    code, description = told.status
    return ReadableSpan(
        told.name,
        told.place.context(),
        told.parent.context() if told.parent else None,
        of,
        told.attributes,
        [Event(name, attributes, timestamp) for name, timestamp, attributes in told.events],
        [Link(place.context(), attributes) for place, attributes in told.links],
        SpanKind(told.kind),
        status=Status(StatusCode(code), description),
        start_time=told.start_ns,
        end_time=told.end_ns,
        instrumentation_scope=InstrumentationScope(*told.scope),
    )


# --- where to ---------------------------------------------------------------------------------


class NoExporter(Exception):
    """An exporter that is asked for and not installed."""


def exporter(name: str) -> SpanExporter:
    """Return an exporter by the name that OpenTelemetry has registered it under.  Raises
    NoExporter.
    """
    found = list(entry_points(group="opentelemetry_traces_exporter", name=name))
    if not found:
        known = ", ".join(
            sorted({each.name for each in entry_points(group="opentelemetry_traces_exporter")})
        )
        raise NoExporter(
            f"there is no exporter {name!r} here, but {known}; install its package, or set OTEL_TRACES_EXPORTER"
        )
    return found[0].load()()  # type: ignore[no-any-return]  # an entry point may be anything
