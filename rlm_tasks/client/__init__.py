"""What a program holds: the client, handles on jobs, plans, and pictures of the platform.

Users, the command line, Flower and the doctor call it.  Begin with `client`, then `submission`.
"""
