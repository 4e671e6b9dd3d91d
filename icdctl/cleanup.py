"""List and delete what the state folder keeps besides data, teachers and results, and what killed processes left.

A cache is built again, with the same content, when it is missing: decoded images, teacher caches, numbers of reports,
downloads. The state of a run is not a cache, because it holds hours of training. `--resume` needs it until the run is
finished; afterwards it is a second copy of the result, as long as the run folder exists. Therefore every entry has a
kind, and states are deleted only if the user names their kind.
"""

from __future__ import annotations

import os
import re
import shutil
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import filelock

from icdctl import files, run_files
from icdctl.config.run_config import RunConfig
from icdctl.engine.checkpoint import REPLAY_FILE, read_state, state_files
from icdctl.engine.run_folder import read_config, state_lock_path
from icdctl.engine.run_state import checkpoints_folder
from icdctl.errors import ArtifactError, IcdctlError, UsageError, unknown_name

KINDS = {
    "images": "decoded images, and the images that digits100 generates",
    "answers": "teacher caches",
    "numbers": "accuracies and latencies that reports measured; latencies vary when they are measured again",
    "downloads": "interrupted downloads of teachers, and archives that teachers were extracted from",
    "remains": "files left by processes that were killed, here and beside runs, exports and registered versions",
    "finished": "states of finished runs, whose results are in their run folders; `--resume` finds those",
    "resume": "states that `--resume` continues from, or that are all that is left of a run",
}
"""Kind -> description of its entries."""
CACHES = ("images", "answers", "numbers", "downloads", "remains")
"""The kinds that are built again when they are missing."""

_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 604800}
_LONGEST_SHOWN = 80
_TRASH = "trash"
"""What the temporary folder is named after whose content is being deleted, beside the place where the content was."""
_OLD_TRASH = ".trash-"
"""How the name of that folder began in earlier versions."""
_OLD_TEMPORARY = re.compile(r"\..+\.[a-z0-9_]{8}")
"""The name of an incomplete file in earlier versions, which did not mark it as in use."""
_OLD_RUN_FILE = re.compile(
    r"\.((config|environment|metrics|manifest|search)\.json|history\.csv|student\.safetensors|card\.md|teachers\.lock"
    r"|(params|cells)\.yaml)\.[a-z0-9_]{8}|\.new-\d+-[0-9a-f]{8}"
)
"""Such names outside the state folder, where other programs have hidden files, too."""
_STALE_SECONDS = 24 * 3600
"""Age after which no process is writing a temporary file any more."""
_LOCKS = (".params.yaml.lock", "registry/.teachers.lock.lock")
"""Lock files of `files.lock_beside`; while it works, a process deletes its own."""
_PROJECT_FOLDERS = ("runs", "registry", "teachers", "exported", "report", "results")
"""Folders of a project that icdctl writes to."""
_RUN_LOCK = re.compile(r"[0-9a-f]{20}\.lock")


@dataclass(frozen=True)
class Entry:
    """Files that are kept, and deleted, together."""

    kind: str
    """One of `KINDS`."""
    name: str
    of: str
    """The data set, teacher or run that it belongs to; empty if that is not recorded."""
    note: str
    num_bytes: int
    used: float
    """Time of the last use, in seconds since 1970."""
    paths: tuple[Path, ...]
    """Its files, all in one folder. They are deleted in this order; the first is the one that the others need."""
    locks: tuple[Path, ...] = ()
    """Lock files; a process that writes the entry holds one of them."""
    mapped: tuple[Path, ...] = ()
    """Files that readers mark with `files.hold_mapped`."""

    def is_in_use(self) -> bool:
        """True if a process writes or reads it now."""
        return any(files.is_locked(path) for path in (*self.locks, *self.mapped))

    def as_json(self) -> dict[str, object]:
        """An entry of `icdctl clean --list --json`."""
        return {
            "kind": self.kind,
            "name": self.name,
            "of": self.of,
            "note": self.note,
            "bytes": self.num_bytes,
            "last_used": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(self.used)),
            "path": str(self.paths[0]),
        }


