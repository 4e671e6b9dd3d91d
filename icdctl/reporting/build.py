"""Build a report from run folders: measure the models, draw the figures, write the page."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from icdctl import files
from icdctl.engine.device import resolve_device
from icdctl.engine.observer import Observer
from icdctl.errors import ArtifactError, UsageError
from icdctl.reporting import pictures, result_tables
from icdctl.reporting.collect import CollectedRuns, collect_runs
from icdctl.reporting.drawing import Picture
from icdctl.reporting.group_measurements import GroupMeasurements, GroupMeasurer
from icdctl.reporting.lineage import lineage_section
from icdctl.reporting.page import Page, PageTable, Section, render_markdown, render_page
from icdctl.reporting.result_tables import ReportRow
from icdctl.reporting.run_groups import RunGroup, short
from icdctl.science import verdict_formats
from icdctl.science.verdict_formats import sheets
from icdctl.science.verdicts import Judgement

PAGE_FILE, NUMBERS_FILE, SUMMARY_FILE, FIGURES = "index.html", "report.json", "summary.md", "figures"
_LOCK = ".lock"


@dataclass(frozen=True)
class ReportOptions:
    """Options of a report."""

    title: str = "icdctl report"
    detailed: Sequence[str] = ()
    """Texts; groups with one of them in their name get all figures. If empty, the first groups do."""
    most_detailed: int = 3
    """How many groups get all figures if `detailed` is empty."""
    images: Sequence[int] | None = None
    """Numbers of the test images whose Gram matrices are drawn; None for four that a fixed seed chooses."""
    latency: bool = True
    """Measure the time of one image in ONNX Runtime."""
    device: str = "auto"
    """The device that models run on."""
    data_dir: str | None = None
    """The folder that holds the data sets; None for the one that the runs used."""


@dataclass(frozen=True)
class WrittenReport:
    """A report on disk."""

    folder: Path
    files: tuple[Path, ...]
    rows: tuple[ReportRow, ...]
    """The numbers of each cell."""
    notes: tuple[str, ...]
    """What the report leaves out, and why."""


def build_report(
    paths: Sequence[Path],
    out: Path,
    options: ReportOptions,
    *,
    judgements: Sequence[Judgement] = (),
    observer: Observer,
) -> WrittenReport:
    """Write a report.

    Args:
        paths: run folders, or folders that hold run folders.
        out: the folder to write to. Files of an earlier report are replaced; other files are kept.
        options: title, figures, device and so on.
        judgements: judged tables of papers to include.
        observer: receives the progress.

    Raises:
        UsageError: an option does not fit the runs.
        ArtifactError: there are no runs, the folder can't be written to, or it holds files with the report's names that
            no report wrote.
    """
    collected = collect_runs(paths)
    notes = list(collected.notes)
    device = resolve_device(options.device)
    chosen = _detailed(collected.groups, options, notes)
    _earlier_figures(out)
    group_measurer = GroupMeasurer(
        device, data_dir=options.data_dir, latency=options.latency, observer=observer, notes=notes
    )
    measured, sections = [], []
    for group in collected.groups:
        found, measurer = group_measurer.measure(group)
        measured.append(found)
        drawn = pictures.curves(group)
        if measurer is not None and group in chosen:
            drawn += pictures.in_detail(found, measurer, shown=options.images)
        sections.append(_section(found, drawn, is_detailed=group in chosen))
    rows = [row for each in measured for row in result_tables.rows_of(each)]
    page = Page(
        options.title,
        _about(collected),
        [
            *_judged(judgements),
            Section(
                "results", "Results", [], tables=[result_tables.results(measured)], pictures=pictures.pareto(measured)
            ),
            *sections,
            lineage_section(measured, collected.teachers, notes),
        ],
        notes,
    )
    return WrittenReport(out, _write(out, page, rows, judgements), tuple(rows), tuple(notes))


def _detailed(groups: Sequence[RunGroup], options: ReportOptions, notes: list[str]) -> list[RunGroup]:
    """The groups that get all figures.

    Raises:
        UsageError: a text of `options.detailed` is in no group's name.
    """
    for text in options.detailed:
        if not any(text in group.name for group in groups):
            names = ", ".join(f"`{group.name}`" for group in groups)
            raise UsageError(f"no pair of models has `{text}` in its name", hint=f"they are {names}")
    if options.detailed:
        return [group for group in groups if any(text in group.name for text in options.detailed)]
    if len(groups) > options.most_detailed:
        notes.append(
            f"{options.most_detailed} of {len(groups)} pairs of models have all figures; `--detail TEXT` chooses others"
        )
    return list(groups[: options.most_detailed])


def _about(collected: CollectedRuns) -> list[str]:
    """Paragraphs that a reader needs before the numbers."""
    runs = [run for group in collected.groups for cell in group.cells for run in cell.runs]
    unique = {run.folder for run in runs}
    variants = sorted({str(run.config.settings["variant"]) for run in runs})
    watched = any(run.config.val_split for run in runs)
    return [
        f"{_counted(len(unique), 'run')} in {_counted(len(collected.groups), 'pair')} of models. The number of a run "
        "is its accuracy on the test images at the final epoch; ± is the standard deviation over seeds.",
        "Best-epoch numbers are chosen on the test images, so they are too high. They are shown only as `best on "
        "test`, for comparison with papers that print them."
        + (" Runs that watch held-out images have none." if watched else ""),
        f"Variant of the losses: {', '.join(f'`{name}`' for name in variants)}"
        + (", which follows the published code exactly." if variants == ["published"] else "."),
    ]


def _counted(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def _judged(judgements: Sequence[Judgement]) -> list[Section]:
    """A section for each judged table of a paper."""
    return [
        Section(
            f"table-{judgement.table.name}",
            f"Reproduction: {judgement.table.name}",
            [", ".join(f"{number} {status}" for status, number in judgement.counts.items())],
            tables=[
                PageTable(sheet.title, sheet.headers, sheet.rows, sheet.notes).without_empty_columns()
                for sheet in sheets(judgement)
            ],
        )
        for judgement in judgements
    ]


def _section(found: GroupMeasurements, drawn: Sequence[Picture], *, is_detailed: bool) -> Section:
    """The section of one group."""
    group = found.group
    sentences = []
    if group.usual:
        listed = ", ".join(f"{key}={short(value)}" for key, value in group.usual.items())
        sentences.append(f"The cells were trained with {listed}, unless their label says otherwise.")
    if len(group.drawn) < len(group.cells):
        sentences.append(
            f"The figures show {len(group.drawn)} of {len(group.cells)} cells, one for each method; the table above "
            "shows all."
        )
    if not is_detailed:
        sentences.append(f"Only learning curves are shown; `icdctl report --detail {group.name}` draws all figures.")
    comparisons, further = result_tables.comparisons(found)
    held = [comparisons] if comparisons is not None else []
    return Section(group.name, group.title, [*sentences, *further], tables=held, pictures=drawn)


def _earlier_figures(out: Path) -> list[str]:
    """Names of the figures of an earlier report in this folder; empty if there is none.

    Raises:
        ArtifactError: it is not a folder that can be written to, or holds files with these names that no report wrote.
    """
    hint = "choose another folder with `--out`"
    place = next(folder for folder in (out, *out.absolute().parents) if folder.exists())
    if not place.is_dir() or not os.access(place, os.W_OK):
        reason = "is not writable" if place.is_dir() else "is not a folder"
        raise ArtifactError(f"the report can't be written to `{out}`: `{place}` {reason}", hint=hint)
    taken = [name for name in (PAGE_FILE, NUMBERS_FILE, SUMMARY_FILE) if (out / name).exists()]
    if not taken:
        return []
    try:
        held = files.parse_json(files.read_regular(out / NUMBERS_FILE))
        names = [str(name) for name in held["figures"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ArtifactError(f"`{out / taken[0]}` is not part of a report that icdctl wrote", hint=hint) from error
    return [name for name in names if Path(name).name == name and Path(name).suffix in (".svg", ".png")]


def _write(out: Path, page: Page, rows: Sequence[ReportRow], judgements: Sequence[Judgement]) -> tuple[Path, ...]:
    """Write all files, and delete the figures of an earlier report that this one does not have.

    Raises:
        ArtifactError: the folder can't be written to, or holds files with these names that no report wrote.
    """
    drawn = [picture for section in page.sections for picture in section.pictures]
    content = {f"{picture.name}.svg": picture.svg.encode() for picture in drawn}
    content |= {f"{picture.name}.png": picture.png for picture in drawn}
    numbers = {
        "cells": list(rows),
        "tables": [verdict_formats.as_json(judgement) for judgement in judgements],
        "notes": page.notes,
        "figures": sorted(content),
    }
    busy = f"another process is writing a report to `{out}`"
    hint = "wait until it has finished, or choose another folder with `--out`"
    with files.locked(out / _LOCK, busy=busy, hint=hint):
        earlier = _earlier_figures(out)
        # If the process ends in the middle, this list still names every figure in the folder.
        files.write_json(out / NUMBERS_FILE, {**numbers, "figures": sorted({*content, *earlier})})
        for name in set(earlier) - set(content):
            (out / FIGURES / name).unlink(missing_ok=True)
        for name, value in content.items():
            files.write_bytes(out / FIGURES / name, value)
        files.write_text(out / SUMMARY_FILE, render_markdown(page))
        files.write_text(out / PAGE_FILE, render_page(page))
        files.write_json(out / NUMBERS_FILE, numbers)
    return (out / PAGE_FILE, out / SUMMARY_FILE, out / NUMBERS_FILE, *(out / FIGURES / name for name in content))
