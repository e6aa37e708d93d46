"""A process that shares calls with others, for the tests of single flight.

``python -m tests.faults.flights URL LEASE_S KEY ...`` writes each event as a line.  At the first
line that it reads, it begins a flight for each key.  At the second, it makes its own calls, and
waits for those of other processes."""

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
"""Timeout of Redis.  The 0.1 s of `Store.from_url` would report an outage on a busy machine."""


def ended(calls: SingleFlight, store: Store, flight: Flight) -> str:
    """Return the value of a call, made by another process or by this one.

    A call of this process is added to the list MADE in Redis."""
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
    """Begin the flights of all keys at once, in random order."""
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
