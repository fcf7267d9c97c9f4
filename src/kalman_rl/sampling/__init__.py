"""Sampling: how many completions each prompt gets, which prompts come next, and when to stop.

``stop`` has the gains, ``allocate`` divides a budget before sampling, ``rounds`` samples in rounds,
``select`` picks prompts from a pool, ``adaptive`` is the quick start's loop over one environment.
"""
