"""What is true about every job: the ledger in Redis, partial answers, budgets, and the reason a job
waits.

The engine writes it and clients read it; each change is one script in `lua/`.  Begin with `ledger`,
then `records`."""
