"""Executors, which train the packs of a grid: one file for each, all following `protocol.py`.

`here` trains in this process, `subprocesses` in processes of this machine. CONTRIBUTING.md says how to add one.
"""
