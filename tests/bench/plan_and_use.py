"""Compare plans with the use of the jobs: twelve requests over real texts, in one deployment.

`tests.bench` calls it; begin with `plan_and_use`.  A real worker of two slots calls the fake
provider, which counts tokens about as real models do, and whose answers vary in length.  Each
request runs twice, the second time over other texts.  Nothing asserts."""

from __future__ import annotations

import ast
import random
import re
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from rlm_tasks import Client
from rlm_tasks.operations.code_metrics import python_files, standard_library
from rlm_tasks.testing import embedded, fake_provider
from tests.bench.guards import Measured
from tests.bench.ops import Entry
from tests.integration.conftest import NO_PRESSURE, client_of
from tests.support import wait_until

SLOTS = 2
LATENCY_S = 0.1
LICENCES = Path("/usr/share/common-licenses")
WITHIN = 0.25
SUM_UP = {"prompt": "Sum up this documentation in about 25 words:\n{item}", "max_tokens": 120}


@dataclass(frozen=True)
class Asked:
    """One request of the table; `take` returns its items, other ones for each turn."""

    name: str
    take: Callable[[int], Sequence[Any]]
    params: dict[str, Any]
    operation: str = "llm.map"

    def request(self, turn: int) -> dict[str, Any]:
        """Return the request of one turn."""
        items = list(self.take(turn))
        return {"operation": self.operation, "items": items, "params": self.params}


@dataclass(frozen=True)
class Compared:
    """Ratios of a plan's p50 to the use of its job, by unit."""

    name: str
    ratios: dict[str, float]
    nodes: tuple[int, int]  # planned, used
    held: bool  # tokens used were at most p90
    seconds: tuple[float, float] = field(default=(0.0, 0.0))  # planned, used

    def within(self, unit: str, most: float) -> bool:
        """Return whether the plan and the use differ by this factor at most."""
        return 1 / most <= self.ratios[unit] <= most


# --- texts ------------------------------------------------------------------------------------


class Texts:
    """Texts of this machine; each slice of a kind begins where the one before ended."""

    def __init__(self) -> None:
        self.docstrings: list[str] = []
        self.functions: list[str] = []
        for path in python_files(standard_library()):
            if "/test" not in path:
                self._add(Path(path).read_text(encoding="utf-8", errors="replace"))
        for each in (self.docstrings, self.functions):
            random.Random(3).shuffle(each)
        files = sorted({each.resolve() for each in LICENCES.glob("*") if each.is_file()})
        whole = [each.read_text(errors="replace") for each in files]
        self.licences = whole or [max(self.docstrings, key=len)] * 14
        self.paragraphs = [
            part for text in whole for part in re.split(r"\n\s*\n", text) if len(part) > 80
        ] or self.docstrings
        self.japanese = [_japanese(number) for number in range(80)]

    def _add(self, source: str) -> None:
        try:
            tree = ast.parse(source)
        except (SyntaxError, ValueError):
            return
        lines = source.splitlines()
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                if (doc := ast.get_docstring(node)) and len(doc) > 20:
                    self.docstrings.append(doc)
                if isinstance(node, ast.FunctionDef) and 5 < len(node.body) < 60:
                    self.functions.append("\n".join(lines[node.lineno - 1 : node.end_lineno]))

    def labels(self, turn: int) -> list[str]:
        """Return pairs of words."""
        words = re.findall(r"[A-Za-z]{4,}", " ".join(self.docstrings[:3000]))
        chosen = random.Random(turn)
        return [" ".join(chosen.sample(words, 2)) for _ in range(600)]


def _japanese(number: int) -> str:
    """Return a text of Hiragana and Chinese signs, with options of a program in ASCII."""
    signs = random.Random(number)
    parts = []
    for _ in range(signs.randrange(20, 80)):
        length = signs.randrange(3, 20)
        parts.append(
            "".join(
                chr(signs.randrange(0x3042, 0x3094) if at % 3 else signs.randrange(0x4E00, 0x9000))
                for at in range(length)
            )
        )
        if signs.random() < 0.3:
            parts.append(f"--option-{signs.randrange(9)} FILE")
    return "\u3002".join(parts)


