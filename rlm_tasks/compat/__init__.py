"""The names that other orchestrators use for what this platform does, and what each of them comes
to here.

Users who migrate call it; nothing else does.  Begin with `optimization_config`.
"""
