"""Tables and sentences of the command line fit the width of the screen."""

from __future__ import annotations

from itertools import takewhile
from typing import Any

import click
import pytest
from click.testing import CliRunner

from rlm_tasks.cli.output import as_json_option, say, table, wide_option

WHY = "memory is 91 % of 8 GB, above its threshold of 90 % for 30 s"
COLUMNS = ("worker", "level", "busy", "CPU", "queues", "why")
ROWS = [
    (
        f"celery@payments-worker-of-the-eu-west-{n:04d}",
        "critical",
        4 - n,
        f"{91 - 90 * n} %",
        "a, b",
        WHY,
    )
    for n in range(2)
]
EIGHTY = """\
Workers
worker                    level     busy   CPU  queues  why
celery@paym…eu-west-0000  critical     4  91 %  a, b    memory is 91 % of 8 GB,
                                                        above its threshold of
                                                        90 % for 30 s
celery@paym…eu-west-0001  critical     3   1 %  a, b    memory is 91 % of 8 GB,
                                                        above its threshold of
                                                        90 % for 30 s
Cut short: worker. In full: --wide or --json"""
FORTY = """\
Workers
worker          level     why
celery…st-0000  critical  memory is 91 %
                          of 8 GB, above
                          its threshold
                          of 90 % for 30
                          s
celery…st-0001  critical  memory is 91 %
                          of 8 GB, above
                          its threshold
                          of 90 % for 30
                          s
Not shown: busy, CPU, queues; cut short:
worker. In full: --wide or --json"""


@click.command()
@wide_option
@as_json_option
@click.option("--one", is_flag=True)
def shown(one: bool, **_: Any) -> None:
    """Print the table of these tests."""
    if one:
        table("Failures", ("type", "message"), [("ValueError\x1b[2J", "not\na \x1b[31mnumber")])
    else:
        table("Workers", COLUMNS, ROWS, minor=("queues", "CPU", "busy"))


def lines(*arguments: str, columns: int | None) -> list[str]:
    environment = {"COLUMNS": str(columns) if columns else None}
    done = CliRunner().invoke(shown, arguments, env=environment, catch_exceptions=False)
    return done.stdout.splitlines()


def test_a_pipe_has_each_row_on_one_line_and_nothing_cut() -> None:
    printed = lines(columns=None)

    assert len(printed) == 4
    assert printed[1].split() == [*COLUMNS]
    assert printed[2].startswith("celery@payments-worker-of-the-eu-west-0000  critical     4")
    assert printed[2].endswith(f"91 %  a, b    {WHY}")
    assert lines("--wide", columns=40) == printed


def test_eighty_columns_leave_out_minor_ones_and_wrap_the_reason() -> None:
    assert lines(columns=80) == EIGHTY.splitlines()


def test_forty_columns_keep_the_worker_its_level_and_the_reason() -> None:
    assert lines(columns=40) == FORTY.splitlines()


def test_no_line_is_wider_than_the_screen_and_no_word_is_broken() -> None:
    words = {word for row in [COLUMNS, *ROWS] for cell in row for word in str(cell).split()}
    for columns in range(12, 140):
        printed = lines(columns=columns)
        body = takewhile(lambda line: not line.startswith(("Not ", "Cut ")), printed[1:])

        assert max(map(len, printed)) <= columns
        assert {word for line in body for word in line.split() if "…" not in word} <= words


def test_a_cell_shows_escapes_and_stays_on_its_line() -> None:
    assert lines("--one", columns=None)[2:] == ["ValueError\\x1b[2J  not a \\x1b[31mnumber"]


def test_a_sentence_is_wrapped_by_words_and_a_command_stays_whole(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "40")

    say("FAULT    workers: none reports; to start one: celery -A rlm_tasks worker", hang=9)

    assert capsys.readouterr().out.splitlines() == [
        "FAULT    workers: none reports; to start",
        "         one: celery -A rlm_tasks worker",
    ]
