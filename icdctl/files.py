"""Files that are whole or absent: atomic writes, hashes, locks, and where icdctl keeps its state."""

from __future__ import annotations

import hashlib
import json
import os
import stat
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path
from typing import IO, Any

import filelock

from icdctl.errors import ArtifactError

LARGEST_FOREIGN_BYTES = 2 * 1024**3
"""No weights or graph that icdctl reads is larger; a file that claims more is refused."""

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
    """Hex md5 of a file, read in pieces: for publishers who state no better hash."""
    digest = hashlib.md5(usedforsecurity=False)
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def write_bytes(path: Path, content: bytes) -> None:
    """Write `content` under a temporary name beside `path`, then rename: a reader sees the old file or the new one.

    Raises:
        ArtifactError: the folder can't be written to, or the disk is full.
    """
    make_folder(path.parent)
    temporary: Path | None = None
    try:
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", delete=False) as file:
            temporary = Path(file.name)
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.chmod(0o644)
        temporary.replace(path)
    except OSError as error:
        raise not_writable(path, error) from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """`write_bytes` of UTF-8 text."""
    write_bytes(path, text.encode("utf-8"))


def write_json(path: Path, value: Any) -> None:
    """`write_bytes` of indented JSON; keys keep their order, NaN is refused."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False, ensure_ascii=False) + "\n")


def read_json(path: Path, *, what: str, hint: str) -> Any:
    """The value in a JSON file that icdctl wrote.

    Args:
        path: the file.
        what: what it should be, for the message, e.g. "run folder".
        hint: what to do where it is missing or broken.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ArtifactError(f"no {what}: `{path}` does not exist", hint=hint) from error
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise ArtifactError(f"{what} can't be read: `{path}`: {error}", hint=hint) from error


def read_foreign(path: Path, *, what: str, example: str, again: str) -> bytes:
    """The content of a file that came from somewhere, with what it often is instead told apart.

    Args:
        path: the file.
        what: what it should be, for the messages, e.g. "weight file".
        example: a name such a file could have.
        again: the hint where it is empty.

    Raises:
        ArtifactError: missing, a folder, unreadable, empty, larger than 2 GiB, a git-lfs pointer, a web page.
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
            f"`{path}` is a git-lfs pointer, not the {what} it points to", hint="run `git lfs pull` where it comes from"
        )
    if content[:512].lstrip().lower().startswith((b"<!doctype", b"<html", b"<?xml", b"<head")):
        raise ArtifactError(
            f"`{path}` is a web page, not the {what}",
            hint="the server answered with a page (a login or an error) instead of the file; download it again",
        )
    return content


def make_folder(path: Path) -> None:
    """Create a folder and its parents; the state folder, with a `.gitignore` that keeps git out of it.

    Raises:
        ArtifactError: it can't be created.
    """
    new_state = None if path.is_dir() else _state_folder_to_make(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise not_writable(path, error) from error
    if new_state is not None:
        write_text(new_state / ".gitignore", "# written by icdctl, so that git leaves this folder alone\n*\n")


def _state_folder_to_make(path: Path) -> Path | None:
    """The state folder, where it comes about with `path` in it or as `path`."""
    home = state_folder().absolute()
    return home if home in (path.absolute(), *path.absolute().parents) and not home.exists() else None


def not_writable(path: Path, error: OSError) -> ArtifactError:
    """The error for a place that can't be written to."""
    return ArtifactError(
        f"`{path}` can't be written: {error.strerror or error}",
        hint="choose a folder that you may write to, on a disk with room, with `--out` or `ICDCTL_HOME`",
    )


