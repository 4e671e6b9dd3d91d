"""`python -m icdctl`."""

from icdctl.cli import run

run()