def requests(texts: Texts) -> list[Asked]:
    """Return the requests of the table, in the order in which they run."""

    def part(of: list[str], first: int, count: int) -> Callable[[int], list[str]]:
        """Return items of a kind of texts, other ones for each turn where there are enough."""
        return lambda turn: [
            of[(first + turn * 9000 + at) % len(of)] for at in range(min(count, len(of)))
        ]

    docs, pages = texts.docstrings, texts.paragraphs
    forms = {"prompt": "Fill in, in about 12 words:\n{item}", "max_tokens": 150, "output": Entry}
    merged = {"merge_prompt": "Join these texts in about 40 words.", "max_tokens": 150}
    explained = {"prompt": "Explain in about 40 words:\n{item}", "max_tokens": 200}
    licences = {"prompt": "Name the duties in about 80 words:\n{item}", "max_tokens": 400}
    return [
        Asked("map 300 docstrings (cold)", part(docs, 0, 300), SUM_UP),
        Asked("map 600 docstrings", part(docs, 300, 600), SUM_UP),
        Asked(
            "map 600 two-word labels",
            texts.labels,
            {"prompt": "Name a topic in 2 words: {item}", "max_tokens": 16},
        ),
        Asked("map 200 functions", part(texts.functions, 0, 200), explained),
        Asked(
            "map 40 Japanese pages",
            lambda turn: texts.japanese[40 * turn : 40 * turn + 40],
            {"prompt": "Sum up this page in about 60 words:\n{item}", "max_tokens": 300},
        ),
        Asked("map 14 whole licences", part(texts.licences, 0, 14), licences),
        Asked("map 100 to a form", part(docs, 900, 100), forms),
        Asked(
            "map_reduce 400 paragraphs, 8",
            part(pages, 0, 400),
            {"prompt": "Sum up in about 30 words:\n{item}", "fan_in": 8, **merged},
            "llm.map_reduce",
        ),
        Asked(
            "map_reduce 300 docstrings, 20",
            part(docs, 1000, 300),
            {"prompt": "Sum up in about 20 words:\n{item}", "fan_in": 20, **merged},
            "llm.map_reduce",
        ),
        Asked(
            "ask 3,000 docstrings",
            part(docs, 1300, 3000),
            {"question": "Which methods return the size of a file?", "max_tokens": 300},
            "llm.ask",
        ),
        Asked(
            "ask 638 licence paragraphs",
            part(pages, 400, 638),
            {"question": "When does the licence of a work terminate?", "max_tokens": 300},
            "llm.ask",
        ),
        Asked("map 600 docstrings, at last", part(docs, 4300, 600), SUM_UP),
    ]


# --- measuring --------------------------------------------------------------------------------


def compared(client: Client, asked: Asked, turn: int) -> Compared:
    """Plan a request, run it, and return the ratios of both."""
    planned = client.plan(asked.request(turn))
    result = client.execute(asked.request(turn), timeout=600)
    assert result.spent is not None
    spent = result.spent.spent
    took_s = result.metrics.execution_time_ms / 1000
    ratios = {
        name: getattr(planned, name).p50 / spent[name] for name in ("calls", "tokens", "money")
    }
    planned_s = planned.time_s.p50 if planned.time_s else 0.0
    return Compared(
        asked.name,
        {**ratios, "seconds": planned_s / took_s},
        (planned.nodes, result.metrics.nodes),
        spent["tokens"] <= planned.tokens.p90,
        (planned_s, took_s),
    )


def turns(client: Client, texts: Texts, count: int) -> Iterator[tuple[int, list[Compared]]]:
    """Yield the table of each turn."""
    for turn in range(count):
        yield turn, [compared(client, each, turn) for each in requests(texts)]


def plan_and_use() -> Iterator[Measured]:
    """Yield a line for each request and turn, and the summary of each turn."""
    with (
        embedded.server() as server,
        fake_provider.running(
            latency=LATENCY_S, tokenizer="pieces", model_behaviour="writer"
        ) as provider,
        tempfile.TemporaryDirectory() as folder,
    ):
        environment = {
            **NO_PRESSURE,  # under pressure another model answers, and a slot has fewer calls
            "RLM_REDIS_URL": server.url,
            "RLM_NAMESPACE": "plans",
            "RLM_OPERATIONS": "tests.bench.ops",
            "OPENAI_API_KEY": "none",
            "OPENAI_BASE_URL": provider.base_url,
            "RLM_LLM__TOKENS": "1000000000",
            "RLM_LLM__REQUESTS": "10000000",
            "PYTHONPATH": str(Path.cwd()),
        }
        with (
            client_of(environment) as client,
            embedded.worker(environment, log=Path(folder) / "plans.log", slots=SLOTS),
        ):
            wait_until(lambda: client.plan(operation="sum", items=[1]).slots == SLOTS)
            for turn, table in islice(turns(client, Texts(), 2), 2):
                when = "after its first turn" if turn else "first turn"
                yield from map(_line, table)
                yield from _summary(table, when)


def _line(each: Compared) -> Measured:
    units = ", ".join(f"{unit} {ratio:.2f}" for unit, ratio in each.ratios.items())
    used = f"nodes {each.nodes[0]}/{each.nodes[1]}, {each.seconds[0]:.1f}/{each.seconds[1]:.1f} s"
    held = "p90 held" if each.held else "p90 NOT held"
    return Measured(f"plan: {each.name}", units, used, held, "", None)


def _summary(table: list[Compared], when: str) -> Iterator[Measured]:
    close = sum(each.within("tokens", 1 + WITHIN) for each in table)
    held = sum(each.held for each in table)
    timed = sum(each.within("seconds", 2.0) for each in table)
    about = f"plans, {when}"
    yield Measured(f"{about}: tokens within 25 %", f"{close} of 12", "", "", "10", close >= 10)
    yield Measured(f"{about}: tokens at most p90", f"{held} of 12", "", "", "11", held >= 11)
    yield Measured(f"{about}: seconds within 2 x", f"{timed} of 12", "", "", "12", timed == 12)
