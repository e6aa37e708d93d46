"""The registry of operations: functions for items, with their merge, options and guards.

Users register with `operation`; clients and workers find operations by name (`get`), and the engine
calls them.  Begin with `operation`, then `Operation`.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Unpack, overload

from celery.utils.imports import import_from_cwd

from resilience.errors import refuse_unless_name
from resilience.validation import nearest
from rlm_tasks.errors import InvalidRequest, UnknownOperation
from rlm_tasks.operations import ports
from rlm_tasks.operations.context import Context
from rlm_tasks.operations.protection import UNPROTECTED, Protection, protection

if TYPE_CHECKING:
    from resilience.breaker_storage import BreakerConfig
    from resilience.bucket import Rate
    from resilience.bulkhead import Aimd, Elastic
    from resilience.retry import RetryPolicy
    from rlm_tasks.jobs.rounds import Round
    from rlm_tasks.jobs.spec import JobSpec
    from rlm_tasks.operations.ports import CallGuards, Forecast, SubmittedJob
    from rlm_tasks.requests import JobRequest, OperationFields
    from rlm_tasks.settings.model import Settings
    from scheduler.allocation import ResourceAllocationPolicy

logger = logging.getLogger(__name__)

_PROTECTING = frozenset(each.name for each in fields(Protection))
_OPTIONS = _PROTECTING | {
    *("merge", "finalize", "validate", "batch", "concurrency", "version", "simplified"),
    *("allocation", "then", "prepare", "gate", "forecast"),
}
_FUNCTIONS = ("merge", "finalize", "validate", "simplified", "then", "cost", "fallback")

_NEVER_ASYNC = ("merge", "finalize", "validate", "then", "cost", "weight")


@dataclass(frozen=True, slots=True)
class Operation:
    """A registered function with its merge, options and guards.

    Tests and scripts may call it as the plain function.
    """

    name: str
    function: Callable[..., Any]
    merge: Callable[[Iterable[Any]], Any] | None = None
    finalize: Callable[[Any], Any] | None = None
    validate: Callable[[Any], Any] | None = None
    batch: bool = False
    concurrency: int = 1
    version: int = 1
    simplified: Callable[..., Any] | None = None
    allocation: ResourceAllocationPolicy | None = None
    protection: Protection = UNPROTECTED
    then: Callable[[Any, Round], Any] | None = None
    prepare: Callable[[JobRequest, Settings], JobRequest] | None = None
    """Fills in a request before it is stored, or refuses it."""
    gate: Callable[[Any, Operation, JobSpec], CallGuards] | None = None
    """Makes guards that are chosen for each item."""
    forecast: Forecast | None = None  # the calls to models that its rounds need
    is_async: bool = field(init=False)
    takes_context: bool = field(init=False)
    _arity: dict[int, tuple[Callable[..., Any], bool]] = field(
        init=False, repr=False, compare=False
    )
    """Its other functions by their ids, and whether each takes a context."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "is_async", _is_async(self.function))
        object.__setattr__(self, "takes_context", _positional(self.function) >= 2)
        object.__setattr__(self, "_arity", {})
        for other in (self.simplified, self.protection.cost, self.protection.fallback):
            if other is not None:
                self._takes_context(other)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(*args, **kwargs)

    def apply(self, value: Any, context: Context) -> Any:
        """Call the function with an item (or a batch), and the context if it takes one.

        From critical pressure on, its simplified function is called instead, if there is one.
        """
        if self.simplified is not None and context.degradation.simplified:
            return self.with_context(self.simplified, value, context)
        return self.function(value, context) if self.takes_context else self.function(value)

    def with_context(self, function: Callable[..., Any], value: Any, context: Context) -> Any:
        """Call another function of this operation, such as its fallback, in the same way."""
        return function(value, context) if self._takes_context(function) else function(value)

    def _takes_context(self, function: Callable[..., Any]) -> bool:
        """Whether a function takes a context; its signature is read once, not for each item."""
        if (known := self._arity.get(id(function))) is None:
            known = self._arity[id(function)] = function, _positional(function) >= 2
        return known[1]

    def combine(self, outputs: Iterable[Any]) -> Any:
        """Return one partial for outputs or partials in item order; a list without a merge."""
        if self.merge is not None:
            return self.merge(outputs)
        return outputs if isinstance(outputs, list) else list(outputs)

    def shaped(self, partial: Any) -> Any:
        """Return the job's answer for its last partial."""
        return self.finalize(partial) if self.finalize else partial

    def submit(self, items: Any, **fields: Unpack[OperationFields]) -> SubmittedJob:
        """Open a job of this operation with the default client; `fields` as in `Client.submit`.

        ``word_count.submit(lines, priority="high")``.  Raises InvalidRequest, StoreUnavailable.
        """
        if (other := fields.get("operation")) is not None:
            raise InvalidRequest("operation", other, f"is {self.name!r} here; leave it out")
        return ports.submit(operation=self.name, items=items, **fields)


