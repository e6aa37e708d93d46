"""The rules of scheduling: when work runs, where, and how much of it at once.

`rlm_tasks` asks these rules and carries out the answers; no module here knows Celery.  The state
that workers share stands in Redis, through `resilience`.  Begin with `slots`, then `monitor`.
"""
