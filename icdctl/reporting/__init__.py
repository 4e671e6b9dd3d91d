"""The report on trained runs: one self-contained page with its figures and its numbers.

`collect.py` reads run folders and sorts them, `group_measurements.py` measures their models with `measure.py`,
`pictures.py` chooses the figures that `figures.py` and `model_maps.py` draw, `result_tables.py` and `lineage.py` make
the tables, `page.py` writes HTML, and `build.py` calls one after the other. For equal inputs, on one device with one
number of threads, every written byte is equal; latencies are measured once and then kept in the state folder.
"""

from icdctl.reporting.build import ReportOptions, WrittenReport, build_report

__all__ = ["ReportOptions", "WrittenReport", "build_report"]
