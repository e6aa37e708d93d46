"""Tools that find faults of a platform: the doctor's checks, and the bundle for a bug report.

The command line calls it.  Begin with `doctor`.
"""
