"""Errors that users can fix.

IcdctlError            a known failure: exit 1
  UsageError           a name, a value or a combination that can't work: exit 2
  ArtifactError        a file that is missing, corrupt, unsafe or of another kind than expected: exit 1

Each has a message (what, where, expected and got) and a hint (the command or the change that fixes it). Any other
exception that leaves a command is a bug.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

_HIDDEN = "***"
_SECRET_NAME = r"(?:password|passwd|secret|token|api[_-]?key|access[_-]?key|signature|credentials?)"
_SECRETS = (
    # A password with a slash in it, and what stands before `@` in the host's part of a URL.
    (re.compile(r"(://)[^\s/@:'\"`]{1,99}:(?!\d+/)[^\s/@'\"`]{0,999}/[^\s@'\"`]{0,999}@"), rf"\1{_HIDDEN}@"),
    (re.compile(r"(://)[^\s/?#'\"`]*@"), rf"\1{_HIDDEN}@"),
    (re.compile(r"([?&](?:key|sig|auth|code)=)[^\s&#'\"`]+", re.IGNORECASE), rf"\1{_HIDDEN}"),
    (re.compile(rf"({_SECRET_NAME}[\w-]{{0,99}}=)[^\s&#'\"`]+", re.IGNORECASE), rf"\1{_HIDDEN}"),
    (re.compile(r"(authorization:\s*(?:\w+\s+)?)[^\s'\"`]+", re.IGNORECASE), rf"\1{_HIDDEN}"),
    (re.compile(r"\b(?:gh[opsru]_|github_pat_|glpat-|hf_|xox[abprs]-|AKIA)[\w-]{16,}"), _HIDDEN),
)
"""What passwords and tokens look like in text, and what is written in their place.

The text may come from a hostile file, so the time that a pattern takes must not grow faster than the text.
"""
_FLAG = re.compile(r"-{1,2}[\w-]+")
_LONGEST_LINE = 4000
"""Most characters of a line in a message; the errors of other libraries may hold a whole damaged file."""


def without_secrets(text: str) -> str:
    """Text for a terminal or a file, with `***` in the place of passwords and tokens."""
    for pattern, shown in _SECRETS:
        text = pattern.sub(shown, text)
    return text


def arguments_without_secrets(arguments: Sequence[str]) -> list[str]:
    """The words of a command line, with `***` in the place of passwords and tokens."""
    follows = [False, *(_names_secret(word) for word in arguments)]
    return [_HIDDEN if hidden else without_secrets(word) for word, hidden in zip(arguments, follows, strict=False)]


def _names_secret(word: str) -> bool:
    """Whether a word is a flag whose value is a secret."""
    return bool(_FLAG.fullmatch(word) and re.search(_SECRET_NAME, word, re.IGNORECASE))


def _for_message(text: str) -> str:
    """Text as a message may have it: no secrets, no line too long to be read."""
    lines = []
    for line in text.split("\n"):
        num_more = len(line) - _LONGEST_LINE
        lines.append(line if num_more <= 0 else f"{line[:_LONGEST_LINE]}... ({num_more:,} more characters)")
    return without_secrets("\n".join(lines))


class IcdctlError(Exception):
    """A known failure; the command line prints its message and hint, without a traceback."""

    exit_code = 1

    def __init__(self, message: str, *, hint: str) -> None:
        message, hint = _for_message(message), _for_message(hint)
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.messages: tuple[str, ...] = (message,)
        """The messages of all problems, where one error reports several; `message` joins them with line breaks."""
        self.hints: tuple[str, ...] = (hint,)


class UsageError(IcdctlError):
    """The user asked for something impossible, whatever the state of the files."""

    exit_code = 2


class ArtifactError(IcdctlError):
    """A file or folder is missing, broken, refused or in use."""


def unknown_name(kind: str, name: str, known: Iterable[str], *, listing: str) -> UsageError:
    """The error for an unknown name, with the nearest known name in its hint.

    Args:
        kind: the kind of thing that has the name, e.g. "method".
        name: the unknown name, as typed.
        known: all known names.
        listing: the command that shows all known names.
    """
    names = list(known)
    by_folded = {candidate.lower(): candidate for candidate in names}
    nearest = difflib.get_close_matches(name.lower(), list(by_folded), n=1, cutoff=0.5)
    suggestion = f"did you mean `{by_folded[nearest[0]]}`? " if nearest else ""
    return UsageError(f"unknown {kind} `{name}`", hint=f"{suggestion}`{listing}` shows all of them")


def first_few(names: Sequence[str], most: int) -> str:
    """`a, b, ...`: the first names, and whether there are more."""
    return ", ".join([*names[:most], *(["..."] if len(names) > most else [])])


def combine(problems: Sequence[IcdctlError]) -> IcdctlError:
    """One error that reports several problems, a line each.

    Where some are UsageErrors, only these are reported: missing files matter only once the names are right.
    """
    wrong_usage = [problem for problem in problems if isinstance(problem, UsageError)]
    reported: Sequence[IcdctlError] = wrong_usage or problems
    if len(reported) == 1:
        return reported[0]
    messages = tuple(dict.fromkeys(message for problem in reported for message in problem.messages))
    hints = tuple(dict.fromkeys(hint for problem in reported for hint in problem.hints))
    combined = type(reported[0])("\n".join(messages), hint="\n".join(hints))
    combined.messages, combined.hints = messages, hints
    return combined


_NO_MEMORY = (
    "can't allocate memory",
    "cannot allocate memory",
    "failed to allocate memory",
    "out of memory",
    "bad allocation",
    "bad_alloc",
    "failed to map segment",
    "can't start new thread",
    "could not create a primitive",  # oneDNN's, and that is all it says
    "could not create a memory",
)
"""What exceptions say when memory is short: the system's, torch's and ONNX Runtime's have no class in common."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception of Python, NumPy, torch, ONNX Runtime or the system says that memory is short."""
    if isinstance(error, MemoryError):
        return True
    text = str(error).lower()
    return not isinstance(error, IcdctlError) and any(words in text for words in _NO_MEMORY)


def out_of_memory(error: BaseException, *, where: str = "icdctl", hint: str = "") -> IcdctlError:
    """The error for an exception that `is_out_of_memory` knows.

    Args:
        error: the exception.
        where: what ran out of memory, e.g. "`cpu`".
        hint: what needs less memory; by default what helps everywhere.
    """
    said = str(error).strip().splitlines()
    return IcdctlError(
        f"{where} ran out of memory" + (f": {said[0]}" if said else ""),
        hint=hint or "use fewer or smaller images and smaller batches, or end other programs",
    )


@contextmanager
def memory_reported(*, where: str = "icdctl", hint: str = "") -> Iterator[None]:
    """Raise `out_of_memory` in place of an exception that says so; arguments as there."""
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        raise out_of_memory(error, where=where, hint=hint) from error
