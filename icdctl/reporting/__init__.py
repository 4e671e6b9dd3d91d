"""The report of trained runs: one page that stands by itself, its figures, its numbers.

`gather.py` reads run folders and sorts them, `asking.py` asks their models by `measure.py`, `pictures.py` draws what it
found by `figures.py`, `tables.py` and `origins.py` tell it, `page.py` writes HTML, and `build.py` goes from one to the
next. For equal inputs, on one device with one number of threads, every written byte is equal; latencies are measured
once and then kept in the state folder.
"""

from icdctl.reporting.build import Report, Wishes, build_report

__all__ = ["Report", "Wishes", "build_report"]
