"""Parts of the fake provider: its answers, and its window of requests and tokens."""

from __future__ import annotations

import json
from random import Random

import pytest

from rlm_tasks.testing.fake_provider import Model, Rule, Window
from rlm_tasks.testing.tokenizer import Bytes, Pieces

TEXT = """You read passages.
QUESTION: Which method removes whitespace from strings?
[3] A list is a sequence.  It may be changed.
[12] Strings have many methods. The method strip removes leading whitespace. It returns a copy.
[7] The method removes items. It has nothing to do with whitespace.
"""


def answer(text: str, behaviour: str = "reader", schema: dict[str, object] | None = None) -> str:
    return Model(behaviour).answer(
        [{"role": "system", "content": "SUM: 9"}, {"role": "user", "content": text}], schema
    )


@pytest.mark.parametrize(
    ("text", "answered"),
    [
        ("MERGE:\n- pear\n- apple\n- pear \nand\n-none", "apple; pear"),
        ("all of it\nSUM: 3, -4 and 10", "9"),
        ("QUESTION: without passages\nSUM: 1 2", "3"),
        (" ".join(str(n) for n in range(20)), "0 1 2 3 4 5 6 7 8 9 10 11"),
    ],
)
def test_a_reader_merges_adds_or_repeats(text: str, answered: str) -> None:
    assert answer(text) == answered


def test_a_reader_finds_passages_with_half_of_the_words_best_first() -> None:
    # the words: which, method, removes, whitespace, from, strings
    assert json.loads(answer(TEXT)) == {
        "answer": "The method strip removes leading whitespace.",
        "found": [12, 7],
    }
    assert json.loads(answer(TEXT.replace("Which", "Wherefore quickly never gently"))) == {
        "answer": "",
        "found": [],
    }
    many = "QUESTION: strings\n" + "\n".join(f"[{n}] strings" for n in range(9, 0, -1))
    assert json.loads(answer(many))["found"] == [1, 2, 3, 4, 5]


def test_an_echo_repeats_the_last_message() -> None:
    assert answer("SUM: 1", "echo") == "echo: SUM: 1"


@pytest.mark.parametrize(
    ("text", "properties", "answered"),
    [
        ("one two", {"word": {"type": "string"}}, '{"word":"one two"}'),
        ("SUM: 1 2", {"total": {"type": "integer"}}, '{"total":3}'),
        ("one two", {"total": {"type": "integer"}}, "one two"),
        ("one two", {"a": {"type": "string"}, "b": {"type": "string"}}, "one two"),
    ],
)
def test_an_answer_follows_a_schema_of_one_property(
    text: str, properties: dict[str, object], answered: str
) -> None:
    assert answer(text, schema={"type": "object", "properties": properties}) == answered


def test_an_answer_that_is_an_object_ignores_the_schema() -> None:
    assert answer(TEXT, schema={"properties": {"text": {"type": "string"}}}) == answer(TEXT)


def test_a_token_is_four_bytes_and_no_character_is_split() -> None:
    assert [Bytes().count("x" * length) for length in (0, 1, 4, 5)] == [0, 1, 1, 2]
    assert Bytes().count("\u00e9" * 4) == 2
    assert Bytes().cut("abc\u00e9def", 1) == "abc"


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("", 0),
        ("It is warm today.", 5),
        ("internationalization", 5),
        ("x = 12345", 5),
        ("def f():\n        return 1", 7),
        ("\u0445\u043e\u0440\u043e\u0448\u043e", 2),  # Russian: six letters
        ("\u65e5\u672c\u8a9e", 3),  # Japanese: three signs
    ],
)
def test_pieces_count_words_digits_and_signs_about_as_models_do(text: str, tokens: int) -> None:
    assert Pieces().count(text) == tokens
    assert Pieces().cut(text, tokens) == text
    assert Pieces().count(Pieces().cut(text, 2)) <= 2


def test_pieces_count_a_few_tokens_for_each_message_and_the_schema() -> None:
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hi"}]

    assert Pieces().prompt(messages, None) == 3 + (4 + 3) + (4 + 1)
    assert Pieces().prompt(messages, {"type": "object"}) > Pieces().prompt(messages, None)
    assert Bytes().prompt(messages, {"type": "object"}) == Bytes().prompt(messages, None)


def test_a_writer_answers_in_about_the_number_of_words_asked_for() -> None:
    answers = [answer(f"Sum up text {n} in about 30 words: a b c", "writer") for n in range(200)]

    lengths = [len(each.split()) for each in answers]
    assert 27 < sum(lengths) / 200 < 33
    assert min(lengths) < 20 < 45 < max(lengths)


def test_a_window_admits_requests_up_to_its_limits() -> None:
    """Each step is compared with a count of all requests; there is room after `wait_s`, and not
    before.
    """
    random, now = Random(7), 0.0
    window = Window(10.0, 5, 100, lambda: now)
    taken: list[list[float]] = []
    refused = 0
    for _ in range(3000):
        now += random.choice([0.0, 0.1, 1.0, 4.0])
        cost = random.randint(1, 60)
        counted = [cost for came, cost in taken if came > now - 10.0]
        room = len(counted) + 1 <= 5 and sum(counted) + cost <= 100
        entry = window.take(cost)
        assert (entry is not None) == room
        if entry is None:
            refused += 1
            now, before = now + window.wait_s(cost) + 1e-6, now
            assert len([1 for came, _ in taken if before < came + 10.0 <= now])
            entry = window.take(cost)
            assert entry is not None
        taken.append(entry)
        if random.random() < 0.7:
            window.settle(random.choice(taken[-8:]), random.randint(0, 20))
    assert refused > 300


def test_a_window_without_limits_admits_all_and_has_no_headers() -> None:
    window = Window(10.0, 0, 0, lambda: 0.0)

    assert all(window.take(10**9) for _ in range(1000))
    assert window.headers() == {}


def test_a_rule_meets_every_nth_request_between_two_numbers() -> None:
    assert [n for n in range(1, 13) if Rule(kind="500", every=4).meets(n)] == [4, 8, 12]
    assert [n for n in range(1, 13) if Rule(kind="500", first=3, to=5).meets(n)] == [3, 4, 5]
    assert [n for n in range(1, 13) if Rule(kind="500", first=11).meets(n)] == [11, 12]
