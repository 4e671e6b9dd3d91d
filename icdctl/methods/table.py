"""`METHODS`, the methods that have a name of their own; `icdctl.methods.algebra` makes others of them."""

from __future__ import annotations

from icdctl.methods.batch_methods import BATCH_METHODS
from icdctl.methods.feature import FEATURE_METHODS
from icdctl.methods.logit_methods import LOGIT_METHODS
from icdctl.methods.method import Method

METHODS: dict[str, Method] = {**LOGIT_METHODS, **BATCH_METHODS, **FEATURE_METHODS}
"""Name -> method, in the order in which they are listed."""