@contextmanager
def locked(path: Path, *, busy: str, hint: str, waiting: Callable[[str], None] | None = None) -> Iterator[None]:
    """Hold the lock file `path` while the block runs, or fail soon with `busy` where another process holds it.

    With `waiting`, `busy` is told to it, and the other process is waited for. The system frees the lock of a process
    that dies.
    """
    make_folder(path.parent)
    lock: filelock.BaseFileLock = filelock.FileLock(path)
    try:
        lock.acquire(blocking=False)
    except filelock.Timeout as error:
        if waiting is not None:
            waiting(f"waiting: {busy}")
        # Once more in any case, for whoever only looks at it holds it for a moment.
        later = _acquire_when_free(path, attempts=1 if waiting is None else None)
        if later is None:
            raise ArtifactError(busy, hint=hint) from error
        lock = later
    except OSError as error:
        raise not_writable(path, error) from error
    try:
        yield
    finally:
        # Removed while it is held: whoever opened it meanwhile has already been told that it is busy.
        path.unlink(missing_ok=True)
        lock.release()


def _acquire_when_free(path: Path, *, attempts: int | None) -> filelock.BaseFileLock | None:
    """Wait for a lock whose holder removes its file when it is done: each attempt opens the file that is there then.

    Returns:
        The lock; None where that many attempts have failed.
    """
    for _ in count() if attempts is None else range(attempts):
        time.sleep(_LOCK_PAUSE_SECONDS)
        lock = filelock.FileLock(path)
        try:
            lock.acquire(blocking=False)
        except filelock.Timeout:
            continue
        if path.exists():  # and was not removed between being opened and being locked
            return lock
        lock.release()
    return None


@contextmanager
def waited_lock(path: Path) -> Iterator[None]:
    """Hold the lock file `path` while the block runs; wait where another process holds it."""
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
    """Mark a cache's file, open to be mapped, as in use: by whoever has it open or mapped, until then.

    A map keeps the file open after it is closed here, and the system frees the mark of a process that dies.

    Raises:
        FileNotFoundError: it was deleted since it was opened.
    """
    try:
        import fcntl

        fcntl.flock(file.fileno(), fcntl.LOCK_SH)
    except (ImportError, OSError):  # without such marks, as on Windows, a mapped file can't be deleted either
        return
    if os.fstat(file.fileno()).st_nlink == 0:
        raise FileNotFoundError(file.name)


@contextmanager
def unless_locked(path: Path) -> Iterator[bool]:
    """Whether nobody holds a lock file, or has a file in use by `hold_mapped`; if so, nobody will in the block."""
    try:
        import fcntl
    except ImportError:  # as for `hold_mapped`
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
    """Whether a process holds a lock file, or has a file in use by `hold_mapped`; nobody does where there is none."""
    try:
        with unless_locked(path) as is_free:
            return not is_free
    except OSError:
        return False


def mark_used(path: Path) -> None:
    """Remember in a file's time that it was of use now; one that can't be written to stays as it is."""
    with suppress(OSError):
        os.utime(path)


def project_root() -> Path:
    """The nearest folder upwards that holds `dvc.yaml` or `registry/`, else the current folder."""
    here = Path.cwd()
    for folder in (here, *here.parents):
        registry = folder / "registry"
        is_package = (registry / "__init__.py").is_file()  # icdctl's own code, for those who work on it
        if (folder / "dvc.yaml").is_file() or (registry.is_dir() and not is_package):
            return folder
    return here


def state_folder() -> Path:
    """Where checkpoints, caches and data live: `ICDCTL_HOME`, or `.icdctl` in the project root."""
    given = os.environ.get("ICDCTL_HOME")
    return user_path(given) if given else project_root() / ".icdctl"


def cache_folder() -> Path:
    """Where lies what can be made again; `icdctl.cleanup` lists and clears it."""
    return state_folder() / "cache"


def data_folder() -> Path:
    """Where data sets live: `ICDCTL_DATA`, or `data` in the state folder."""
    given = os.environ.get("ICDCTL_DATA")
    return user_path(given) if given else state_folder() / "data"


def user_path(text: str) -> Path:
    """A path as a person writes it, `~` and `~name` included.

    Raises:
        ArtifactError: there is no such user.
    """
    try:
        return Path(text).expanduser()
    except RuntimeError as error:
        raise ArtifactError(f"`{text}` names a user whose home is not known", hint="write the whole path") from error
