"""Call a provider that has a rate limit and fails at times: no slot waits, and no item is lost.

Start a worker:  RLM_OPERATIONS=rate_limited celery -A rlm_tasks worker
Then run:        python rate_limited.py
"""

from resilience import Rate
from rlm_tasks import Client, operation


@operation("ask", service="provider", rate_limit=Rate(20, per_s=1), breaker="client", retry=4)
def ask(question, ctx):
    """Return the square of a question; every tenth question fails at its first attempt."""
    if question % 10 == 0 and not ctx.tries:
        raise ConnectionError("the provider hung up")
    return question * question


if __name__ == "__main__":
    with Client() as client:
        job = client.submit(operation="ask", items=range(60))
        result = job.result(timeout=60)
        print(sum(result.output), result.failed_count, "failed")
        print(client.breakers.status()["provider"]["state"])
