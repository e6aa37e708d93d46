"""A provider that allows so much a second, and fails now and then: nothing waits in a slot, nothing
is lost.

Run a worker that knows it:  RLM_OPERATIONS=rate_limited celery -A rlm_tasks worker
Then:                        python rate_limited.py
"""

from resilience import Rate
from rlm_tasks import Client, operation


@operation("ask", service="provider", rate_limit=Rate(20, per_s=1), breaker="client", retry=4)
def ask(question, ctx):
    """Every tenth question fails at its first try."""
    if question % 10 == 0 and not ctx.tries:
        raise ConnectionError("the provider hung up")
    return question * question


if __name__ == "__main__":
    with Client() as client:
        job = client.submit(operation="ask", items=range(60))
        result = job.result(timeout=60)
        print(sum(result.output), result.failed_count, "failed")
        print(client.breakers.status()["provider"]["state"])