@dataclass(frozen=True)
class Cleaned:
    """The outcome of a deletion."""

    freed: tuple[Entry, ...]
    in_use: tuple[Entry, ...]
    """Entries that were kept because a process uses them."""
    failed: tuple[IcdctlError, ...]
    """The reasons why other entries could not be deleted."""


def entries() -> list[Entry]:
    """All entries of the state folder, and the `remains` in the project and in the folders of the runs whose states are
    kept; sorted by kind and within a kind by size, the largest first.
    """
    states = list(_states())
    runs = [Path(state.of) for state in states if state.of]
    found = [*_images(), *_answers(), *_numbers(), *_downloads(), *_remains(), *_remains_of_project(runs), *states]
    order = list(KINDS)
    return sorted(found, key=lambda entry: (order.index(entry.kind), -entry.num_bytes, entry.name))


def chosen(kinds: Sequence[str], older_than: str | None, *, among: Iterable[Entry]) -> list[Entry]:
    """The entries of some kinds that were not used for some time.

    Args:
        kinds: keys of `KINDS`; if empty, all `CACHES`.
        older_than: e.g. `30d` or `12h`; entries that were used since then are left out. None for no limit.
        among: the entries to choose from, see `entries`.

    Raises:
        UsageError: there is no such kind, or `older_than` is not an age.
    """
    for kind in kinds:
        if kind not in KINDS:
            raise unknown_name("kind", kind, KINDS, listing="icdctl clean --help")
    until = time.time() - _age(older_than)
    return [entry for entry in among if entry.kind in (kinds or CACHES) and entry.used <= until]


def clean(wanted: Iterable[Entry]) -> Cleaned:
    """Delete the entries that no process uses.

    An entry is renamed before it is deleted, so that a half-deleted entry is never found in its place.

    Raises:
        ArtifactError: another process is cleaning already, or the state folder can't be written to.
    """
    freed: list[Entry] = []
    in_use: list[Entry] = []
    failed: list[IcdctlError] = []
    lock = files.state_folder() / "locks" / "cache.lock"
    with files.locked(lock, busy="another process is cleaning the caches", hint="wait until it has finished"):
        for entry in wanted:
            try:
                with _alone(entry) as is_free:
                    if not is_free:
                        in_use.append(entry)
                    elif _delete(entry.paths):
                        freed.append(entry)
            except (OSError, ArtifactError) as error:
                reason = error.message if isinstance(error, ArtifactError) else error.strerror or error
                failed.append(
                    ArtifactError(f"`{entry.paths[0]}` can't be deleted: {reason}", hint="check its permissions")
                )
    return Cleaned(tuple(freed), tuple(in_use), tuple(failed))


def total_bytes() -> int:
    """Size of all caches and states of runs."""
    return _size_of((files.cache_folder(), checkpoints_folder()))[0]


def _age(text: str | None) -> float:
    """An age like `30d` in seconds; 0 for None."""
    if text is None:
        return 0.0
    match = re.fullmatch(r"([0-9]{1,9}(?:\.[0-9]{1,9})?)([smhdw])", text.strip())
    if match is None:
        raise UsageError(
            f"`--older-than {text[:_LONGEST_SHOWN]}` is not an age", hint="e.g. `--older-than 30d`, `12h` or `2w`"
        )
    return float(match[1]) * _UNITS[match[2]]


@contextmanager
def _alone(entry: Entry) -> Iterator[bool]:
    """Lock an entry while the block runs; False if another process uses it."""
    with ExitStack() as stack:
        try:
            for lock in entry.locks:
                if _RUN_LOCK.fullmatch(lock.name):
                    stack.enter_context(files.locked(lock, busy="", hint=""))
                else:
                    stack.enter_context(filelock.FileLock(lock).acquire(blocking=False))
        except (filelock.Timeout, ArtifactError):
            yield False
            return
        is_free = True
        for path in entry.mapped:
            with suppress(FileNotFoundError):  # its process has deleted it since it was listed
                is_free = stack.enter_context(files.unless_locked(path)) and is_free
        if is_free and entry.kind in ("finished", "resume"):  # the run may have changed since it was listed
            now = _state(entry.paths[0])
            is_free = now is not None and (now.kind, now.locks) == (entry.kind, entry.locks)
        yield is_free


