"""Honest measurements: every room against its rivals, interleaved, checked, with the share of the attainable.

Installed as `fastattn.benchmarks`; `fastattn bench` is the way in. README.md says how to read and how to add.
"""
