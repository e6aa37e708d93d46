"""One node's run: from the claim, through its items, to the finish and the merge.

Celery's tasks in `tasks` call it in pool processes.  Begin with `node`, then `work`.
"""
