"""From run folders to a report: numbers measured, figures drawn, page written."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from icdctl import files
from icdctl.engine.device import resolve_device
from icdctl.engine.observer import Observer
from icdctl.errors import ArtifactError, UsageError
from icdctl.reporting import pictures, tables
from icdctl.reporting.collect import Gathered, Group, gather, short
from icdctl.reporting.drawing import Picture
from icdctl.reporting.lineage import origins
from icdctl.reporting.page import Page, Section, Table, render_markdown, render_page
from icdctl.reporting.questions import Asked, Asker
from icdctl.science import verdict_formats
from icdctl.science.verdict_formats import sheets
from icdctl.science.verdicts import Judgement

PAGE_FILE, NUMBERS_FILE, SUMMARY_FILE, FIGURES = "index.html", "report.json", "summary.md", "figures"
_LOCK = ".lock"


@dataclass(frozen=True)
class Wishes:
    """What a report should be like."""

    title: str = "icdctl report"
    detailed: Sequence[str] = ()
    """Groups whose name has one of these in it get all figures; the first ones where none is named."""
    most_detailed: int = 3
    """How many groups get all figures where none is named."""
    images: Sequence[int] | None = None
    """Numbers of the test images whose Gram matrices are drawn; None for four by a fixed seed."""
    latency: bool = True
    """Measure one image in ONNX Runtime."""
    device: str = "auto"
    data_dir: str | None = None
    """What holds the data sets; None for where the runs found them."""


@dataclass(frozen=True)
class Report:
    """A report that was written."""

    folder: Path
    files: tuple[Path, ...]
    rows: tuple[Mapping[str, Any], ...]
    """A cell each, with numbers."""
    notes: tuple[str, ...]
    """What is not in it, and why."""


def build_report(
    paths: Sequence[Path],
    out: Path,
    wishes: Wishes,
    *,
    judgements: Sequence[Judgement] = (),
    observer: Observer,
) -> Report:
    """Write a report.

    Args:
        paths: run folders, or folders that hold some.
        out: the folder: a new one, an empty one, one with other files, or an earlier report's, whose files are
            replaced.
        wishes: what it should be like.
        judgements: tables of papers that go into it.
        observer: told of the progress.

    Raises:
        UsageError: a wish that can't be fulfilled.
        ArtifactError: no runs; or a folder that can't be written to, or whose files of these names no report wrote.
    """
    gathered = gather(paths)
    notes = list(gathered.notes)
    device = resolve_device(wishes.device)
    chosen = _detailed(gathered.groups, wishes, notes)
    _earlier_figures(out)
    asker = Asker(device, data_dir=wishes.data_dir, latency=wishes.latency, observer=observer, notes=notes)
    asked, sections = [], []
    for group in gathered.groups:
        found, examiner = asker.ask(group)
        asked.append(found)
        drawn = pictures.curves(group)
        if examiner is not None and group in chosen:
            drawn += pictures.in_detail(found, examiner, shown=wishes.images)
        sections.append(_section(found, drawn, is_detailed=group in chosen))
    rows = [row for each in asked for row in tables.rows_of(each)]
    page = Page(
        wishes.title,
        _about(gathered),
        [
            *_judged(judgements),
            Section("results", "Results", [], tables=[tables.results(asked)], pictures=pictures.pareto(asked)),
            *sections,
            origins(asked, gathered.teachers, notes),
        ],
        notes,
    )
    return Report(out, _write(out, page, rows, judgements), tuple(rows), tuple(notes))


def _detailed(groups: Sequence[Group], wishes: Wishes, notes: list[str]) -> list[Group]:
    """The groups that get all figures."""
    for text in wishes.detailed:
        if not any(text in group.name for group in groups):
            names = ", ".join(f"`{group.name}`" for group in groups)
            raise UsageError(f"no pair of models has `{text}` in its name", hint=f"they are {names}")
    if wishes.detailed:
        return [group for group in groups if any(text in group.name for text in wishes.detailed)]
    if len(groups) > wishes.most_detailed:
        notes.append(
            f"all figures for {wishes.most_detailed} of {len(groups)} pairs of models; `--detail TEXT` chooses others"
        )
    return list(groups[: wishes.most_detailed])


def _about(gathered: Gathered) -> list[str]:
    """What a reader must know before the numbers."""
    runs = [run for group in gathered.groups for cell in group.cells for run in cell.runs]
    unique = {run.folder for run in runs}
    variants = sorted({str(run.config.settings["variant"]) for run in runs})
    watched = any(run.config.val_split for run in runs)
    return [
        f"{_counted(len(unique), 'run')} in {_counted(len(gathered.groups), 'pair')} of models. The number of a run is "
        "its final epoch on the test images; ± is the standard deviation over seeds.",
        "Best-epoch numbers are chosen on the test images, so they are too high; they are shown as `best on test` "
        "alone, for comparison with papers that print them."
        + (" Runs that watch held-out images have none." if watched else ""),
        f"Variant of the losses: {', '.join(f'`{name}`' for name in variants)}"
        + (", the reference code's numbers with its quirks." if variants == ["published"] else "."),
    ]


def _counted(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def _judged(judgements: Sequence[Judgement]) -> list[Section]:
    """The tables of papers, with verdicts."""
    return [
        Section(
            f"table-{judgement.table.name}",
            f"Reproduction: {judgement.table.name}",
            [", ".join(f"{number} {status}" for status, number in judgement.counts.items())],
            tables=[
                Table(sheet.title, sheet.headers, sheet.rows, sheet.notes).without_empty_columns()
                for sheet in sheets(judgement)
            ],
        )
        for judgement in judgements
    ]


def _section(found: Asked, drawn: Sequence[Picture], *, is_detailed: bool) -> Section:
    """All of a group."""
    group = found.group
    told = []
    if group.usual:
        listed = ", ".join(f"{key}={short(value)}" for key, value in group.usual.items())
        told.append(f"Trained with {listed}, where a label does not say otherwise.")
    if len(group.drawn) < len(group.cells):
        told.append(
            f"Figures show {len(group.drawn)} of {len(group.cells)} cells, one for each method; the table above has "
            "all."
        )
    if not is_detailed:
        told.append(f"Learning curves alone; `icdctl report --detail {group.name}` draws the rest.")
    comparisons, further = tables.comparisons(found)
    held = [comparisons] if comparisons is not None else []
    return Section(group.name, group.title, [*told, *further], tables=held, pictures=drawn)


def _earlier_figures(out: Path) -> list[str]:
    """Names of the figures of the report that lies in a folder; none where there is no report.

    Raises:
        ArtifactError: it is no folder, or holds files of these names that no report wrote.
    """
    hint = "choose another folder with `--out`"
    place = next(folder for folder in (out, *out.absolute().parents) if folder.exists())
    if not place.is_dir() or not os.access(place, os.W_OK):
        reason = "may not be written to" if place.is_dir() else "is no folder"
        raise ArtifactError(f"the report can't be written to `{out}`: `{place}` {reason}", hint=hint)
    taken = [name for name in (PAGE_FILE, NUMBERS_FILE, SUMMARY_FILE) if (out / name).exists()]
    if not taken:
        return []
    try:
        held = json.loads((out / NUMBERS_FILE).read_text(encoding="utf-8"))
        names = [str(name) for name in held["figures"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ArtifactError(f"`{out / taken[0]}` is of no report that icdctl wrote", hint=hint) from error
    return [name for name in names if Path(name).name == name and Path(name).suffix in (".svg", ".png")]


def _write(
    out: Path, page: Page, rows: Sequence[Mapping[str, Any]], judgements: Sequence[Judgement]
) -> tuple[Path, ...]:
    """All files, the page last; figures of an earlier report that this one lacks go.

    Raises:
        ArtifactError: the folder can't be written to, or holds something else.
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
    busy, hint = f"`{out}` is being written by another report", "wait for it, or choose another folder with `--out`"
    with files.locked(out / _LOCK, busy=busy, hint=hint):
        earlier = _earlier_figures(out)
        # Whoever ends this in the middle leaves a list of figures that holds all that lie there.
        files.write_json(out / NUMBERS_FILE, {**numbers, "figures": sorted({*content, *earlier})})
        for name in set(earlier) - set(content):
            (out / FIGURES / name).unlink(missing_ok=True)
        for name, value in content.items():
            files.write_bytes(out / FIGURES / name, value)
        files.write_text(out / SUMMARY_FILE, render_markdown(page))
        files.write_text(out / PAGE_FILE, render_page(page))
        files.write_json(out / NUMBERS_FILE, numbers)
    return (out / PAGE_FILE, out / SUMMARY_FILE, out / NUMBERS_FILE, *(out / FIGURES / name for name in content))
