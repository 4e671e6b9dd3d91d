"""Numbers in, statements out: statistics over seeds, published results, the papers' tables and verdicts on them.

This room knows nothing about training.
"""
