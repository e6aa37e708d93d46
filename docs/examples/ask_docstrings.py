"""Ask a question over Python's documentation strings, which do not fit into one context.

    python docs/examples/ask_docstrings.py

asks QUESTION; its argument may be another question.  A model reads the strings in groups, and each
round narrows the search.

The program starts a server, a worker and a fake provider (it reads without a model and costs
nothing), and stops them at the end.  With OPENAI_API_KEY it calls OpenAI and spends 50 cents at
most.  OPENAI_BASE_URL names another provider with the same API.
"""

import argparse
import ast
import os
import sys
import sysconfig
import tempfile
from contextlib import ExitStack
from pathlib import Path

from rich.progress import Progress

from rlm_tasks.testing import embedded, fake_provider

QUESTION = "What returns the longest common path of several path names?"


def docstrings(most):
    """Yield a name and a documentation string for each function and class of the standard
    library.
    """
    found = 0
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("[a-z]*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) and (
                text := ast.get_docstring(node)
            ):
                yield f"{path.stem}.{node.name}", text
                if (found := found + 1) == most:
                    return


def ask(client, question, texts, budget):
    """Print the plan, submit the job, show its progress, and return its result."""
    request = {
        "operation": "llm.ask",
        "items": texts,
        "params": {"question": question, "group_tokens": 4000, "max_tokens": 300},
        "options": {"budget": budget, "continueOnError": True},
    }
    print(client.plan(request))
    job = client.submit(request)
    with Progress(disable=not sys.stdout.isatty()) as progress:
        bar = progress.add_task("reading")
        for seen in job.watch():
            progress.update(bar, total=seen.total, completed=seen.done + seen.failed + seen.skipped)
    return job.result()


def main():
    """Start what is needed, ask, and print the answer with its sources and its cost."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("question", nargs="?", default=QUESTION)
    parser.add_argument("--items", type=int, default=10_000, help="number of strings to read")
    asked = parser.parse_args()
    embedded.clean_up_on_sigterm()
    with ExitStack() as stack:
        os.environ["RLM_REDIS_URL"] = stack.enter_context(embedded.server()).url
        if "OPENAI_API_KEY" not in os.environ:
            provider = stack.enter_context(fake_provider.running(latency=0.05))
            os.environ.update(
                OPENAI_API_KEY="none is needed",
                OPENAI_BASE_URL=provider.base_url,
                RLM_LLM__TOKENS="10000000",
            )
        from rlm_tasks import Client  # it reads the environment when it is imported

        names, texts = zip(*docstrings(asked.items), strict=True)
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        stack.enter_context(embedded.worker(dict(os.environ), log=folder / "worker.log", slots=2))
        with Client() as client:
            result = ask(client, asked.question, texts, {"money": 0.50})
    print(f"\n{asked.question}\n{result.output['answer']}\n")
    for lo, hi in result.output["citations"]:
        print("  from", ", ".join(names[lo:hi]))
    spent = result.spent.spent
    print(f"{result.output['read']:,} texts read in {result.output['rounds']} rounds and", end=" ")
    print(
        f"{spent['calls']:.0f} calls, {spent['tokens']:,.0f} tokens, {spent['money']:.4f} in money"
    )


if __name__ == "__main__":
    main()
