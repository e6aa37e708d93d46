"""Count words: an operation of one's own with a merge, submitted and watched.

Run a worker that knows it:  RLM_OPERATIONS=word_count celery -A rlm_tasks worker
Then:                        python word_count.py
"""

from collections import Counter

from rlm_tasks import Client, operation


def add(counts):
    """Merge: partials in item order become one."""
    total = Counter()
    for each in counts:
        total.update(each)
    return dict(total)


@operation("my_word_count", merge=add)
def count_words(line):
    """Count the words of one line."""
    return Counter(line.lower().split())


if __name__ == "__main__":
    lines = ["to be or not to be", "that is the question"] * 5000
    with Client() as client:
        job = client.submit(operation="my_word_count", items=lines, priority="high")
        for progress in job.watch():
            print(f"{progress.fraction:4.0%}  {progress.nodes} nodes")
        print(job.get()["be"])
