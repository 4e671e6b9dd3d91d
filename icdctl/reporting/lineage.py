"""What was made from what: the lineage of a report's runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from icdctl import data, files, registry
from icdctl.errors import IcdctlError
from icdctl.reporting import figures
from icdctl.reporting.collect import Group, Run
from icdctl.reporting.figures import Node
from icdctl.reporting.page import Section, Table
from icdctl.reporting.questions import Asked

_SHORT_HASH = 10
_COLUMNS = ("data", "teacher", "students", "delivered")


def origins(asked: Sequence[Asked], teachers: Mapping[str, Run], notes: list[str]) -> Section:
    """What was made from what, with hashes, sources and licences.

    Args:
        asked: the groups.
        teachers: hash of weights -> the teacher's own run, where that is known.
        notes: gets what could not be read.
    """
    registered = _registered(notes)
    nodes: dict[str, Node] = {}
    lines: dict[tuple[str, ...], None] = {}
    for each in asked:
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
            key = f"students {cell.runs[0].folder}"  # the same plain ones stand beside each teacher's
            if cell in group.drawn:
                count = f"{len(cell.runs)} seeds" if len(cell.runs) > 1 else _short_hash(cell.runs[0].sha256)
                parent = data_key if cell.config.teacher is None else teacher_key
                nodes[key] = Node(key, (f"{group.student}, {cell.label}", count), 2, (parent,))
            for run in cell.runs:
                delivered = _delivered(run, registered)
                versions = run.environment.get("versions", {})
                made = f"icdctl {versions.get('icdctl', '?')}, torch {versions.get('torch', '?')}"
                name = f"{group.student}, {cell.label}, seed {run.config.seed}"
                if cell.config.teacher is not None:
                    name += f", of {group.teacher_label}"
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
    picture = figures.lineage("lineage", ordered, headers)
    table = Table("All of it", ("kind", "what", "sha256", "source"), tuple(lines), ())
    return Section("lineage", "Lineage", [], tables=[table], pictures=[picture])


def _teacher_origin(group: Group, teachers: Mapping[str, Run], registered: Mapping[str, str]) -> str:
    own = teachers.get(group.teacher_sha256 or "")
    run = next(run for cell in group.cells for run in cell.runs if run.config.teacher is not None)
    source, licence = run.metrics.get("teacher_source"), run.metrics.get("teacher_licence")
    told = [str(source)] if source else []
    if licence:
        told.append(f"licence: {licence}")
    if group.teacher_sha256 is not None and group.teacher_sha256 in registered:
        told.append(f"registry: {registered[group.teacher_sha256]}")
    if own is not None:
        told.append(f"its own run reached {own.top1:.2f}")
    return "; ".join(told)


def _registered(notes: list[str]) -> dict[str, str]:
    """Hash of weights -> the newest artifact that holds them."""
    try:
        found = registry.list_artifacts(registry.default_folder())
    except IcdctlError as error:
        notes.append(f"the registry was not read: {error.message}")
        return {}
    return {artifact.sha256: artifact.reference for artifact in found}


def _delivered(run: Run, registered: Mapping[str, str]) -> list[tuple[str, str]]:
    """ONNX files and registered copies of a run, each with its hash."""
    found = []
    onnx = run.folder / "onnx" / "model.onnx"
    if onnx.is_file():
        found.append(("ONNX", files.sha256_file(onnx)))
    if run.sha256 in registered:
        found.append((f"registry: {registered[run.sha256]}", run.sha256))
    return found


def _short_hash(sha256: str | None) -> str:
    return "not known" if sha256 is None else sha256[:_SHORT_HASH]
