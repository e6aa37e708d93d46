"""What a job is: its specification, its items, how its range is cut, how data is packed.

Every folder above imports it; it imports no other folder.  Begin with `spec`, then `splitting`.
"""
