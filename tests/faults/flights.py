"""A process that asks for calls of others, too: ``python -m tests.faults.flights URL LEASE_S KEY
...``, for the tests of single flight.

It writes what happens to it line by line.  It begins whatever the keys say at the first line it
reads, and goes on from there at the second: it makes the calls that are its own, and waits for
those of others."""

from __future__ import annotations

import json
import os
import random
import sys
import time

from resilience.single_flight import Flight, SingleFlight
from resilience.store import Store

NAMESPACE, MADE = "flights", "flights:made"
PATIENCE_S = 5.0
"""More than the 0.1 s of `Store.from_url`: on a busy machine a process that waits for its turn
would take Redis for away.
"""


def ended(calls: SingleFlight, store: Store, flight: Flight) -> str:
    """Return the value of a call: made by us, and noted, or by others."""
    while flight.state == "others":
        time.sleep(flight.wait_s)
        flight = calls.look(flight)
    if flight.state == "landed":
        return flight.value.decode()
    store.client.rpush(MADE, flight.key)
    value = f"{flight.key}/{os.getpid()}"
    calls.land(flight, value.encode())
    return value


def main(url: str, lease_s: str, *keys: str) -> None:
    """Ask for all keys at once, in an order of our own."""
    store = Store.from_url(url, namespace=NAMESPACE, timeout_s=PATIENCE_S)
    calls = SingleFlight("llm", store, lease_s=float(lease_s))
    store.check()
    print("ready", flush=True)
    sys.stdin.readline()
    flights = [calls.begin(key) for key in random.sample(keys, len(keys))]
    print("began", *(each.key for each in flights if each.state == "mine"), flush=True)
    if sys.stdin.readline():  # otherwise the test is gone
        values = {
            each.key: ended(calls, store, each)
            for each in sorted(flights, key=lambda each: each.state)
        }
        print("done", json.dumps(values, separators=(",", ":")), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
