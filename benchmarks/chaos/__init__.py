"""Faults on purpose: what a run, a file or a stranger can do to Kalman-RL, many times and at random.

One file per kind; each has ``run(plan)``, which yields one :class:`Trial` after another. ``python -m benchmarks.chaos``
runs them and writes the table.
"""
