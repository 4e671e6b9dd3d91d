"""The report of trained runs: one page that stands by itself, its figures, its numbers.

`gather.py` reads run folders and sorts them, `measure.py` asks the trained models, `figures.py` draws, `page.py` writes
HTML, and `build.py` goes from one to the next. For equal inputs, on one device with one number of threads, every
written byte is equal.
"""

from icdctl.reporting.build import Report, Wishes, build_report

__all__ = ["Report", "Wishes", "build_report"]
