"""Ages are measured by the server's clock, whatever the clocks of the machines say."""

from __future__ import annotations

from collections.abc import Callable

from rlm_tasks.ledger.server_clock import ServerClock
from tests.unit.world import World, world

__all__ = ["world"]
HOUR_S = 3600.0


class Machine:
    """A machine whose clock is wrong, and the commands that its store has sent."""

    def __init__(self, world: World, wrong_s: float) -> None:
        self.wrong_s, self.asked = wrong_s, 0
        store = world.store()
        call = store.call

        def counted(*args: Callable[..., object]) -> object:
            self.asked += 1
            return call(*args)

        store.call = counted  # type: ignore[method-assign,assignment]  # counts what passes
        self.clock = ServerClock(store, wall=lambda: world.now + self.wrong_s)


def test_machines_with_wrong_clocks_agree_on_the_time(world: World) -> None:
    machines = [Machine(world, wrong_s) for wrong_s in (-HOUR_S, 0.0, HOUR_S)]
    assert {round(machine.clock(), 3) for machine in machines} == {world.now}
    world.sleep(7.0)
    assert {round(machine.clock(), 3) for machine in machines} == {world.now}
    assert machines[0].clock.now_ms() == int(world.now * 1000)


def test_the_server_is_asked_once_a_minute_and_after_a_jump(world: World) -> None:
    machine = Machine(world, 0.0)
    for _ in range(1000):
        machine.clock()
    assert machine.asked == 1

    machine.wrong_s = HOUR_S
    assert round(machine.clock(), 3) == world.now, "its clock was set, and changes nothing"
    assert machine.asked == 2
    world.sleep(61.0)
    machine.clock()
    assert machine.asked == 3


def test_while_redis_is_away_the_time_goes_on(world: World) -> None:
    from resilience.errors import StoreUnavailable

    store = world.store()
    clock = ServerClock(store, wall=lambda: 5.0)
    before = clock()

    def away(*_: object) -> None:
        raise StoreUnavailable("redis://fake", "cut off by the test")

    store.call = away  # type: ignore[method-assign,assignment]  # the server is away
    world.sleep(100.0)
    assert clock() == before + 100.0
    never = ServerClock(store, wall=lambda: 5.0)
    assert never() == 5.0