def _delete(paths: Sequence[Path]) -> bool:
    """Delete the files that still exist; False if none does."""
    there = [path for path in paths if path.exists()]
    if not there:  # another process has renamed or deleted them since they were listed
        return False
    with files.temporary_beside(there[0].with_name(_TRASH), is_folder=True) as aside:
        for path in there:
            path.rename(aside / path.name)
        shutil.rmtree(aside)
    return True


def _children(folder: Path) -> list[Path]:
    try:
        return sorted(folder.iterdir())
    except OSError:
        return []


def _visible(folder: Path) -> list[Path]:
    return [path for path in _children(folder) if not path.name.startswith(".")]


def _size_of(paths: Iterable[Path]) -> tuple[int, float]:
    """Total bytes and latest time of change of these files and of all files in these folders."""
    num_bytes, latest = 0, 0.0
    for path in paths:
        for file in (path, *path.rglob("*")):
            try:
                state = file.lstat()
            except OSError:  # deleted meanwhile
                continue
            if not file.is_dir():
                num_bytes += state.st_size
                latest = max(latest, state.st_mtime)
    return num_bytes, latest


def _entry(
    kind: str,
    name: str,
    paths: Sequence[Path],
    *,
    of: str = "",
    note: str = "",
    locks: tuple[Path, ...] = (),
    mapped: tuple[Path, ...] = (),
) -> Entry:
    num_bytes, used = _size_of(paths)
    with suppress(OSError):
        used = used or paths[0].lstat().st_mtime  # of an empty folder
    return Entry(kind, name, of, note, num_bytes, used, tuple(paths), locks, mapped)


def _facts(path: Path) -> dict[str, object]:
    """A JSON object that icdctl wrote; empty if the file is missing or broken."""
    try:
        value = files.parse_json(files.read_regular(path))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def _images() -> Iterator[Entry]:
    home = files.cache_folder() / "images"
    for stem in sorted({path.stem for path in _visible(home) if path.suffix in (".npy", ".json")}):
        facts, array = home / f"{stem}.json", home / f"{stem}.npy"
        yield _entry(
            "images",
            stem,
            [path for path in (facts, array) if path.exists()],
            of=str(_facts(facts).get("of") or stem.rpartition("-")[0]),
            locks=(home / f".{stem}.lock",),
            mapped=(array,),
        )
    for path in _visible(files.cache_folder()):
        if path.suffix == ".safetensors":
            yield _entry("images", path.stem, [path], of=path.name.partition("-")[0])


def _answers() -> Iterator[Entry]:
    home = files.cache_folder() / "answers"
    for folder in _visible(home):
        of = _facts(folder / "facts.json").get("of")
        about = of if isinstance(of, dict) else {}
        yield _entry(
            "answers",
            folder.name,
            [folder],
            of=f"{about['teacher']} on {about['dataset']}" if {"teacher", "dataset"} <= about.keys() else "",
            locks=(home / f".{folder.name}.lock",),
            mapped=tuple(folder.glob("*.npy")),
        )


def _numbers() -> Iterator[Entry]:
    for kind, key in (("evaluated", "weights"), ("latency", "model")):
        for path in _visible(files.cache_folder() / kind):
            of = _facts(path).get("of")
            about = of if isinstance(of, dict) else {}
            yield _entry("numbers", f"{kind}-{path.stem}", [path], of=str(about.get(key, ""))[:12], note=kind)


def _downloads() -> Iterator[Entry]:
    home = files.cache_folder() / "teachers"
    parts: dict[str, list[Path]] = {}
    for path in _children(home):
        match = re.fullmatch(r"\.(.+)\.part(\.json)?", path.name)
        if match or not path.name.startswith("."):
            parts.setdefault(match[1] if match else path.name, []).append(path)
    for name, paths in parts.items():
        is_cut = all(path.name.startswith(".") for path in paths)
        yield _entry(
            "downloads",
            name,
            paths,
            note="interrupted; the next download continues it" if is_cut else "",
            locks=(home / f".{name}.lock",),
        )


