"""A self-contained page: it needs no other file and no network, follows light and dark mode, and can be printed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import jinja2
from markupsafe import Markup, escape

from icdctl.files import markup
from icdctl.files.markup import markdown, with_code
from icdctl.reporting.drawing import Picture
from icdctl.versions import versions

TEMPLATE = "page.html.jinja"
_LONG = 60
"""Characters; longer text in a cell is broken into lines."""


@dataclass(frozen=True)
class PageTable:
    """A table of text on the page."""

    title: str
    headers: Sequence[str]
    rows: Sequence[Sequence[str]]
    notes: Sequence[str] = ()

    @property
    def kinds(self) -> list[str]:
        """The kind of each column: `number` if all its cells begin with a number, for alignment and sorting; `hash`;
        `long` if a cell has long text, so that it gets enough width; empty for all others."""
        columns = zip(*self.rows, strict=True) if self.rows else ((),) * len(self.headers)
        return [_kind(header, column) for header, column in zip(self.headers, columns, strict=True)]

    def without_empty_columns(self) -> PageTable:
        """The same table without the columns that are empty in every row."""
        filled = [place for place in range(len(self.headers)) if any(row[place] for row in self.rows)]
        rows = tuple(tuple(row[place] for place in filled) for row in self.rows)
        return PageTable(self.title, tuple(self.headers[place] for place in filled), rows, self.notes)


def _kind(header: str, column: Sequence[str]) -> str:
    if any(column) and all(not cell or _is_number(cell) for cell in column):
        return "number"
    if header == "sha256":
        return "hash"
    return "long" if any(len(cell) > _LONG for cell in column) else ""


def _is_number(text: str) -> bool:
    first = text.split()[0].replace(",", "") if text.strip() else ""
    try:
        float(first)
    except ValueError:
        return first == "<"
    return True


@dataclass(frozen=True)
class Section:
    """A part of the page."""

    anchor: str
    title: str
    paragraphs: Sequence[str] = ()
    tables: Sequence[PageTable] = ()
    pictures: Sequence[Picture] = ()


@dataclass(frozen=True)
class Page:
    """The content of the page."""

    title: str
    about: Sequence[str]
    sections: Sequence[Section]
    notes: Sequence[str] = field(default=())
    """What the page leaves out, and why."""


def render_page(page: Page) -> str:
    """The page as HTML."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("icdctl.reporting", "."),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters["marked"] = _marked
    return environment.get_template(TEMPLATE).render(page=page, version=versions(["icdctl"])["icdctl"])


def _marked(text: str) -> Markup:
    """Text as HTML; the parts between backticks become code."""
    parts = str(escape(text)).split("`")
    if len(parts) % 2 == 0:  # a backtick is not closed
        return Markup("`".join(parts))
    return Markup("".join(part if place % 2 == 0 else f"<code>{part}</code>" for place, part in enumerate(parts)))


def render_markdown(page: Page) -> str:
    """The page as Markdown, with links to the figures, for a terminal or a pull request."""
    lines = [f"# {markdown(page.title)}", "", *(f"{with_code(text)}\n" for text in page.about)]
    for section in page.sections:
        lines += [f"## {markdown(section.title)}", ""]
        lines += [f"{with_code(text)}\n" for text in section.paragraphs]
        for table in section.tables:
            lines += [f"### {markdown(table.title)}", ""]
            lines += ["| " + " | ".join(_escaped(cell) for cell in row) + " |" for row in (table.headers, *table.rows)]
            lines.insert(len(lines) - len(table.rows), "|" + "---|" * len(table.headers))
            lines += ["", *(f"{with_code(note)}\n" for note in table.notes)]
        lines += [f"![{markdown(picture.title)}](figures/{picture.name}.svg)\n" for picture in section.pictures]
    lines += [f"- {with_code(note)}" for note in page.notes]
    return "\n".join(lines).rstrip() + "\n"


def _escaped(cell: str) -> str:
    return markup.cell(cell)
