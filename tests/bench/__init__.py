"""Benchmarks, not tests: `make bench` prints one JSON line per measurement, each beside a rival timed in the same run.

A machine drifts by more than what is measured here. So rivals take turns, round by round; a ratio is the median of the
rounds' own ratios; and every benchmark has a process to itself.
"""
