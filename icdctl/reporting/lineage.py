"""The lineage of a report's runs: which data, teachers, students and ONNX files were made from which."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from icdctl import data, files, registry
from icdctl.errors import IcdctlError
from icdctl.reporting import lineage_figure
from icdctl.reporting.finished_runs import FinishedRun
from icdctl.reporting.group_measurements import GroupMeasurements
from icdctl.reporting.lineage_figure import Node
from icdctl.reporting.page import PageTable, Section
from icdctl.reporting.run_groups import RunGroup

_SHORT_HASH = 10
_COLUMNS = ("data", "teacher", "students", "delivered")


def lineage_section(
    measured: Sequence[GroupMeasurements], teachers: Mapping[str, FinishedRun], notes: list[str]
) -> Section:
    """The section on lineage, with hashes, sources and licences.

    Args:
        measured: the measurements of all groups.
        teachers: hash of a teacher's weights -> the run that trained it, if that is known.
        notes: receives a sentence for everything that could not be read.
    """
    registered = _registered(notes)
    nodes: dict[str, Node] = {}
    lines: dict[tuple[str, ...], None] = {}
    for each in measured:
        group = each.group
        data_key = f"data {group.images}"
        nodes[data_key] = Node(data_key, (group.images, _short_hash(each.data_sha256)), 0)
        row = data.row_of(group.dataset)
        origin = "" if row is None else f"{row.source}; licence: {row.licence}"
        lines[("data", group.images, each.data_sha256 or "not loaded", origin)] = None
        teacher_key = f"teacher {group.teacher_sha256 or group.teacher}"
        if group.teacher is not None:
            hashed = group.teacher_sha256
            nodes[teacher_key] = Node(teacher_key, (group.teacher, _short_hash(hashed)), 1, (data_key,))
            lines[("teacher", group.teacher, hashed or "not known", _teacher_origin(group, teachers, registered))] = (
                None
            )
        for cell in group.cells:
            key = f"students {cell.runs[0].folder}"  # by folder, because the same plain students are in several groups
            if cell in group.drawn:
                count = f"{len(cell.runs)} seeds" if len(cell.runs) > 1 else _short_hash(cell.runs[0].sha256)
                parent = data_key if cell.config.teacher is None else teacher_key
                nodes[key] = Node(key, (f"{group.student}, {cell.label}", count), 2, (parent,))
            for run in cell.runs:
                delivered = _delivered(run, registered)
                made = f"icdctl {run.versions.get('icdctl', '?')}, torch {run.versions.get('torch', '?')}"
                name = f"{group.student}, {cell.label}, seed {run.config.seed}"
                if cell.config.teacher is not None:
                    name += f", from {group.teacher_label}"
                lines[("student", name, run.sha256, made)] = None
                for place, (what, sha256) in enumerate(delivered):
                    lines[(what, name, sha256, "")] = None
                    if cell in group.drawn:
                        node = f"{what} {run.folder} {place}"
                        nodes[node] = Node(node, (what, _short_hash(sha256)), 3, (key,))
    used = sorted({node.column for node in nodes.values()})
    headers = [_COLUMNS[column] for column in used]
    placed = [replace(node, column=used.index(node.column)) for node in nodes.values()]
    ordered = sorted(placed, key=lambda node: node.column)
    picture = lineage_figure.lineage("lineage", ordered, headers)
    table = PageTable("All files", ("kind", "what", "sha256", "source"), tuple(lines), ())
    return Section("lineage", "Lineage", [], tables=[table], pictures=[picture])


def _teacher_origin(group: RunGroup, teachers: Mapping[str, FinishedRun], registered: Mapping[str, str]) -> str:
    own = teachers.get(group.teacher_sha256 or "")
    run = next(run for cell in group.cells for run in cell.runs if run.config.teacher is not None)
    source, licence = run.metrics.teacher_source, run.metrics.teacher_licence
    parts = [source] if source else []
    if licence:
        parts.append(f"licence: {licence}")
    if group.teacher_sha256 is not None and group.teacher_sha256 in registered:
        parts.append(f"registry: {registered[group.teacher_sha256]}")
    if own is not None:
        parts.append(f"its own run reached top-1 {own.top1:.2f}")
    return "; ".join(parts)


def _registered(notes: list[str]) -> dict[str, str]:
    """Hash of weights -> reference of the newest artifact with these weights."""
    try:
        found = registry.list_artifacts(registry.default_folder())
    except IcdctlError as error:
        notes.append(f"the registry was not read: {error.message}")
        return {}
    return {artifact.sha256: artifact.reference for artifact in found}


def _delivered(run: FinishedRun, registered: Mapping[str, str]) -> list[tuple[str, str]]:
    """The ONNX file and the registered copy of a run, if they exist, each with its hash."""
    found = []
    onnx = run.folder / "onnx" / "model.onnx"
    if onnx.is_file():
        found.append(("ONNX", files.sha256_file(onnx)))
    if run.sha256 in registered:
        found.append((f"registry: {registered[run.sha256]}", run.sha256))
    return found


def _short_hash(sha256: str | None) -> str:
    return "not known" if sha256 is None else sha256[:_SHORT_HASH]
