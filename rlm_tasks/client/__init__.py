"""The classes by which a program submits jobs, follows them, and reads the platform's state.

Users, the command line, Flower and the doctor call it.  Begin with `client`, then `submission`.
"""
