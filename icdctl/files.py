"""Files that are complete or absent: atomic writes, hashes, locks, and the folders where icdctl keeps its state."""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path
from typing import IO, Any

import filelock

from icdctl.errors import ArtifactError

LARGEST_FOREIGN_BYTES = 2 * 1024**3
"""Largest weights file, graph or image that is read; larger files are refused."""

JsonObject = dict[str, Any]
"""A JSON object that was read from somewhere or is about to be written; its values are checked where they are used."""

_CHUNK_BYTES = 1 << 20
_LOCK_PAUSE_SECONDS = 0.5


def sha256_bytes(content: bytes) -> str:
    """Hex digest of `content`."""
    return hashlib.sha256(content).hexdigest()


def sha256_file(path: Path) -> str:
    """Hex digest of a file, read in pieces."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def md5_file(path: Path) -> str:
    """Hex md5 of a file, read in pieces; for files whose publisher states no better hash."""
    digest = hashlib.md5(usedforsecurity=False)
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def write_bytes(path: Path, content: bytes) -> None:
    """Write `content` under a temporary name beside `path`, then rename it: readers see the old file or the new one.

    Raises:
        ArtifactError: the folder can't be written to, or the disk is full.
    """
    make_folder(path.parent)
    temporary = temporary_beside(path)
    try:
        with temporary.open("xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        raise not_writable(path, error) from error
    finally:
        with suppress(OSError):  # a name too long, which the error has said already
            temporary.unlink(missing_ok=True)


def temporary_beside(path: Path) -> Path:
    """A new hidden name in the folder of `path`, `.<name>.<8 characters>`, where nothing is yet.

    What is created there gets the permissions that the umask leaves, as the final file should have them. The functions
    of `tempfile` keep group and others out whatever the umask says.
    """
    return path.parent / f".{path.name}.{secrets.token_hex(4)}"


def write_text(path: Path, text: str) -> None:
    """Write text as UTF-8, with `write_bytes`."""
    write_bytes(path, text.encode("utf-8"))


def write_json(path: Path, value: object) -> None:
    """Write a value as indented JSON, with `write_bytes`; keys keep their order, NaN raises ValueError."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False, ensure_ascii=False) + "\n")


def read_json(path: Path, *, what: str, hint: str) -> Any:
    """Read a JSON file that icdctl wrote.

    Args:
        path: the file.
        what: the kind of file, for the message, e.g. "run folder".
        hint: the hint where the file is missing or broken.

    Raises:
        ArtifactError: the file is missing, can't be read or is not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ArtifactError(f"no {what}: `{path}` does not exist", hint=hint) from error
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise ArtifactError(f"{what} can't be read: `{path}`: {error}", hint=hint) from error


def read_foreign(path: Path, *, what: str, example: str, again: str) -> bytes:
    """Read a file from an untrusted source; the message says what it is instead, where it is a common mistake.

    Args:
        path: the file.
        what: the kind of file that is expected, for messages, e.g. "weight file".
        example: an example of the name of such a file.
        again: the hint where the file is empty.

    Raises:
        ArtifactError: the file is missing, a folder, unreadable, empty, larger than 2 GiB, a git-lfs pointer or a web
            page.
    """
    try:
        state = path.stat()
        if stat.S_ISDIR(state.st_mode):
            raise ArtifactError(f"`{path}` is a folder, not the {what}", hint=f"name the file in it, e.g. `{example}`")
        if not stat.S_ISREG(state.st_mode):  # a device or a pipe never ends
            raise ArtifactError(f"`{path}` is a device or a pipe, not the {what}", hint="name a file on a disk")
        if state.st_size > LARGEST_FOREIGN_BYTES:
            raise ArtifactError(f"`{path}` is refused: it is larger than 2 GiB", hint=f"name the right {what}")
        content = path.read_bytes()
    except FileNotFoundError as error:
        raise ArtifactError(f"{what} `{path}` does not exist", hint="check the path") from error
    except OSError as error:
        raise ArtifactError(
            f"{what} `{path}` can't be read: {error.strerror or error}", hint="check its permissions and the disk"
        ) from error
    if not content:
        raise ArtifactError(f"{what} `{path}` is empty", hint=again)
    if content.startswith(b"version https://git-lfs"):
        raise ArtifactError(
            f"`{path}` is a git-lfs pointer, not the {what} it points to",
            hint="run `git lfs pull` in the repository that it comes from",
        )
    if content[:512].lstrip().lower().startswith((b"<!doctype", b"<html", b"<?xml", b"<head")):
        raise ArtifactError(
            f"`{path}` is a web page, not the {what}",
            hint="the server answered with a page (a login or an error) instead of the file; download it again",
        )
    return content


def make_folder(path: Path) -> None:
    """Create a folder and its parents; a new state folder gets a `.gitignore`, so that git ignores it.

    Raises:
        ArtifactError: the folder can't be created.
    """
    new_state = None if path.is_dir() else _state_folder_to_make(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise not_writable(path, error) from error
    if new_state is not None:
        write_text(new_state / ".gitignore", "# written by icdctl, so that git leaves this folder alone\n*\n")


def _state_folder_to_make(path: Path) -> Path | None:
    """The state folder, where creating `path` would create it; None where it exists or is not part of `path`."""
    home = state_folder().absolute()
    return home if home in (path.absolute(), *path.absolute().parents) and not home.exists() else None


def not_writable(path: Path, error: OSError) -> ArtifactError:
    """The error for a file or folder that can't be written."""
    return ArtifactError(
        f"`{path}` can't be written: {error.strerror or error}",
        hint="choose a folder that you may write to, on a disk with room, with `--out` or `ICDCTL_HOME`",
    )


