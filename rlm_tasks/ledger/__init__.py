"""The ledger in Redis, which holds the true state of every job, its partial answers and budgets.

The engine and the worker write it, clients read it.  Each change is one script in `lua/`.  Begin
with `ledger`, then `records`.
"""