def _is_async(function: Any) -> bool:
    """Whether a function, or an object that is called as one, is an ``async def``."""
    call = getattr(type(function), "__call__", None)  # noqa: B004  # its kind is asked, too
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(call)


def _positional(function: Callable[..., Any]) -> int:
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    try:
        parameters = inspect.signature(function).parameters.values()
    except ValueError:  # some builtins have no signature; they receive the item only
        return 1
    return sum(
        1 for each in parameters if each.kind in kinds and each.default is inspect.Parameter.empty
    )


_registry: dict[str, Operation] = {}
_declared: list[Callable[[Settings], Iterable[Protection]]] = []
_imported: set[str] = set()
"""The modules of RLM_OPERATIONS that this process has imported."""


@overload
def operation(name: Callable[..., Any], /) -> Operation: ...
@overload
def operation(
    name: str | None = None,
    *,
    merge: Callable[[Iterable[Any]], Any] | None = None,
    finalize: Callable[[Any], Any] | None = None,
    validate: Callable[[Any], Any] | None = None,
    batch: bool = False,
    concurrency: int = 1,
    version: int = 1,
    simplified: Callable[..., Any] | None = None,
    allocation: ResourceAllocationPolicy | Mapping[str, Any] | None = None,
    then: Callable[[Any, Round], Any] | None = None,
    service: str = "",
    breaker: BreakerConfig | str | bool | None = None,
    rate_limit: Rate | Mapping[str, Rate] | None = None,
    cost: Callable[..., Mapping[str, float]] | None = None,
    bulkhead: float | str | Aimd | Elastic | None = None,
    per_host: float | None = None,
    weight: float | Callable[..., float] = 1.0,
    retry: RetryPolicy | Mapping[str, Any] | int | None = None,
    fallback: Callable[..., Any] | None = None,
    timeout_s: float | None = None,
) -> Callable[[Callable[..., Any]], Operation]: ...
def operation(name: Any = None, **about: Any) -> Any:
    """Register a function as an operation; use it with or without options.

    The function takes an item, and the `Context` if it has a second parameter without a default.
    An ``async def`` keeps up to ``concurrency`` items in flight.

    - ``batch=True``: the function takes a list of items.  It returns one partial or, without a
      merge, a list with one output per item.
    - ``merge`` takes an iterable of partials in item order and returns one partial.  It must be
      associative.
    - ``validate`` raises, or returns False, for an item that must not be processed.
    - ``simplified`` replaces the function from critical pressure on; it takes and returns the same.
    - ``allocation`` limits the number of nodes that run at once, and their hosts: a
      ResourceAllocationPolicy, or its fields.
    - ``then`` takes the answer of a round and a `Round`.  It returns the job's answer, or a
      `NextRound` with the items of the next round (docs/guide.md, Rounds).

    The other options are guards.  All workers share them, under the name of the ``service`` (by
    default the operation's).  An item that waits for a guard costs no attempt and no slot; the rest
    of its node comes back when it is due.

    - ``breaker``: a preset's name, a BreakerConfig, or True.
    - ``rate_limit``: a Rate of requests, or several by name; ``cost`` computes the amounts that a
      call takes, from the item and the context.
    - ``bulkhead``: calls in flight; ``per_host``: calls in flight on one host.  ``weight``: the
      part of the bulkhead that a call takes, a number or a function of the item and the context.
    - ``retry``: attempts, or a RetryPolicy.
    - ``fallback``: a function that is called while the breaker is open, and when the retries of an
      item are used up.
    - ``timeout_s``: the time limit of one item.
    """
    if callable(name):
        return register(Operation(getattr(name, "__name__", "operation"), name))

    def decorate(function: Callable[..., Any]) -> Operation:
        known = getattr(function, "__name__", "operation") if name is None else name
        _check_options(known, function, about)
        own = {field: value for field, value in about.items() if field not in _PROTECTING}
        if isinstance(own.get("allocation"), Mapping):
            from scheduler.allocation import ResourceAllocationPolicy

            own["allocation"] = ResourceAllocationPolicy(
                **{"executor_id": known, **own["allocation"]}
            )
        guards = protection(known, {field: about[field] for field in _PROTECTING & set(about)})
        return register(Operation(known, function, **own, protection=guards))

    return decorate


