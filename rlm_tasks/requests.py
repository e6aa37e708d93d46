"""The request of a job: its fields, their defaults and their checks.

Users and the command line make requests; submission turns them into a `JobSpec`.  A mistake raises
InvalidRequest before anything is enqueued.  Field names are snake_case; camelCase names, as other
orchestrators have them, are accepted as aliases.  Begin with `JobRequest`.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Callable, Mapping
from datetime import timedelta
from enum import StrEnum
from typing import TYPE_CHECKING, Any, Literal, Protocol, Required, Self, TypedDict, Unpack

from pydantic import Field, ValidationInfo, field_validator, model_validator
from pydantic.alias_generators import to_snake

from resilience.validation import Checked, nearest
from rlm_tasks.errors import InvalidRequest
from rlm_tasks.jobs import codec
from rlm_tasks.jobs.items import MOST_ITEMS
from rlm_tasks.jobs.splitting import Shape
from rlm_tasks.jobs.storable import NO_TEXT, NotStorable, is_text
from rlm_tasks.metrics import emission

DEFAULT_MIN_CHUNK = 100
"""Items of the smallest part of a planned binary or n-way tree, unless `min_chunk_size` is set."""


_TRACEPARENT = re.compile("[0-9a-f]{2}-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})(?:-.*)?")


class Priority(StrEnum):
    """Urgency of a job; each level has its own queue."""

    CRITICAL = "critical"
    HIGH = "high"
    NORMAL = "normal"
    LOW = "low"


COMPLEXITIES = ("simple", "medium", "complex", "very_complex", "linear", "quadratic")
"""Words for how hard an item is; the last two come from other orchestrators."""
LONGEST_S = 10 * 365 * 86_400
"""Seconds of the longest time limit and of the longest cache."""


class _Checked(Checked):
    invalid = InvalidRequest

    @classmethod
    def _unknown(cls, name: str) -> str:
        """Return the advice for an unknown field, which may belong to another part of a request."""
        snake = to_snake(name)
        others = {
            field: place.format(field)
            for model, place in reversed(_PLACES.items())
            if model is not cls
            for field in model.own_fields()
        }
        if snake in others:
            return others[snake]
        if near := nearest(name, cls.known_fields()):
            return f"unknown field; did you mean {near!r}?"
        if near := nearest(name, others):
            return f"unknown field; did you mean {near!r}? It {others[near]}"
        return f"{super()._unknown(name)}; params has the parameters of an operation"

    @classmethod
    def own_fields(cls) -> list[str]:
        """Return the names that the record itself accepts."""
        return list(cls.model_fields)

    @classmethod
    def known_fields(cls) -> list[str]:
        """Return the names of the fields, as an error lists them."""
        return cls.own_fields()


class Binary(_Checked):
    """Halve a range until its parts are small."""

    min_chunk_size: int | None = Field(
        default=None,
        ge=1,
        le=MOST_ITEMS,
        description="Items of the smallest part; if set, the tree is cut as planned.",
    )
    max_depth: int = Field(default=10, ge=1, le=64, description="Most levels of the tree.")


class NWay(_Checked):
    """Cut a range into `split_factor` parts, and each part again."""

    split_factor: int = Field(default=8, ge=2, le=1000, description="Parts of one cut.")
    min_chunk_size: int | None = Field(
        default=None,
        ge=1,
        le=MOST_ITEMS,
        description="Items of the smallest part; if set, the tree is cut as planned.",
    )
    max_depth: int = Field(default=10, ge=1, le=64, description="Most levels of the tree.")


class Adaptive(_Checked):
    """Fan out for the live slots, then cut where a free slot wants work."""

    min_chunk_size: int = Field(
        default=1, ge=1, le=MOST_ITEMS, description="Items of the smallest part."
    )
    max_chunk_size: int | None = Field(
        default=None, ge=1, le=MOST_ITEMS, description="Items of the largest node."
    )
    target_execution_time_ms: float | None = Field(
        default=None, gt=0, description="A node hands over its rest after this running time."
    )
    max_depth: int = Field(default=10, ge=1, le=64, description="Most levels of the tree.")
    branching_factor: int = Field(default=4, ge=2, le=1000, description="Most children of one cut.")

    @model_validator(mode="after")
    def _sizes_agree(self) -> Self:
        if self.max_chunk_size is not None and self.min_chunk_size > self.max_chunk_size:
            raise InvalidRequest(
                "min_chunk_size",
                self.min_chunk_size,
                f"must not exceed max_chunk_size={self.max_chunk_size}",
            )
        return self


Strategy = Binary | NWay | Adaptive
STRATEGIES: dict[str, type[Strategy]] = {"binary": Binary, "n_way": NWay, "adaptive": Adaptive}


class TraceContext(_Checked):
    """The trace that a job is part of; leading zeros of its ids may be left out."""

    trace_id: str = Field(description="1 to 32 hex digits.")
    parent_span_id: str = Field(default="", description="The parent span of the job; empty: none.")
    sampled: bool = Field(default=True, description="Whether its spans are kept.")

    @field_validator("trace_id", "parent_span_id")
    @classmethod
    def _is_hex(cls, value: str, info: ValidationInfo) -> str:
        most = 32 if info.field_name == "trace_id" else 16
        if not re.fullmatch(f"[0-9a-fA-F]{{0,{most}}}", value) or (
            most == 32 and not value.strip("0")
        ):
            raise InvalidRequest(
                str(info.field_name),
                value,
                f"must be 1 to {most} hex digits, as in W3C Trace Context",
            )
        return value

    @property
    def traceparent(self) -> str:
        """The header `traceparent` of W3C Trace Context."""
        trace_id, span_id = self.trace_id.lower(), self.parent_span_id.lower()
        return f"00-{trace_id:0>32}-{span_id:0>16}-{int(self.sampled):02x}"


LONGEST_QUEUE_TIMEOUT_S = 30 * 86_400
"""An open job is kept for this long without a worker."""


class _OptionFields(TypedDict, total=False):
    priority: Priority | Literal["critical", "high", "normal", "low"]
    timeout_ms: float | None
    queue_timeout: float | timedelta | Literal["priority"] | None
    max_depth: int | None
    continue_on_error: bool
    error_threshold: float | None
    preempt_lower_priority: bool | None
    overload: Literal["refuse", "delay"] | None
    emit_metrics: Mapping[str, float | str]
    budget: Budget | Mapping[str, float] | None
    cache_results: bool
    cache_ttl_seconds: float
    idempotency_key: str
    trace_context: TraceContext | Mapping[str, Any] | str | None


class OptionFields(_OptionFields, total=False):
    """The fields of `Options` with the types that its constructor takes."""

    timeout: float | timedelta


class Options(_Checked):
    """How a job runs; independent of its operation and items."""

    if TYPE_CHECKING:

        def __init__(self, **fields: Unpack[OptionFields]) -> None: ...

    priority: Priority = Field(default=Priority.NORMAL, description="Its urgency, also as a text.")
    timeout_ms: float | None = Field(
        default=None,
        gt=0,
        le=LONGEST_S * 1000,
        description="The job ends as `expired` after this time. Also as `timeout`, in seconds or "
        "as a timedelta.",
    )
    queue_timeout: float | Literal["priority"] | None = Field(
        default=None,
        description="The job ends as `expired` if no worker begins it within these seconds; also a "
        "timedelta. `priority`: 10 s for high, 30 s for normal and 60 s for low jobs.",
    )
    max_depth: int | None = Field(
        default=None,
        ge=1,
        le=64,
        description="Most levels of the tree; empty: the strategy's value.",
    )
    continue_on_error: bool = Field(
        default=False, description="Failed items do not end the job; its result lists them."
    )
    error_threshold: float | None = Field(
        default=None,
        ge=0,
        le=1,
        description="The job fails when more than this share of items fails.",
    )
    preempt_lower_priority: bool | None = Field(
        default=None,
        description="Running nodes of less urgent jobs yield their slots to this job; empty: only "
        "if it is critical.",
    )
    overload: Literal["refuse", "delay"] | None = Field(
        default=None,
        description="Under overload, refuse the job or let it wait; empty: "
        "RLM_ADMISSION__OVERLOAD.",
    )
    emit_metrics: dict[str, float | str] = Field(
        default_factory=dict,
        description="Amounts for declared counters, and texts for their labels; counted when the "
        "job succeeds.",
    )
    budget: Budget | None = Field(
        default=None, description="Limits on calls to models; empty: calls are only counted."
    )
    cache_results: bool = Field(
        default=False,
        description="Keep answers of models, and use those that other jobs have kept.",
    )
    cache_ttl_seconds: float = Field(
        default=3600.0, gt=0, le=LONGEST_S, description="How long answers of models are kept."
    )
    idempotency_key: str = Field(
        default="", max_length=512, description="Two submissions with one key open one job."
    )
    trace_context: TraceContext | None = Field(
        default=None,
        description="The trace that the job is part of; also as a `traceparent`. Empty: the trace "
        "of the submitting thread.",
    )

    @classmethod
    def own_fields(cls) -> list[str]:
        """Return the names of all fields, with that of the time limit in seconds."""
        first, *others = cls.model_fields
        return [first, "timeout", *others]

    def preempts(self, priority: str) -> bool:
        """Return whether nodes of less urgent jobs yield to this job.

        `priority` is the job's, which its operation may have raised above the request's.
        """
        return (
            priority == Priority.CRITICAL
            if self.preempt_lower_priority is None
            else self.preempt_lower_priority
        )

    @model_validator(mode="before")
    @classmethod
    def _timeout_in_seconds(cls, fields: Any) -> Any:
        """Accept ``timeout``, in seconds or as a timedelta, in place of ``timeout_ms``."""
        if isinstance(fields, dict) and "timeout" in fields:
            timeout = fields["timeout"]
            seconds = timeout.total_seconds() if isinstance(timeout, timedelta) else timeout
            if not isinstance(seconds, int | float) or isinstance(seconds, bool):
                raise InvalidRequest("timeout", timeout, "must be seconds or a timedelta")
            if not 0 < seconds <= LONGEST_S:
                advice = f"must be above 0 s and at most {LONGEST_S} s, ten years"
                raise InvalidRequest("timeout", timeout, advice)
            fields = {**cls.renamed(fields, "timeout", "timeout_ms"), "timeout_ms": seconds * 1000}
        return fields

    @field_validator("queue_timeout", mode="before")
    @classmethod
    def _queue_timeout_in_seconds(cls, value: Any) -> Any:
        seconds = value.total_seconds() if isinstance(value, timedelta) else value
        if seconds is None or seconds == "priority":
            return seconds
        if not isinstance(seconds, int | float) or isinstance(seconds, bool):
            raise InvalidRequest(
                "queue_timeout", value, "must be seconds, a timedelta or the text priority"
            )
        if not 0.001 <= seconds <= LONGEST_QUEUE_TIMEOUT_S:
            raise InvalidRequest(
                "queue_timeout", value, f"must be from 0.001 to {LONGEST_QUEUE_TIMEOUT_S:,} seconds"
            )
        return seconds

    @field_validator("trace_context", mode="before")
    @classmethod
    def _traceparent(cls, value: Any) -> Any:
        """Accept the text of a header ``traceparent``."""
        if not isinstance(value, str):
            return value
        if (header := _TRACEPARENT.fullmatch(value.strip())) is None:
            raise InvalidRequest(
                "trace_context",
                value,
                "must be a traceparent (00-<32 hex>-<16 hex>-<2 hex>), or its ids",
            )
        return TraceContext(
            trace_id=header[1], parent_span_id=header[2], sampled=bool(int(header[3], 16) & 1)
        )

    @field_validator("emit_metrics", mode="before")
    @classmethod
    def _finite(cls, value: Any) -> Any:
        for name, amount in value.items() if isinstance(value, Mapping) else ():
            if isinstance(amount, float) and not math.isfinite(amount):
                raise InvalidRequest(f"emit_metrics.{name}", amount, "must be a finite number")
            if not is_text(f"{name}{amount if isinstance(amount, str) else ''}"):
                raise InvalidRequest("emit_metrics", name, NO_TEXT)
        return value

    @field_validator("emit_metrics")
    @classmethod
    def _declared(cls, value: dict[str, float | str]) -> dict[str, float | str]:
        emission.emission(value)
        return value

    @field_validator("priority", mode="before")
    @classmethod
    def _known_priority(cls, value: Any) -> Any:
        if value not in list(Priority):
            raise InvalidRequest("priority", value, f"must be one of {', '.join(Priority)}")
        return value

    @model_validator(mode="after")
    def _threshold_needs_patience(self) -> Self:
        if self.error_threshold is not None and not self.continue_on_error:
            raise InvalidRequest(
                "error_threshold", self.error_threshold, "needs continue_on_error=True"
            )
        return self


class Budget(_Checked):
    """The most that a job and its rounds may spend in all; an empty field sets no limit."""

    tokens: float | None = Field(
        default=None, gt=0, description="Tokens of prompts and answers together."
    )
    money: float | None = Field(
        default=None,
        gt=0,
        description="Money by the prices of `RLM_LLM__MODELS`, in their currency.",
    )
    calls: float | None = Field(
        default=None, ge=1, description="Calls to providers, repeated ones too."
    )

    @property
    def limits(self) -> dict[str, float]:
        """The limited units, each with its limit."""
        return {unit: float(amount) for unit, amount in self if amount is not None}


class Conditions(_Checked):
    """Rules about the items that run."""

    skip_if_empty: bool = Field(
        default=False,
        description="Skip items that are None, or an empty text, list, tuple, dict or set, "
        "and a job without items.",
    )
    validate_before_process: bool = Field(
        default=False, description="Run the operation's validate on every item first."
    )
    early_termination_threshold: float | None = Field(
        default=None, gt=0, le=1, description="The job ends once this share of items is done."
    )


class RegisteredOperation(Protocol):
    """An object that `@operation` returns; a request accepts it in place of its name."""

    @property
    def name(self) -> str:
        """The registered name."""

    @property
    def function(self) -> Callable[..., Any]:
        """The function of one item."""

    def submit(self, items: Any, /) -> object:
        """Open a job of this operation."""


class ConditionFields(TypedDict, total=False):
    """The fields of `Conditions`."""

    skip_if_empty: bool
    validate_before_process: bool
    early_termination_threshold: float | None


class _JobFields(TypedDict, total=False):
    type: Literal["sequential", "parallel", "recursive"] | None
    strategy: Strategy | Literal["binary", "n_way", "adaptive"] | None
    chunk_size: int | None
    params: Mapping[str, Any]
    options: Options | Mapping[str, Any]
    conditions: Conditions | Mapping[str, Any]
    description: str
    complexity: str
    estimated_duration_s: float


class JobFields(_JobFields):
    """The fields of `JobRequest` with the types that its constructor takes."""

    operation: Required[str | RegisteredOperation]
    items: Required[Any]


class OperationFields(_JobFields, OptionFields, ConditionFields, total=False):
    """The fields of a request of one operation: all but its operation and its items."""


class RequestFields(_JobFields, _OptionFields, ConditionFields, total=False):
    """The fields of a request, with those of its options and conditions, but no `timeout`.

    `Client.execute` has a `timeout` of its own: the time to wait.
    """

    operation: str | RegisteredOperation
    items: Any
    input: Any


class SubmitFields(RequestFields, total=False):
    """The fields of a request, with those of its options and conditions."""

    timeout: float | timedelta


class JobRequest(_Checked):
    """One job: items, an operation, and how it runs."""

    if TYPE_CHECKING:

        def __init__(self, **fields: Unpack[JobFields]) -> None: ...

    operation: str = Field(min_length=1, description="The registered name of the operation.")
    items: Any = Field(
        description="A range, `Lines`, `Files`, or any iterable of plain data, which is stored."
    )
    type: Literal["sequential", "parallel", "recursive"] | None = Field(
        default=None,
        description="Empty: `parallel` if there is a chunk size, else `recursive`.",
    )
    strategy: Strategy | None = Field(
        default=None,
        description="`Binary`, `NWay` or `Adaptive`, also by name (`binary`, `n_way`, "
        "`adaptive`); empty: `Binary`.",
    )
    chunk_size: int | None = Field(
        default=None, ge=1, le=MOST_ITEMS, description="Items per node of a parallel job."
    )
    params: dict[str, Any] = Field(
        default_factory=dict, description="Passed to the operation as ctx.params."
    )
    options: Options = Field(default_factory=Options, description="How the job runs.")
    conditions: Conditions = Field(
        default_factory=Conditions, description="Rules about the items that run."
    )
    description: str = Field(default="", description="A text for people, shown in lists of jobs.")
    complexity: str = Field(
        default="",
        description="How hard its items are: `simple`, `medium`, `complex` or `very_complex` (also "
        "when empty). `linear` and `quadratic` have the time limit of `very_complex`. See time "
        "limits.",
    )
    estimated_duration_s: float = Field(
        default=0.0,
        ge=0,
        le=LONGEST_S,
        description="Expected time of its longest item; twice this time is always allowed. 0: "
        "unknown. See time limits.",
    )

    @classmethod
    def known_fields(cls) -> list[str]:
        """Return the names of all fields, with those that may stand beside `options`."""
        return [*cls.model_fields, *Options.own_fields(), *Conditions.own_fields(), "input"]

    @field_validator("operation", mode="before")
    @classmethod
    def _name_of_operation(cls, value: Any) -> Any:
        """Accept what `@operation` returns in place of its name."""
        if isinstance(value, str):
            return value
        name = getattr(value, "name", None)
        if isinstance(name, str) and hasattr(value, "function") and hasattr(value, "submit"):
            return name
        shown = getattr(value, "__qualname__", None) or type(value).__qualname__
        advice = "is no operation; decorate a function with @operation, and give it or its name"
        raise InvalidRequest("operation", shown, advice)

    @field_validator("description")
    @classmethod
    def _text(cls, value: str) -> str:
        if not is_text(value):
            raise InvalidRequest("description", value, NO_TEXT)
        return value

    @field_validator("complexity", mode="before")
    @classmethod
    def _known_complexity(cls, value: Any) -> Any:
        if value in ("", None):
            return ""
        if value not in COMPLEXITIES:
            near = difflib.get_close_matches(str(value).lower(), COMPLEXITIES, n=1)
            hint = f"did you mean {near[0]!r}? " if near else ""
            raise InvalidRequest(
                "complexity", value, f"unknown; {hint}It is one of {', '.join(COMPLEXITIES)}"
            )
        return value

    @field_validator("params", mode="before")
    @classmethod
    def _are_named(cls, value: Any) -> Any:
        if not isinstance(value, Mapping):
            raise InvalidRequest("params", value, "must be a dict; its keys are texts")
        return dict(value)

    def check_params(self) -> None:
        """Raise InvalidRequest for params that would not come back as they went.

        The operation has completed the request by now: it may replace a class by its name.
        """
        try:
            codec.encode(self.params)
        except NotStorable as error:
            raise InvalidRequest(f"params{error.where}", error.value, error.why) from None

    @model_validator(mode="before")
    @classmethod
    def _named_strategy(cls, fields: Any) -> Any:
        if not isinstance(fields, dict) or not isinstance(fields.get("strategy"), str):
            return fields
        name = fields["strategy"]
        if name not in STRATEGIES:
            raise InvalidRequest(
                "strategy", name, f"unknown; must be one of {', '.join(STRATEGIES)}"
            )
        return {**fields, "strategy": STRATEGIES[name]()}

    @field_validator("strategy", mode="before")
    @classmethod
    def _known_strategy(cls, value: Any) -> Any:
        if value is not None and not isinstance(value, Binary | NWay | Adaptive):
            raise InvalidRequest(
                "strategy", value, "must be Binary(...), NWay(...) or Adaptive(...)"
            )
        return value

    @model_validator(mode="after")
    def _type_fits(self) -> Self:
        if self.strategy is not None and self.type in ("sequential", "parallel"):
            raise InvalidRequest(
                "strategy", self.strategy, f"a {self.type} job takes none; use type='recursive'"
            )
        if self.chunk_size is not None and (
            self.type in ("sequential", "recursive") or self.strategy is not None
        ):
            raise InvalidRequest(
                "chunk_size",
                self.chunk_size,
                "belongs to type='parallel'; leave out the strategy",
            )
        return self

    @property
    def kind(self) -> str:
        """The type; if it is empty, inferred from the chunk size."""
        return self.type or ("parallel" if self.chunk_size is not None else "recursive")

    def shape(self, default_target_ms: float) -> Shape:
        """Return the strategy with all its sizes; `default_target_ms` where it sets no target."""
        shape = self._shape(default_target_ms)
        if self.options.max_depth is not None and self.kind == "recursive":
            return Shape(
                **{**_fields(shape), "max_depth": min(shape.max_depth, self.options.max_depth)}
            )
        return shape

    def _shape(self, target_ms: float) -> Shape:
        if self.kind == "sequential":
            return Shape("sequential", target_ms=target_ms)
        if self.kind == "parallel":
            exact = self.chunk_size is not None
            return Shape(
                "flat",
                max_chunk=self.chunk_size or 0,
                exact=exact,
                max_depth=1,
                eager=exact,
                target_ms=target_ms,
            )
        match self.strategy:
            case Adaptive() as adaptive:
                return Shape(
                    "flat",
                    adaptive.branching_factor,
                    adaptive.min_chunk_size,
                    max_chunk=adaptive.max_chunk_size or 0,
                    max_depth=adaptive.max_depth,
                    eager=adaptive.max_chunk_size is not None,
                    target_ms=adaptive.target_execution_time_ms or target_ms,
                )
            case NWay() as n_way:
                shape = _planned_tree(
                    n_way.split_factor, n_way.min_chunk_size, n_way.max_depth, target_ms
                )
                return Shape(**{**_fields(shape), "wide": n_way.min_chunk_size is None})
            case Binary() as binary:
                return _planned_tree(2, binary.min_chunk_size, binary.max_depth, target_ms)
            case _:
                return _planned_tree(2, None, 10, target_ms)

    @classmethod
    def parse(cls, request: JobRequest | Mapping[str, Any]) -> JobRequest:
        """Return a request as it is, or make one from a dict in snake_case or camelCase.

        ``input`` may be the items, or a dict of ``items``, ``operation`` and the strategy's sizes.
        Fields of `Options` and `Conditions` may stand beside the others.  Raises InvalidRequest.
        """
        if isinstance(request, JobRequest):
            return request
        if not isinstance(request, Mapping):
            shown = request if isinstance(request, str) else type(request).__qualname__
            advice = "must be a JobRequest or a dict; give an operation as operation=..., items=..."
            raise InvalidRequest("request", shown, advice)
        if odd := [name for name in request if not isinstance(name, str)]:
            raise InvalidRequest("request", odd[0], "is no name of a field; names are texts")
        return cls(**_grouped(_flattened(dict(request))))


def _grouped(fields: dict[str, Any]) -> dict[str, Any]:
    """Return the fields with those of options and conditions moved into their models."""
    grouped = dict(fields)
    for part, model in _PARTS.items():
        names = [name for name in fields if to_snake(name) in model.own_fields()]
        if not names:
            continue
        given = _given(fields.get(part, {}))
        if not isinstance(given, dict):
            raise InvalidRequest(part, given, f"must be {model.__name__}(...), or a dict")
        inside = {_field(name): name for name in given}
        for name in names:
            if (other := inside.get(_field(name))) is not None:
                advice = f"is given twice, also in {part} as {other}; keep one of the two"
                raise InvalidRequest(name, fields[name], advice)
        grouped[part] = model(**given, **{name: grouped.pop(name) for name in names})
    return grouped


def _field(name: Any) -> str:
    """Return the field that a name stands for."""
    return {"timeout": "timeout_ms"}.get(snake := to_snake(str(name)), snake)


def _given(part: Any) -> Any:
    """Return the fields that a dict, or an instance of Options or Conditions, sets."""
    if isinstance(part, _Checked):
        return {name: getattr(part, name) for name in part.model_fields_set}
    return dict(part) if isinstance(part, Mapping) else part


_PARTS: dict[str, type[Options | Conditions]] = {"options": Options, "conditions": Conditions}
"""The parts of a request; their fields may stand beside the others."""
_PLACES: dict[type[_Checked], str] = {
    JobRequest: "belongs to the request; write {}=... beside options",
    Options: "belongs to options; write options=Options({}=...)",
    Conditions: "belongs to conditions; write conditions=Conditions({}=...)",
    Budget: "belongs to the budget; write options=Options(budget=Budget({}=...))",
    Binary: "belongs to a strategy; write strategy=Binary({}=...)",
    NWay: "belongs to a strategy; write strategy=NWay({}=...)",
    Adaptive: "belongs to a strategy; write strategy=Adaptive({}=...)",
    TraceContext: "belongs to the trace; write options=Options(trace_context=TraceContext({}=...))",
}
"""Where a field belongs that is given elsewhere, the likeliest place first."""


def _fields(shape: Shape) -> dict[str, Any]:
    return {name: getattr(shape, name) for name in shape.__struct_fields__}


def _planned_tree(factor: int, min_chunk: int | None, max_depth: int, target_ms: float) -> Shape:
    return Shape(
        "tree",
        factor,
        min_chunk or 1,
        min_chunk or DEFAULT_MIN_CHUNK,
        max_depth=max_depth,
        eager=min_chunk is not None,
        target_ms=target_ms,
    )


def _flattened(fields: dict[str, Any]) -> dict[str, Any]:
    """Return the fields of JobRequest for a dict whose ``input`` holds some of them."""
    if "input" not in fields:
        return fields
    given = fields.pop("input")
    inner = dict(given) if _names_items(given, fields) else {"items": given}
    fields.setdefault("operation", inner.pop("operation", "process"))
    sizes = {
        "n_way": inner.pop("splitFactor", None),
        "planned": inner.pop("decompositionStrategy", None),
        "adaptive": inner.pop("adaptiveSplit", None),
    }
    named = [name for name, value in sizes.items() if value is not None]
    if len(named) > 1:
        raise InvalidRequest("input", sorted(given), "names more than one strategy; keep one")
    if sizes["n_way"] is not None:
        fields["strategy"] = NWay(split_factor=sizes["n_way"])
    elif sizes["planned"] is not None:
        planned = dict(sizes["planned"])
        fields["strategy"] = NWay(
            split_factor=planned.pop("branchingFactor", 2),
            min_chunk_size=planned.pop("minChunkSize", DEFAULT_MIN_CHUNK),
            **planned,
        )
    elif sizes["adaptive"] is not None:
        fields["strategy"] = Adaptive(**sizes["adaptive"])
    overlap = set(inner) & set(fields)
    if overlap:
        raise InvalidRequest("input", sorted(overlap), "given twice, inside and outside of input")
    return {**fields, **inner}


_INPUT = {"operation", "splitFactor", "decompositionStrategy", "adaptiveSplit"}
"""Keys that `input` may have beside its `items`; any field of a request may be a key too."""


def _names_items(given: Any, fields: Mapping[str, Any]) -> bool:
    """Whether `input` has fields of the request; any other dict is one item.

    Raises InvalidRequest for a dict that may be meant as either.
    """
    if not isinstance(given, Mapping) or not given.keys() & {"items", *_INPUT}:
        return False
    known = {*_INPUT, *JobRequest.known_fields()}
    unknown = [name for name in given if to_snake(str(name)) not in known and name not in known]
    if "items" not in given:
        return not unknown and "items" in fields
    if unknown:
        raise InvalidRequest(
            f"input.{unknown[0]}",
            given[unknown[0]],
            "is no field of a request; is the dict one item? Then pass input=[{...}]",
        )
    return True
