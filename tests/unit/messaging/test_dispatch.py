"""Sending the nodes of a large cut, while other workers sweep and run the first of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest

from resilience.keys import Keys
from rlm_tasks.jobs.spec import JobSpec
from rlm_tasks.jobs.splitting import Shape
from rlm_tasks.jobs.stored_items import RangeSource
from rlm_tasks.ledger.ledger import Ledger
from rlm_tasks.ledger.records import ROOT, Child, Report
from rlm_tasks.messaging.dispatch import Dispatcher
from rlm_tasks.settings.sections import LedgerSettings
from tests.unit.world import World, world

__all__ = ["world"]
CHILDREN, GRACE_S, SEND_S = 2000, 1.0, 0.002
"""The cut needs four graces to be sent."""


class Crash(Exception):
    """The death of the sender."""


class SlowBroker:
    """An app whose broker needs a time for each message, in which others act."""

    def __init__(self, world: World, meanwhile: Callable[[int], None]) -> None:
        self._world, self._meanwhile = world, meanwhile
        self.sent: list[str] = []
        producer = SimpleNamespace(
            connection=SimpleNamespace(connected=True), revive=lambda _: None, batch=self._batch
        )
        self.producer_pool = SimpleNamespace(acquire=lambda **_: self._lent(producer))

    @contextmanager
    def _lent(self, producer: Any) -> Iterator[Any]:
        yield producer

    @contextmanager
    def _batch(self, _size: int) -> Iterator[None]:
        yield

    def send_task(self, _name: str, args: list[str], **_: Any) -> None:
        """Take a message."""
        self.sent.append(args[1])
        self._world.sleep(SEND_S)
        self._meanwhile(len(self.sent))


class Cut:
    """A job whose root was cut into many children, and a worker that runs and sweeps meanwhile."""

    def __init__(self, world: World, *, dies_after: int = CHILDREN + 1, runs: bool = True) -> None:
        settings = LedgerSettings(sweep_s=GRACE_S, lease_s=100.0)
        self.ledger = Ledger(world.store(), Keys("unit"), settings)
        self.other = Ledger(world.store(), Keys("unit"), settings)
        self.spec = JobSpec("job", "sum", RangeSource(0, 1), CHILDREN, Shape("flat"), "queue")
        self.ledger.open([(self.spec, "none")], 60)
        claim = self.ledger.claim("job", ROOT, "mine", "w")
        kids = [Child(f"n{i}", i, i + 1, 1, "", 0, f"t{i}", "") for i in range(CHILDREN)]
        self.ledger.finish(claim, Report(mid=0, kids=kids), b"")
        self.copies: list[str] = []
        self._dies_after, self._runs, self._ran = dies_after, runs, 0
        self.broker = SlowBroker(world, self._meanwhile)
        self.dispatcher = Dispatcher(self.broker, self.ledger)  # type: ignore[arg-type]  # the part of an app that is used
        self.kids = kids

    def _meanwhile(self, sent: int) -> None:
        if sent >= self._dies_after:
            raise Crash
        if self._runs and sent % 10 == 0:
            # A child is cut again, so that messages sent later than the cut arrive before its end.
            kid = self.kids[self._ran]
            claim = self.other.claim("job", kid.id, kid.id, "other")
            again = Child(f"again{self._ran}", kid.lo, kid.hi, 1, "", 0, "t", "")
            self.other.finish(claim, Report(mid=kid.lo, kids=[again]), b"")
            self.other.claim("job", again.id, again.id, "other")
            self._ran += 1
        if sent % 50 == 0:
            self.copies += self.other.sweep("job").send

    def send(self) -> None:
        """Send the children."""
        self.dispatcher.send_children(self.spec, self.kids, [], merges=False)


@pytest.mark.parametrize("runs", [True, False], ids=["workers run the first", "workers are busy"])
def test_a_sweep_sends_no_copies_while_a_large_cut_is_being_sent(world: World, runs: bool) -> None:
    cut = Cut(world, runs=runs)
    marks = cut.ledger.sending
    marked: list[int] = []
    cut.ledger.sending = lambda job, ids: (marked.append(len(ids)), marks(job, ids))[1]  # type: ignore[method-assign,func-returns-value]  # counts what passes

    cut.send()

    assert cut.copies == []
    assert cut.broker.sent == [kid.id for kid in cut.kids], "each message once"
    assert len(marked) <= 5 * CHILDREN * SEND_S / GRACE_S


def test_the_rest_of_a_cut_whose_sender_died_is_found_within_two_graces(world: World) -> None:
    cut = Cut(world, dies_after=CHILDREN // 2, runs=False)
    with pytest.raises(Crash):
        cut.send()

    world.sleep(GRACE_S)
    assert cut.other.sweep("job").send == ("n0",), "the oldest is probed"


def test_a_small_cut_is_sent_without_a_mark(world: World) -> None:
    cut = Cut(world, runs=False)
    cut.kids = cut.kids[:100]
    cut.ledger.sending = lambda *_: pytest.fail("no mark was needed")  # type: ignore[method-assign,assignment]  # must not be called

    cut.send()

    assert len(cut.broker.sent) == 100
