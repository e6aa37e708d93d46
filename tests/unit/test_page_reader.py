"""The reader that runs the pages of the documentation: it reports a wrong page with its line and
the reason.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.integration import page_reader
from tests.integration.page_reader import Reader
from tests.integration.pages import Wrong, read

Read = Callable[[str], None]


@pytest.fixture
def carry_out(tmp_path: Path) -> Iterator[Read]:
    """Run a page, given by its text with ' for each fence of three backticks."""
    folder = tmp_path / "reader"
    folder.mkdir()
    programs = os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"]))
    with ExitStack() as stack:
        own = os.environ | {"PATH": programs, "FLOWER_PORT": "1"}
        reader = stack.enter_context(
            Reader(folder, own, tmp_path, stack, {"localhost:1": "localhost:2"})
        )
        yield lambda text: reader.carry_out(read("page.md", text.replace("'''", "```")))


GOOD = """
# A page

'''python title="own/shop.py"
PRICE = 1
'''

'''python title="own/shop.py"
PRICE = 2
'''

'''json title="request.json"
{"price": 3}
'''

'''sh
mkdir -p below && cd below   # and stays there
export PRICE=4 \\
  WHERE=localhost:1
echo one    of   two
pip install nothing-of-this-name     # is not run
cat ../request.json
'''

'''text title="prints"
one of ...
{"price": 3}
'''

1. A list may have blocks, too:

   '''python
   import json, os, pathlib
   import sys
   from dataclasses import dataclass
   sys.path.insert(0, "..")
   from own.shop import PRICE

   @dataclass
   class Item:
       price: int

   def show(value):
       print(value)  # two times ...

   for each in range(2):
       show(f"two times {each}")
   print(PRICE, Item(1), pathlib.Path.cwd().name)  # 2 Item(price=1) below
   print(os.environ["PRICE"], os.environ["WHERE"])
   '''

   '''text title="prints"
   two times 0
   two times 1
   ...
   4 localhost:1
   '''

'''text
  a picture
'''

'''promql
sum by (operation) (rate(rlm_items_total[5m]))
'''

'''ini
PRICE=5
[Service]
Environment=A=1
Environment=B=100%
'''
"""


def test_a_correct_page_runs_without_an_error(carry_out: Read) -> None:
    carry_out(GOOD)


WRONG = {
    "an unknown language": (
        "'''cobol\nSTOP RUN.\n'''",
        "page.md:1: nobody knows how to run or parse 'cobol'; use one of",
    ),
    "a fence without a language": ("'''\nls\n'''", "page.md:1: a fence is ```language"),
    "another attribute": ("'''python linenums\n1\n'''", "page.md:1: a fence is ```language"),
    "a title that is no file": (
        "'''text title=\"output\"\n1\n'''",
        "page.md:1: title='output' is neither",
    ),
    "a fence that is not closed": ("text\n'''sh\nls\n", "page.md:2: this fence is never closed"),
    "broken json": (
        "\n'''json\n{'a': 1}\n'''",
        "page.md:3: this is no json: Expecting property name",
    ),
    "broken yaml": ("'''yaml\na: [\n'''", "page.md:2: this is no yaml"),
    "a broken query": (
        "'''promql\nsum(rate(x[5m])\n'''",
        "page.md:2: this is no promql: ( and ) do not match",
    ),
    "a broken file": (
        "'''python title=\"a.py\"\ndef\n'''",
        "page.md:2: this is no python: invalid syntax",
    ),
    "a command that fails": (
        "'''sh\ntrue\nls nowhere\necho on\n'''",
        "page.md:2: exit code 2:\nls:",
    ),
    "the line of a command that fails": ("\n\n'''sh\ntrue\n(exit 3)\n'''", "line 5: ( exit 3 )"),
    "a command that is not there": (
        "'''sh\nno-such-program\n'''",
        "no-such-program: command not found",
    ),
    "a file that is not there": (
        "'''sh\nkubectl apply -f docs/deploy/none.yaml\n'''",
        "page.md:2: there is no docs/deploy/none.yaml",
    ),
    "a target that is not there": (
        "'''sh\ntrue\nmake nothing ARGS=--all\n'''",
        "page.md:3: there is no nothing",
    ),
    "an extra that is not there": (
        "'''sh\npip install 'rlm-tasks[flower,flour]'\n'''",
        "page.md:2: there is no flour",
    ),
    "a worker that does not start": (
        "'''sh\ncelery -A no_such_app worker\n'''",
        "page.md:2: the worker did not start:\n",
    ),
    "code that raises": (
        "\n'''python\ndef fail():\n    1 / 0\n\nfail()\n'''",
        'File "page.md", line 4, in fail\n    1 / 0',
    ),
    "code that ends the process": (
        "'''python\nimport os\nos._exit(3)\n'''",
        "page.md:2: the interpreter has ended",
    ),
    "a print that prints something else": (
        "'''python\nprint(1 + 1)  # 3\n'''",
        "page.md:2: the comment says '3', but what is printed is '2\\n'",
    ),
    "a print that never happens": (
        "'''python\nif False:\n    print(1)  # 1\n'''",
        "page.md:3: this line has not printed anything",
    ),
    "text that sh has not printed": (
        "'''sh\necho a\n'''\n'''text title=\"prints\"\nb\n'''",
        "page.md:5: the page says\nb\nbut what is printed is\na\n",
    ),
    "text that python has not printed": (
        "'''python\nprint(True)\n'''\n'''text title=\"prints\"\n1\n'''",
        "but what is printed is\nTrue\n",
    ),
    "text that nothing can have printed": (
        "'''text title=\"prints\"\n1\n'''",
        "page.md:2: nothing before it has been run",
    ),
    "text of a command that is not run": (
        "'''sh\nmake test\n'''\n'''text title=\"prints\"\n1\n'''",
        "nothing before it has been run",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_an_error_is_reported_with_its_line(name: str, carry_out: Read) -> None:
    text, said = WRONG[name]

    with pytest.raises(Wrong) as wrong:
        carry_out(text)

    assert said in str(wrong.value)


@pytest.mark.parametrize(
    "block", ["'''sh\nsleep 60\n'''", "'''python\nimport time\ntime.sleep(60)\n'''"]
)
def test_a_block_that_does_not_end_is_reported(
    block: str, carry_out: Read, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(page_reader, "BLOCK_S", 0.2)

    with pytest.raises(Wrong, match=r"page\.md:2: still runs after"):
        carry_out(block)