def register(new: Operation) -> Operation:
    """Register an operation in this process.

    Raises InvalidRequest for options that contradict each other.
    """
    if new.concurrency > 1 and not new.is_async:
        raise InvalidRequest(
            "concurrency",
            new.concurrency,
            "above 1 needs an async def; leave it out for a plain def",
        )
    if new.batch and new.is_async:
        raise InvalidRequest("batch", new.name, "an async def takes one item; remove batch")
    if not new.is_async and _is_async(new.protection.fallback):
        raise InvalidRequest(
            "fallback", new.name, "is an async def, but the operation is not; make it a plain def"
        )
    if new.simplified is not None and _is_async(new.simplified) != new.is_async:
        raise InvalidRequest(
            "simplified", new.name, "must be an async def if the operation is one, and only then"
        )
    _tell_replaced(new)
    _registry[new.name] = new
    return new


def _tell_replaced(new: Operation) -> None:
    """Warn of a second module with an operation of the same name: which one runs is chance."""
    if (known := _registry.get(new.name)) is None:
        return
    before, now = (getattr(each.function, "__module__", "") for each in (known, new))
    if before != now and not str(before).startswith("rlm_tasks."):  # built-in ones may be replaced
        logger.warning(
            "Operation %r of module %s replaces that of module %s; give one of them another name",
            new.name,
            now,
            before,
        )


def _check_options(name: object, function: object, about: Mapping[str, Any]) -> None:
    """Raise InvalidRequest for an option of the wrong kind, which would fail each job."""
    refuse_unless_name("name", name, InvalidRequest)
    for option in about.keys() - _OPTIONS:
        raise InvalidRequest(option, about[option], _unknown_option(str(name), option))
    for option, value in {"function": function, **about}.items():
        may_be_left_out = option in _FUNCTIONS and value is None
        if option in ("function", *_FUNCTIONS) and not may_be_left_out and not callable(value):
            raise InvalidRequest(option, value, "must be a function")
        if option in _NEVER_ASYNC and _is_async(value):
            raise InvalidRequest(option, value, "must be a plain function, not an async def")
        if option == "batch" and not isinstance(value, bool):
            raise InvalidRequest(option, value, "must be True or False")
        if option in ("concurrency", "version") and (type(value) is not int or value < 1):
            raise InvalidRequest(option, value, "must be a whole number of at least 1")


def _unknown_option(name: str, option: str) -> str:
    """Return the advice for an option that `operation` does not have."""
    from rlm_tasks.requests import JobRequest

    if near := nearest(option, _OPTIONS):
        return f"unknown option of operation {name!r}; did you mean {near!r}?"
    if option in JobRequest.known_fields():
        return f"belongs to a request; write {name}.submit(items, {option}=...)"
    return f"unknown option of operation {name!r}; it has {', '.join(sorted(_OPTIONS))}"


def get(name: str) -> Operation:
    """Return an operation.  Raises UnknownOperation, which names the nearest known one."""
    try:
        return _registry[name]
    except KeyError:
        raise UnknownOperation(name, _registry) from None


def names() -> list[str]:
    """Return the names of all registered operations, sorted."""
    return sorted(_registry)


def modules() -> frozenset[str]:
    """Return the modules of RLM_OPERATIONS, and those of functions that are operations here."""
    return frozenset(
        _imported | {getattr(each.function, "__module__", "") for each in _registry.values()}
    )


def versions() -> dict[str, int]:
    """Return the version of each registered operation, by name."""
    return {name: _registry[name].version for name in names()}


def services() -> dict[str, str]:
    """Return operation -> service of those whose guards have a name of their own."""
    named = {name: _registry[name].protection.service or name for name in names()}
    return {name: service for name, service in named.items() if service != name}


def declare_protections(source: Callable[[Settings], Iterable[Protection]]) -> None:
    """Add protections that no operation declares, such as those of models; `source` yields them."""
    _declared.append(source)


def protections(settings: Settings) -> Iterator[Protection]:
    """Yield the guards of this process's operations, and those of models."""
    yield from (_registry[name].protection for name in names())
    for source in _declared:
        yield from source(settings)


def import_operations(modules: Sequence[str]) -> None:
    """Import the built-in operations and the user's modules.

    The current folder is searched too, as Celery does for tasks.  Raises InvalidRequest for a
    missing module.
    """
    own = ["rlm_tasks.operations.builtin", "rlm_tasks.llm.protections"]
    if find_spec("openai"):
        own.append("rlm_tasks.llm.operations")
    for module in (*own, *modules):
        try:
            import_from_cwd(module)
        except ModuleNotFoundError as error:
            if error.name and module.startswith(error.name):
                raise InvalidRequest(
                    "RLM_OPERATIONS",
                    module,
                    "no such module on the import path; correct it, or set PYTHONPATH",
                ) from None
            raise
    _imported.update(modules)
