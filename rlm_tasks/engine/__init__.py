"""One node's run: from the claim, through its items, to the finish and the merge.

Celery calls its `tasks` in pool processes.  Begin with `node`, then `work` and `cutting`.
"""
