"""An attack on icdctl that stays: commands killed at random instants, and mutated files given to the commands that read
them.

`python -m torture` runs it (with `tests` on the path; `make torture` does that) and writes its figures into
docs/reliability.md. tests/test_torture.py runs a small part of it with every test run.

One process imports everything once and forks a child for each command, so that a command costs a tenth of a second.
"""
