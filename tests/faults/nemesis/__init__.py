"""Random histories of a simulated platform, whose network, servers and clocks fail at random.

Begin with `histories.run_history`; ``python -m tests.faults.nemesis`` runs many of them.
"""
