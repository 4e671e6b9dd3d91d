"""Where the packs of a grid are trained: a file for each executor, all of them as `protocol.py` says.

`here` trains in this process, `subprocesses` in processes of this machine. CONTRIBUTING.md says how to add one.
"""
