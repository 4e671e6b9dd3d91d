"""What can go wrong in a way that a person can fix.

IcdctlError            a known failure: exit 1
  UsageError           a name, a value or a combination that can't work: exit 2
  ArtifactError        a file that is missing, corrupt, hostile or not what it should be: exit 1

Every one carries a message (what, where, expected and got) and a hint (the command or the change that fixes it).
Anything else that leaves a command is a bug.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence


class IcdctlError(Exception):
    """A failure that was foreseen; the command line prints it without a traceback."""

    exit_code = 1

    def __init__(self, message: str, *, hint: str) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.messages: tuple[str, ...] = (message,)
        """More than one where several problems are told together; `message` joins them by line breaks."""
        self.hints: tuple[str, ...] = (hint,)


class UsageError(IcdctlError):
    """What was asked for can't be done, whatever the state of the files."""

    exit_code = 2


class ArtifactError(IcdctlError):
    """A file or folder is missing, broken, refused or in use."""


def unknown_name(kind: str, name: str, known: Iterable[str], *, listing: str) -> UsageError:
    """The error for a name that is in none of the tables, with the nearest spelling.

    Args:
        kind: what the name should have named, e.g. "method".
        name: as it was typed.
        known: the names that would have worked.
        listing: the command that shows them all.
    """
    names = list(known)
    by_folded = {candidate.lower(): candidate for candidate in names}
    nearest = difflib.get_close_matches(name.lower(), list(by_folded), n=1, cutoff=0.5)
    suggestion = f"did you mean `{by_folded[nearest[0]]}`? " if nearest else ""
    return UsageError(f"unknown {kind} `{name}`", hint=f"{suggestion}`{listing}` shows all of them")


def combine(problems: Sequence[IcdctlError]) -> IcdctlError:
    """One error that reports several, a line each. Where any is wrong usage, those are all that is said: what files are
    missing matters once the names are right."""
    wrong_usage = [problem for problem in problems if isinstance(problem, UsageError)]
    told: Sequence[IcdctlError] = wrong_usage or problems
    if len(told) == 1:
        return told[0]
    messages = tuple(dict.fromkeys(message for problem in told for message in problem.messages))
    hints = tuple(dict.fromkeys(hint for problem in told for hint in problem.hints))
    combined = type(told[0])("\n".join(messages), hint="\n".join(hints))
    combined.messages, combined.hints = messages, hints
    return combined