def _remains_entry(path: Path, *, locks: tuple[Path, ...] = (), mapped: tuple[Path, ...] = ()) -> Entry:
    return _entry("remains", path.name, [path], of=str(path), locks=locks, mapped=mapped)


def _remains() -> Iterator[Entry]:
    """Incomplete files of killed processes, temporary files that are too old to be in use, leftovers of `clean`."""
    cache = files.cache_folder()
    for home in (cache / "images", cache / "answers"):
        for path in _children(home):
            if path.name.startswith(".") and path.suffix == ".part":
                yield _remains_entry(path, locks=(path.with_suffix(".lock"),))
    for home in (cache, *_visible(cache), checkpoints_folder(), *_visible(checkpoints_folder())):
        for path in _children(home):
            is_old = _OLD_TEMPORARY.fullmatch(path.name) and _is_stale(path)
            if is_old or path.name.startswith(_OLD_TRASH):
                yield _remains_entry(path)
            elif files.is_abandoned(path):
                yield _remains_entry(path, mapped=(path,))


def _remains_of_project(runs: Iterable[Path]) -> Iterator[Entry]:
    """Temporary files and lock files of killed processes beside what they were about to write.

    Args:
        runs: run folders, which may lie outside the project.
    """
    root = files.project_root()
    places = dict.fromkeys(run.resolve() for run in (*(root / name for name in _PROJECT_FOLDERS), *runs))
    folders = dict.fromkeys(folder for place in places for folder in _folders_below(place))
    beside = dict.fromkeys((root.resolve(), *(place.parent for place in places)))
    for lock in (root / name for name in _LOCKS):
        if lock.is_file() and not files.is_locked(lock):
            yield _remains_entry(lock, mapped=(lock,))
    for folder in dict.fromkeys([*folders, *beside]):
        for path in _children(folder):
            if files.is_abandoned(path):
                yield _remains_entry(path, mapped=(path,))
            elif _OLD_RUN_FILE.fullmatch(path.name) and _is_stale(path):
                yield _remains_entry(path)


def _folders_below(top: Path) -> Iterator[Path]:
    """A folder and the visible folders below it."""
    for folder, inside, _ in os.walk(top):
        inside[:] = sorted(name for name in inside if not name.startswith("."))
        yield Path(folder)


def _is_stale(path: Path) -> bool:
    return time.time() - _size_of([path])[1] > _STALE_SECONDS


def _states() -> Iterator[Entry]:
    for folder in _visible(checkpoints_folder()):
        found = _state(folder)
        if found is not None:
            yield found


def _state(folder: Path) -> Entry | None:
    """The entry of a run's state, `finished` if the run folder has the result, too; None if there is no state."""
    if not state_files(folder) and not (folder / REPLAY_FILE).is_file():
        return None
    kind, note, of, out = "resume", "no epoch is finished", "", None
    try:
        found = read_state(folder)
    except ArtifactError:
        found, note = None, "it can't be read"
    if found is not None:
        progress, config = found
        shown = f"epoch {progress.epoch}" if config is None else progress.shown(config)
        note = "finished" if progress.done else shown
        if config is not None:
            out, of = Path(config.out), config.out
            if not out.is_dir():
                note += ", its run folder is gone"
            elif progress.done and _has_result(out, config):
                kind = "finished"
            elif progress.done:
                note += ", its run folder has no result"
    # A state that names no run may belong to any run that is going on.
    locks = _held_run_locks() if out is None else (state_lock_path(out),)
    return _entry(kind, folder.name, [folder], of=of, note=note, locks=locks)


def _has_result(out: Path, config: RunConfig) -> bool:
    if not all((out / name).is_file() for name in ("metrics.json", run_files.WEIGHTS_FILE)):
        return False
    try:
        return read_config(out, now_at=str(out)).identity == config.identity
    except ArtifactError:
        return False


def _held_run_locks() -> tuple[Path, ...]:
    paths = _children(files.state_folder() / "locks")
    return tuple(path for path in paths if _RUN_LOCK.fullmatch(path.name) and files.is_locked(path))
