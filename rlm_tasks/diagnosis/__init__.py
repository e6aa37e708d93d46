"""The faults of a platform: the doctor's findings, and the bundle for a bug report.

The command line calls it.  Begin with `doctor`.
"""
