"""Let items fail: the other items go on, failures are data, and only failed items run again.

Start a worker:  RLM_OPERATIONS=partial_failures celery -A rlm_tasks worker
Then run:        python partial_failures.py
"""

from rlm_tasks import Client, operation


@operation
def parse_number(text):
    """Return the number in a text; raises ValueError for any other text."""
    return int(text)


if __name__ == "__main__":
    with Client() as client:
        job = client.submit(
            operation="parse_number", items=["1", "2", "three", "4"], continue_on_error=True
        )
        result = job.result(timeout=60)
        print(result.output, f"{result.failure_rate:.0%} failed")
        for failure in result.failed:
            print(failure.index, failure.type, failure.message)
        again = job.retry_failed().result(timeout=60, propagate=False)
        print(again.failed_count, "failed again")
