"""Values of files as text for Markdown: they end no table cell, no span of code and no line, and become no markup."""

from __future__ import annotations

import html
import re

_TAG = re.compile(r"<(?=[A-Za-z/!?])")
_BLOCK = re.compile(r"^(\d*)(?=[#>]|[+*-](?:\s|$)|[=~-]{3}|(?<=\d)[.)]\s)")
"""Where a line would begin a heading, a quotation, a list or a ruler, unless a `\\` stands there."""


def one_line(value: object) -> str:
    """Text without line breaks and control characters."""
    text = " ".join(str(value).split())
    return "".join(character if character.isprintable() else "?" for character in text)


def markdown(value: object) -> str:
    """One line of Markdown that shows the value as it is."""
    text = re.sub(r"([\\`|\[\]])", r"\\\1", one_line(value))
    return _BLOCK.sub(r"\1\\", _TAG.sub("&lt;", text), count=1)


def code(value: object) -> str:
    """A span of code in Markdown; quotes stand in place of backticks, which would end it."""
    text = one_line(value).replace("`", "'")
    # Not all programs that show Markdown keep tags inside backticks from being tags.
    return f"<code>{html.escape(text, quote=False)}</code>" if _TAG.search(text) else f"`{text}`"


def with_code(text: str) -> str:
    """One line of Markdown from text whose parts between backticks are code, as in icdctl's own messages."""
    parts = one_line(text).split("`")
    if len(parts) % 2 == 0:  # a backtick is not closed
        return markdown(text)
    plain = [re.sub(r"([\[\]])", r"\\\1", _TAG.sub("&lt;", part)) for part in parts[::2]]
    shown = [plain[place // 2] if place % 2 == 0 else part for place, part in enumerate(parts)]
    return _BLOCK.sub(r"\1\\", "`".join(shown), count=1)


def cell(text: str) -> str:
    """A cell of a table in Markdown, from text as for `with_code`; `|` would end the cell, in code too."""
    return re.sub(r"(?<!\\)\|", r"\\|", with_code(text))
