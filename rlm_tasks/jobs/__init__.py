"""The parts of a job: its specification, items, cuts, packing of data, failures and endings.

Every folder above imports it; it imports no other folder.  Begin with `spec`, then `splitting`.
"""
