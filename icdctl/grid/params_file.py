"""Entries written into a params.yaml that is kept by hand: every byte of the rest, comments included, stays as it is.

The places of keys and values are read off the YAML parser's events, entries are put there as text, and the result is
parsed again before it counts. ruamel.yaml keeps comments too, but puts a new last cell behind the comment of the
section that follows, and respaces collections in braces.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from icdctl import files
from icdctl.errors import ArtifactError, UsageError
from icdctl.files import yaml_reading

_WIDTH = 200
_INDENT = 2


@dataclass(frozen=True)
class Written:
    """Which entries were added, replaced or unchanged, by name: `seeds`, `cells.NAME`."""

    path: Path
    added: tuple[str, ...]
    replaced: tuple[str, ...]
    unchanged: tuple[str, ...]
    text: str
    """The entries that were written, as YAML."""


@dataclass(frozen=True)
class _Node:
    """The place of a value in a text."""

    start: int
    end: int
    in_flow: bool = False
    """Whether it is a collection in brackets or braces."""
    column: int = 0
    """Where the first key of a mapping begins."""
    children: Mapping[str, tuple[int, _Node]] = field(default_factory=dict)
    """Key -> where the key begins, and its value."""


@dataclass(frozen=True)
class _Edit:
    start: int
    end: int
    text: str


def write_entries(path: Path, entries: Mapping[str, object], *, replace: bool = False) -> Written:
    """Put entries into the sections of a params.yaml, which is created if it does not exist.

    Args:
        path: the file.
        entries: section -> its entries by name, which join the existing ones; or -> a value that is not a
            mapping, which is the whole section.
        replace: overwrite an existing entry that differs.

    Raises:
        UsageError: an entry differs from the existing one of its name, or a section is not a mapping.
        ArtifactError: the file is not YAML, or can't be written.
    """
    with files.lock_beside(path):
        text = _read(path)
        content = parse(text, path)
        changes = _Changes(path, content, replace=replace)
        made = changes.made_in(text, entries)
        _check_kept(path, content, made, entries)
        if made != text:
            files.write_text(path, made)
    return changes.report(entries)


def dump(entries: Mapping[str, object]) -> str:
    """Entries as YAML in the form of params.yaml: keys in their order, innermost collections on one line."""
    parts = []
    for key, value in entries.items():
        style = None if isinstance(value, dict | list) else False
        parts.append(
            yaml.safe_dump({key: value}, sort_keys=False, default_flow_style=style, width=_WIDTH, allow_unicode=True)
        )
    return "".join(parts)


def parse(text: str, path: Path) -> dict[str, object]:
    """The content of a params.yaml; empty where the file is empty.

    Raises:
        ArtifactError: it is not YAML, or not a mapping.
    """
    hint = f"fix `{path}`, or name another file with `--to`"
    try:
        content = yaml_reading.parse_yaml(text)
    except ValueError as error:
        raise ArtifactError(f"`{path}` can't be read as YAML: {error}", hint=hint) from error
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ArtifactError(f"`{path}` does not hold a mapping", hint=hint)
    return content


def read(path: Path) -> dict[str, object]:
    """The content of a params.yaml; empty where there is no file.

    Raises:
        ArtifactError: it can't be read, is not YAML, or not a mapping.
    """
    return parse(_read(path), path)


def _read(path: Path) -> str:
    try:
        return files.read_text(path, most_bytes=yaml_reading.LARGEST_YAML_BYTES)
    except FileNotFoundError:
        return ""
    except (OSError, ValueError) as error:
        raise ArtifactError(f"`{path}` can't be read: {error}", hint="name another file with `--to`") from error


class _Changes:
    """Collected edits of one text; their places refer to the text before all edits."""

    def __init__(self, path: Path, content: Mapping[str, object], *, replace: bool) -> None:
        self._path = path
        self._content = content
        self._replace = replace
        self._edits: list[_Edit] = []
        self._tail: list[str] = []
        self._added: list[str] = []
        self._replaced: list[str] = []
        self._unchanged: list[str] = []
        self._differing: list[str] = []

    def made_in(self, text: str, entries: Mapping[str, object]) -> str:
        """The text with the entries."""
        top = _places(text)
        for section, given in entries.items():
            if section not in top.children:
                self._new_section(top, section, given)
            elif isinstance(given, Mapping):
                self._join(text, section, top.children[section][1], given, in_flow=top.in_flow)
            else:
                self._put(text, "", section, self._content[section], given, top)
        if self._differing:
            named = ", ".join(f"`{name}`" for name in self._differing)
            raise UsageError(f"`{self._path}` has another {named}", hint="`--replace` overwrites what differs")
        newline = "\r\n" if "\r\n" in text else "\n"
        for edit in sorted(self._edits, key=lambda edit: (edit.start, edit.end), reverse=True):
            text = text[: edit.start] + edit.text.replace("\n", newline) + text[edit.end :]
        for part in self._tail:
            gap = "" if not text else newline if text.endswith("\n") else 2 * newline
            text += gap + part.replace("\n", newline)
        return text

    def report(self, entries: Mapping[str, object]) -> Written:
        """Which entries were added, replaced or unchanged."""
        written = {*self._added, *self._replaced}
        parts = []
        for section, given in entries.items():
            if isinstance(given, Mapping):
                kept = {name: value for name, value in given.items() if f"{section}.{name}" in written}
                parts += [dump({section: kept})] if kept else []
            elif section in written:
                parts.append(dump({section: given}))
        lists = (tuple(self._added), tuple(self._replaced), tuple(self._unchanged))
        return Written(self._path, *lists, text="".join(parts))

    def _new_section(self, top: _Node, section: str, given: object) -> None:
        names = [f"{section}.{name}" for name in given] if isinstance(given, Mapping) else [section]
        self._added += names
        if top.in_flow:
            self._edits.append(_Edit(top.start + 1, top.start + 1, f"{flow_entry(section, given)}, "))
        else:
            self._tail.append(_indented(dump({section: given}), top.column))

    def _join(self, text: str, section: str, node: _Node, given: Mapping[str, object], *, in_flow: bool) -> None:
        """Add entries to an existing section."""
        held = self._content[section]
        if held is not None and not isinstance(held, dict):
            raise UsageError(
                f"`{section}` in `{self._path}` is not a mapping", hint="make it one, or name another file"
            )
        new = {}
        for name, value in given.items():
            if name in (held or {}):
                if name not in node.children:
                    raise _not_editable(self._path)  # it is the value of an alias
                self._put(text, f"{section}.", name, (held or {})[name], value, node)
            else:
                new[name] = value
        self._added += [f"{section}.{name}" for name in new]
        if not new:
            return
        if node.in_flow and node.children:
            self._insert(node.start + 1, "".join(f"{flow_entry(name, value)}, " for name, value in new.items()))
        elif in_flow:
            inner = ", ".join(flow_entry(name, value) for name, value in new.items())
            self._edits.append(_Edit(node.start, node.end, f" {{{inner}}}"))
        else:
            if not node.children:  # `{}`, `null` or nothing
                self._edits.append(_Edit(node.start, node.end, ""))
            lines = _indented(dump(new), node.column if node.children else _INDENT)
            end = _line_end(text, node.end)
            self._insert(end, lines if end == 0 or text[end - 1] == "\n" else f"\n{lines}")

    def _put(self, text: str, before: str, key: str, held: object, given: object, parent: _Node) -> None:
        """Replace the entry of that key in a mapping; `before` is the prefix of its name in messages."""
        name = f"{before}{key}"
        if held == given:
            self._unchanged.append(name)
            return
        if not self._replace and held is not None:  # null is empty
            self._differing.append(name)
            return
        self._replaced.append(name)
        start, value = parent.children[key]
        if parent.in_flow:
            gap = "" if value.end > value.start else " "
            self._edits.append(_Edit(value.start, value.end, gap + _one_line(given)))
            return
        end = value.end - 1 if text[value.end - 1] == "\n" else value.end  # of a block of text
        column = start - (text.rfind("\n", 0, start) + 1)
        self._edits.append(_Edit(start, end, _indented(dump({key: given}), column).strip()))

    def _insert(self, place: int, text: str) -> None:
        self._edits.append(_Edit(place, place, text))


def _check_kept(path: Path, before: Mapping[str, object], made: str, entries: Mapping[str, object]) -> None:
    """Check that the new text says what it should, and that no key was lost.

    Raises:
        ArtifactError: it does not, e.g. because of anchors or merged keys.
    """
    try:
        after = parse(made, path)
    except ArtifactError as error:
        raise _not_editable(path) from error
    for section in {*before, *entries}:
        given, held, found = entries.get(section, {}), before.get(section), after.get(section)
        if section not in entries:
            is_kept = section in after
        elif isinstance(given, Mapping):
            names = {*(held if isinstance(held, dict) else {}), *given}
            is_kept = (
                isinstance(found, dict)
                and found.keys() == names
                and all(found[name] == value for name, value in given.items())
            )
        else:
            is_kept = found == given
        if not is_kept:
            raise _not_editable(path)


def _not_editable(path: Path) -> ArtifactError:
    return ArtifactError(
        f"entries can't be added to `{path}` in the way it is written",
        hint="write to another file with `--to`, and take the entries over by hand",
    )


def _places(text: str) -> _Node:
    """The places of the top-level mapping of a text and of what is in it.

    Raises:
        yaml.YAMLError: it is not YAML; `parse` has reported that before.
    """
    events = iter(yaml.parse(text, Loader=yaml.SafeLoader))
    for event in events:
        if isinstance(event, yaml.MappingStartEvent):
            return _node(events, event)
    return _Node(0, 0)


def _node(events: Iterator[yaml.Event], event: yaml.Event) -> _Node:
    """The value that an event begins, and the events up to its end."""
    start, end = event.start_mark.index, event.end_mark.index
    if isinstance(event, yaml.SequenceStartEvent):
        while not isinstance(item := next(events), yaml.SequenceEndEvent):
            end = _node(events, item).end
        return _Node(start, item.end_mark.index if event.flow_style else end, in_flow=bool(event.flow_style))
    if not isinstance(event, yaml.MappingStartEvent):
        return _Node(start, end)
    children: dict[str, tuple[int, _Node]] = {}
    column = 0
    while not isinstance(key := next(events), yaml.MappingEndEvent):
        column = column if children else key.start_mark.column
        _node(events, key)
        value = _node(events, next(events))
        children[str(getattr(key, "value", ""))] = (key.start_mark.index, value)
        end = value.end
    return _Node(start, key.end_mark.index if event.flow_style else end, bool(event.flow_style), column, children)


def _line_end(text: str, place: int) -> int:
    """The place after the line that a value ends on; a block of text includes its line break."""
    if place and text[place - 1] == "\n":
        return place
    end = text.find("\n", place)
    return len(text) if end < 0 else end + 1


def _indented(text: str, columns: int) -> str:
    return "".join(f"{' ' * columns}{line}" for line in text.splitlines(keepends=True))


def _one_line(value: object) -> str:
    """A value in brackets and braces, on one line."""
    text = str(
        yaml.safe_dump([value], default_flow_style=True, sort_keys=False, width=float("inf"), allow_unicode=True)
    )
    return text.strip()[1:-1]


def flow_entry(name: str, value: object) -> str:
    """An entry on one line: `name: {gamma: 2.0}`."""
    return f"{_one_line(name)}: {_one_line(value)}"
