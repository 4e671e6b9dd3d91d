"""Numbers in, statements out: statistics over seeds, published results, the papers' tables.

Knows nothing of training.
"""
