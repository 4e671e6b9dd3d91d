"""Files that are complete or absent: atomic writes, hashes, locks, and the folders where icdctl keeps its state.

Reading is in `icdctl.files.reading`, whose names are here too, and YAML in `icdctl.files.yaml_reading`.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import secrets
import shutil
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path
from typing import IO, Any

import filelock

from icdctl.errors import ArtifactError
from icdctl.files.lock_holder import holder_of
from icdctl.files.reading import LARGEST_FOREIGN_BYTES as LARGEST_FOREIGN_BYTES
from icdctl.files.reading import LARGEST_TEXT_BYTES as LARGEST_TEXT_BYTES
from icdctl.files.reading import check_regular as check_regular
from icdctl.files.reading import copy_regular as copy_regular
from icdctl.files.reading import open_regular as open_regular
from icdctl.files.reading import parse_json as parse_json
from icdctl.files.reading import percentage as percentage
from icdctl.files.reading import positive as positive
from icdctl.files.reading import read_foreign as read_foreign
from icdctl.files.reading import read_json as read_json
from icdctl.files.reading import read_regular as read_regular
from icdctl.files.reading import read_table as read_table
from icdctl.files.reading import read_text as read_text
from icdctl.files.reading import whole_number as whole_number
from icdctl.files.safetensors_files import read_tensors as read_tensors
from icdctl.files.safetensors_files import read_texts as read_texts
from icdctl.files.safetensors_files import texts_in as texts_in

JsonObject = dict[str, Any]
"""A JSON object that was read from somewhere or is about to be written; its values are checked where they are used."""

TEMPORARY_NAME = re.compile(r"\..+\.tmp\.[0-9a-f]{8}")
"""Name of a file or folder of `temporary_beside`, which is incomplete until it is renamed."""

_CHUNK_BYTES = 1 << 20
_LOCK_PAUSE_SECONDS = 0.5


def sha256_bytes(content: bytes) -> str:
    """Hex digest of `content`."""
    return hashlib.sha256(content).hexdigest()


def sha256_file(path: Path) -> str:
    """Hex digest of a file, read in pieces."""
    digest = hashlib.sha256()
    with open_regular(path) as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def md5_file(path: Path) -> str:
    """Hex md5 of a file, read in pieces; for files whose publisher states no better hash."""
    digest = hashlib.md5(usedforsecurity=False)
    with open_regular(path) as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def content_sha256(value: Mapping[str, object], *, without: Collection[str] = ()) -> str:
    """Hex digest of a JSON object, whatever the order and layout of its keys.

    Args:
        value: the object.
        without: keys that do not count, e.g. the one that holds the digest itself.
    """
    counted = {key: entry for key, entry in value.items() if key not in without}
    return sha256_bytes(json.dumps(counted, sort_keys=True, separators=(",", ":")).encode())


def write_bytes(path: Path, content: bytes) -> None:
    """Write `content` under a temporary name beside `path`, then rename it: readers see the old file or the new one.

    Raises:
        ArtifactError: the folder can't be written to, or the disk is full.
    """
    try:
        with temporary_beside(path) as temporary:
            with temporary.open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
    except OSError as error:
        raise not_writable(path, error) from error


@contextmanager
def temporary_beside(path: Path, *, is_folder: bool = False) -> Iterator[Path]:
    """A new file or folder beside `path`, marked as in use; it is deleted after the block unless it was renamed.

    The system frees the mark of a process that dies, so that `icdctl clean` recognises what killed processes left.

    Raises:
        ArtifactError: it can't be created.
    """
    make_folder(path.parent)
    mark, is_marked = None, False
    while not is_marked:
        temporary = path.with_name(f".{path.name}.tmp.{secrets.token_hex(4)}")
        try:
            if is_folder:
                temporary.mkdir()
            else:
                temporary.open("xb").close()
        except OSError as error:
            raise not_writable(path, error) from error
        with suppress(FileNotFoundError):  # where `icdctl clean` deleted it before it was marked, make another
            mark, is_marked = _marked(temporary), True
    try:
        yield temporary
    finally:
        if is_folder:
            shutil.rmtree(temporary, ignore_errors=True)
        else:
            temporary.unlink(missing_ok=True)
        if mark is not None:
            os.close(mark)


def is_abandoned(path: Path) -> bool:
    """Whether a file or folder is one of `temporary_beside`, and the process that made it has died."""
    return bool(TEMPORARY_NAME.fullmatch(path.name)) and path.exists() and not is_locked(path)


def remove_abandoned(path: Path) -> None:
    """Delete a file or folder of `temporary_beside` if the process that made it has died.

    The mark is held while it is deleted. Otherwise the process that has just made it could mark and fill it between the
    question and the deletion, and would lose its files.
    """
    if not TEMPORARY_NAME.fullmatch(path.name):
        return
    with suppress(FileNotFoundError), unless_locked(path) as is_free:
        if is_free and path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        elif is_free:
            path.unlink()


def _marked(path: Path) -> int | None:
    """Mark a file or folder as in use, as `hold_mapped` does; the mark lasts until the descriptor is closed."""
    try:
        import fcntl
    except ImportError:  # see `hold_mapped`
        return None
    descriptor = os.open(path, os.O_RDONLY)
    try:
        with suppress(OSError):  # some network file systems have no such marks
            fcntl.flock(descriptor, fcntl.LOCK_SH)
        path.stat()  # fails where the file was deleted while the mark was waited for
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def write_text(path: Path, text: str) -> None:
    """Write text as UTF-8, with `write_bytes`."""
    write_bytes(path, text.encode("utf-8"))


def write_json(path: Path, value: object) -> None:
    """Write a value as indented JSON, with `write_bytes`; keys keep their order, NaN raises ValueError."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False, ensure_ascii=False) + "\n")


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
        holder = holder_of(path)
        busy = busy if holder is None else f"{busy}: {holder}"
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
def lock_beside(path: Path) -> Iterator[None]:
    """Hold the lock of a file that several processes change, while the block runs; wait while another holds it.

    The lock is a hidden file beside the one that it guards, because two users of one project may have state folders of
    their own. It is deleted afterwards, so that git does not see it.

    Raises:
        ArtifactError: the folder can't be written to.
    """
    whole = path.resolve()
    place = whole.with_name(f".{whole.name}.lock")
    make_folder(place.parent)
    lock = filelock.FileLock(place)
    try:
        lock.acquire()
    except OSError as error:
        raise ArtifactError(
            f"`{path}` can't be changed: its lock `{place}` can't be written: {error.strerror or error}",
            hint=f"make the folder `{place.parent}` writable for you, e.g. with `chmod u+w`",
        ) from error
    try:
        yield
    finally:
        with suppress(OSError):
            place.unlink()  # while it is held, as in `locked`
        lock.release()


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
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # a folder can be marked, too
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            yield False
        else:
            yield True
    finally:
        os.close(descriptor)


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
        ArtifactError: the user after `~` does not exist, or the path holds a zero byte.
    """
    if "\0" in text:
        shown = text.replace("\0", "\\0")
        raise ArtifactError(f"`{shown}` holds a zero byte, which no path can", hint="write another path")
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
