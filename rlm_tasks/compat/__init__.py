"""Names of other orchestrators, each mapped to the setting or function that replaces it here.

Only users who migrate call it.  Begin with `optimization_config`.
"""
