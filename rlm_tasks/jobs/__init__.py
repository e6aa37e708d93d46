"""What a job is: its specification, its items, how its range is split, how data is packed.

Everything above imports it; it imports no other folder.  Begin with `spec`, then `splitting`."""
