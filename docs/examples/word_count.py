"""Count words with your own operation and its merge, and watch the progress of the job.

Start a worker:  RLM_OPERATIONS=word_count celery -A rlm_tasks worker
Then run:        python word_count.py
"""

from collections import Counter

from rlm_tasks import Client, operation


def add(counts):
    """Merge partials, which come in item order, into one."""
    total = Counter()
    for each in counts:
        total.update(each)
    return dict(total)


@operation("my_word_count", merge=add)
def count_words(line):
    """Return the words of one line with their counts."""
    return Counter(line.lower().split())


if __name__ == "__main__":
    lines = ["to be or not to be", "that is the question"] * 5000
    with Client() as client:
        job = client.submit(operation="my_word_count", items=lines, priority="high")
        for progress in job.watch():
            print(f"{progress.fraction:4.0%}  {progress.nodes} nodes")
        print(job.get()["be"])