@contextmanager
def locked(path: Path, *, busy: str, hint: str, waiting: Callable[[str], None] | None = None) -> Iterator[None]:
    """Hold the lock file `path` while the block runs. The system frees the lock of a process that dies.

    Args:
        path: the lock file.
        busy: the message where another process holds the lock.
        hint: the hint for this message.
        waiting: called with the message, where given; then the lock is waited for, instead of failing.

    Raises:
        ArtifactError: another process holds the lock and `waiting` is None, or the lock file can't be written.
    """
    make_folder(path.parent)
    lock: filelock.BaseFileLock = filelock.FileLock(path)
    try:
        lock.acquire(blocking=False)
    except filelock.Timeout as error:
        if waiting is not None:
            waiting(f"waiting: {busy}")
        # Try once more in any case, because a process that only checks the lock holds it for a moment.
        later = _acquire_when_free(path, attempts=1 if waiting is None else None)
        if later is None:
            raise ArtifactError(busy, hint=hint) from error
        lock = later
    except OSError as error:
        raise not_writable(path, error) from error
    try:
        yield
    finally:
        # Removed while it is held: a process that opened the file meanwhile has already seen that it is locked.
        path.unlink(missing_ok=True)
        lock.release()


def _acquire_when_free(path: Path, *, attempts: int | None) -> filelock.BaseFileLock | None:
    """Wait for a lock whose holder deletes the lock file at the end, so each attempt opens the file again.

    Returns:
        The lock; None where `attempts` attempts have failed.
    """
    for _ in count() if attempts is None else range(attempts):
        time.sleep(_LOCK_PAUSE_SECONDS)
        lock = filelock.FileLock(path)
        try:
            lock.acquire(blocking=False)
        except filelock.Timeout:
            continue
        if path.exists():  # not deleted between being opened and being locked
            return lock
        lock.release()
    return None


@contextmanager
def waited_lock(path: Path) -> Iterator[None]:
    """Hold the lock file `path` while the block runs; wait while another process holds it."""
    make_folder(path.parent)
    lock = filelock.FileLock(path)
    try:
        lock.acquire()
    except OSError as error:
        raise not_writable(path, error) from error
    try:
        yield
    finally:
        lock.release()


def hold_mapped(file: IO[bytes]) -> None:
    """Mark an open file of a cache as in use, until all processes have closed and unmapped it.

    A memory map keeps the mark after the file is closed, and the system frees the marks of a process that dies.

    Raises:
        FileNotFoundError: the file was deleted after it was opened.
    """
    try:
        import fcntl

        fcntl.flock(file.fileno(), fcntl.LOCK_SH)
    except (ImportError, OSError):  # on Windows there are no such marks, but a mapped file can't be deleted
        return
    if os.fstat(file.fileno()).st_nlink == 0:
        raise FileNotFoundError(file.name)


@contextmanager
def unless_locked(path: Path) -> Iterator[bool]:
    """Whether a file is neither locked nor marked by `hold_mapped`; if so, no process can do either in the block."""
    try:
        import fcntl
    except ImportError:  # see `hold_mapped`
        yield True
        return
    with path.open("rb") as file:
        try:
            fcntl.flock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            yield False
        else:
            yield True


def is_locked(path: Path) -> bool:
    """Whether a process holds a lock file, or has marked a file with `hold_mapped`; False where the file is missing."""
    try:
        with unless_locked(path) as is_free:
            return not is_free
    except OSError:
        return False


def mark_used(path: Path) -> None:
    """Set a file's modification time to now, to record its use; nothing happens where that is not permitted."""
    with suppress(OSError):
        os.utime(path)


def project_root() -> Path:
    """The project's root: the nearest folder upwards that holds `dvc.yaml` or `registry/`, else the current folder."""
    here = Path.cwd()
    for folder in (here, *here.parents):
        registry = folder / "registry"
        is_package = (registry / "__init__.py").is_file()  # icdctl's own package `registry`, in a development checkout
        if (folder / "dvc.yaml").is_file() or (registry.is_dir() and not is_package):
            return folder
    return here


def state_folder() -> Path:
    """The folder of checkpoints, caches and data: `ICDCTL_HOME`, or `.icdctl` in the project's root."""
    given = os.environ.get("ICDCTL_HOME")
    return user_path(given) if given else project_root() / ".icdctl"


def cache_folder() -> Path:
    """The folder of files that can be made again; `icdctl.cleanup` lists and deletes them."""
    return state_folder() / "cache"


def data_folder() -> Path:
    """The folder of data sets: `ICDCTL_DATA`, or `data` in the state folder."""
    given = os.environ.get("ICDCTL_DATA")
    return user_path(given) if given else state_folder() / "data"


def user_path(text: str) -> Path:
    """The path that a user typed, with `~` and `~name` expanded.

    Raises:
        ArtifactError: the user after `~` does not exist.
    """
    try:
        return Path(text).expanduser()
    except RuntimeError as error:
        raise ArtifactError(f"`{text}` names a user whose home is not known", hint="write the whole path") from error


def utf8_name(name: str) -> str:
    """The name itself, with `\\xff` in place of a byte that makes it invalid UTF-8, which no text file could hold."""
    try:
        return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    except UnicodeEncodeError:  # half a character, from a JSON file
        return name.encode("utf-8", "backslashreplace").decode("utf-8")
