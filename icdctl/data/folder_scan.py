"""Find the image files below a folder, and keep account of every other file: how many are not read, and why."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path, PurePath

from icdctl.data.image_formats import NOT_READ, SUFFIXES
from icdctl.errors import ArtifactError

_OF_OTHER_PROGRAMS = frozenset(
    {
        *("@eadir", "@__thumb", "@recycle", "#recycle", "$recycle.bin", "lost+found", "system volume information"),
        *("@recently-snapshot", "#snapshot", "__macosx", "__pycache__"),
    }
)
"""Lower-case names of folders that file servers and desktops add: thumbnails and deleted files, never classes."""
_FILES_OF_OTHER_PROGRAMS = frozenset({"thumbs.db", "ehthumbs.db", "desktop.ini", "icon\r"})
_LONGEST_SUFFIX = 12


class LeftOut:
    """The files of a folder that are not read, counted by reason, with one example of each."""

    def __init__(self) -> None:
        self._found: dict[str, tuple[int, str]] = {}
        self.may_be_images = False
        """Whether some of them may be images."""

    @property
    def count(self) -> int:
        """Number of files."""
        return sum(count for count, _ in self._found.values())

    def add(self, reason: str, path: PurePath, *, may_be_image: bool = False) -> None:
        """Count a file or a link, once.

        Args:
            reason: why it is not read, to be read after a number.
            path: its path, relative to the folder of the data set.
            may_be_image: whether users may take it for an image of the data set.
        """
        count, example = self._found.get(reason, (0, _printable(path.as_posix())))
        self._found[reason] = (count + 1, example)
        self.may_be_images |= may_be_image

    def add_below(self, reason: str, folder: Path, base: Path, *, may_be_image: bool = False) -> None:
        """Count all files at any depth below `folder`; a link to a folder counts as one and is not followed.

        Args:
            reason: as for `add`.
            folder: the folder to look into.
            base: the folder of the data set.
            may_be_image: as for `add`; only files with the suffix of an image count as such.
        """
        if folder.is_symlink():
            self.add(reason, folder.relative_to(base), may_be_image=may_be_image)
            return
        for place, folders, names in os.walk(folder):
            folders.sort()
            for name in sorted(names):
                self.add(
                    reason, Path(place, name).relative_to(base), may_be_image=may_be_image and looks_like_image(name)
                )

    def __str__(self) -> str:
        """The files by reason, the most frequent first, in one line; empty where every file is read."""
        ordered = sorted(self._found.items(), key=lambda item: (-item[1][0], item[0]))
        return ", ".join(f"{count:,} {reason}, e.g. `{example}`" for reason, (count, example) in ordered)

    def as_note(self) -> str | None:
        """The line for users; None where every file is read."""
        if not self._found:
            return None
        return f"{'warning: ' if self.may_be_images else ''}files that are not read: {self}"


def images_below(base: Path, left_out: LeftOut | None = None, *, relative_to: Path | None = None) -> Iterator[Path]:
    """The image files at any depth below a folder, found by suffix; links are followed, but never in circles.

    A link upwards would bring in the images of other classes, so the folders above `base` count as visited.

    Args:
        base: the folder to look into.
        left_out: counts the other files; None where nobody asks.
        relative_to: the folder that the paths in `left_out` start from; None for `base`.

    Raises:
        ArtifactError: a folder can't be read.
    """
    if not base.is_dir():
        return
    account, start = left_out or LeftOut(), relative_to or base
    seen = {os.path.realpath(above) for above in (*base.parents, *base.resolve().parents)}
    for place, folders, names in os.walk(base, followlinks=True, onerror=refuse_unreadable):
        real = os.path.realpath(place)
        if real in seen:
            account.add("links to a folder that is read already", Path(place).relative_to(start))
            folders.clear()
            continue
        seen.add(real)
        for name in sorted(name for name in folders if passed_over(name)):
            account_for_folder(account, Path(place, name), start)
        folders[:] = [name for name in folders if not passed_over(name)]
        for name in names:
            if is_image(name):
                yield Path(place, name)
            else:
                account_for_file(account, Path(place, name), start)


def passed_over(folder_name: str) -> bool:
    """Whether a folder is hidden, or one that another program added."""
    return folder_name.startswith(".") or folder_name.lower() in _OF_OTHER_PROGRAMS


def is_image(file_name: str) -> bool:
    """Whether a file counts as an image, by its name alone."""
    return not file_name.startswith(".") and _suffix(file_name) in SUFFIXES


def is_dangling(path: Path) -> bool:
    """Whether a path is a link whose target does not exist."""
    return os.path.islink(path) and not os.path.exists(path)


def looks_like_image(file_name: str) -> bool:
    """Whether a file is an image that is read, or one that another program would read."""
    return is_image(file_name) or (not file_name.startswith(".") and _suffix(file_name) in NOT_READ)


def account_for_folder(left_out: LeftOut, folder: Path, base: Path) -> None:
    """Count the files of a folder that is passed over."""
    hidden = folder.name.startswith(".")
    left_out.add_below("hidden" if hidden else f"of other programs (`{folder.name}/`)", folder, base)


def account_for_file(left_out: LeftOut, path: Path, base: Path) -> None:
    """Count a file that is not an image by its name, or a link to a folder that is gone."""
    suffix, relative = _suffix(path.name), path.relative_to(base)
    if path.name.startswith("."):
        left_out.add("hidden", relative)
    elif path.name.lower() in _FILES_OF_OTHER_PROGRAMS:
        left_out.add("of other programs", relative)
    elif is_dangling(path):
        left_out.add("links whose target does not exist", relative, may_be_image=True)
    elif suffix in NOT_READ:
        left_out.add(f"`{suffix}` ({NOT_READ[suffix]})", relative, may_be_image=True)
    elif suffix:
        left_out.add(f"`{suffix}`", relative)
    else:
        left_out.add("without the suffix of an image", relative)


def _suffix(name: str) -> str:
    """The lower-case suffix of a file's name; empty where what follows the last dot is no usual suffix."""
    suffix = os.path.splitext(name)[1].lower()
    return suffix if len(suffix) <= _LONGEST_SUFFIX and suffix[1:].isalnum() else ""


def _printable(path: str) -> str:
    """A path as text that a terminal shows: bytes that are not UTF-8 and control characters are escaped."""
    text = path.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode("ascii") for char in text)


def refuse_unreadable(error: OSError) -> None:
    """Stop at an unreadable folder: without it, the data set would silently have another size."""
    raise ArtifactError(
        f"image folder `{error.filename}` can't be read: {error.strerror or error}", hint="check its permissions"
    ) from error
