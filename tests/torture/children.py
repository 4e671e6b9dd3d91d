"""Commands of icdctl in forked children: each in its own folder, with limits, watched for what it writes where."""

from __future__ import annotations

import functools
import gc
import io
import os
import resource
import select
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from . import system

CPU_SECONDS = 10
"""A command on damaged input that computes for longer hangs."""
WALL_SECONDS = 40.0
"""A command that takes longer hangs, also if it only waits. Other processes may be at work, hence the room."""
REPORTS = {"out", "err", "outside"}
"""Files beside the project: what a command printed, and what it wrote outside."""
_HARMLESS = ("/dev/", "/proc/self/")
"""Places outside its folder that a command may write to."""


@dataclass(frozen=True)
class Limits:
    """The bounds of one command."""

    cpu_seconds: int = CPU_SECONDS
    wall_seconds: float = WALL_SECONDS
    address_bytes: int = 4 * 1024**3
    """Address space that it may take beyond what its parent has: it protects the machine, and decides no case."""
    file_bytes: int | None = None
    """Size after which a write fails, as on a full disk."""
    open_files: int | None = None
    obeys_permissions: bool = False
    """Permissions of files hold for root, too."""
    shared_memory: bool = True
    """Whether /dev/shm can be written to."""
    days_ahead: float = 0.0
    """How far the clock of Python code is from the real one."""


@dataclass(frozen=True)
class Ended:
    """What became of a command."""

    code: int
    """Its exit code; a signal's number, negative, where one ended it."""
    out: str
    err: str
    seconds: float
    cpu_seconds: float
    peak_bytes: int
    """Memory that it took beyond what its parent had."""
    outside: tuple[str, ...]
    """What it wrote, or tried to write, outside its folder."""
    timed_out: bool

    def faults(self, *, honest_bytes: int = 0) -> list[str]:
        """The promises that it broke; `honest_bytes` is the peak of the same command on sound files, 0 for unknown."""
        found = [f"wrote outside its folder: {what}" for what in self.outside[:3]]
        if self.timed_out or self.code == -signal.SIGXCPU:
            found.append(f"no end after {self.seconds:.1f} s ({self.cpu_seconds:.1f} s of CPU time)")
        elif self.code not in (0, 1, 2):
            found.append(f"exit code {self.code}")
        if "Traceback (most recent call last)" in self.err + self.out:
            found.append(f"traceback: {_end_of_traceback(self.err + self.out)}")
        if self.code in (1, 2) and not any(line.startswith("error: ") for line in self.err.splitlines()):
            found.append("no `error:` line")
        if honest_bytes and self.peak_bytes > 2 * honest_bytes + SLACK_BYTES:
            found.append(f"took {self.peak_bytes >> 20} MiB, {honest_bytes >> 20} MiB on sound files")
        return found


SLACK_BYTES = 256 << 20
"""Memory beside twice the honest need: pages of libraries that this command is the first to touch."""


@dataclass(frozen=True)
class Place:
    """The folder of a case: a project, a home, a folder for temporary files; the command may write into these alone."""

    root: Path
    environment: Mapping[str, str | None] = field(default_factory=dict)
    """Changes of its environment; None removes a variable."""
    project_name: str = "project"

    @property
    def project(self) -> Path:
        """The folder in which the command runs."""
        return self.root / self.project_name

    def make(self, sources: Mapping[str, Path]) -> Place:
        """Create it, with copies of files and folders: place in the project -> source."""
        for folder in (self.project, self.root / "home", self.root / "tmp"):
            folder.mkdir(parents=True)
        for name, source in sources.items():
            to = self.project / name
            to.parent.mkdir(parents=True, exist_ok=True)
            if source.is_dir():
                shutil.copytree(source, to, symlinks=True, dirs_exist_ok=True)
            else:
                shutil.copyfile(source, to)
        return self

    def variables(self) -> dict[str, str]:
        """The environment of its commands."""
        made: dict[str, str | None] = {
            "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]),
            "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
            "HOME": str(self.root / "home"),
            "TMPDIR": str(self.root / "tmp"),
            "MPLCONFIGDIR": str(self.root / "home" / "matplotlib"),
            "DVC_NO_ANALYTICS": "1",
            "DVC_SITE_CACHE_DIR": str(self.root / "home" / "dvc"),
            "LANG": "C.UTF-8",
            "NO_COLOR": "1",
            "OMP_NUM_THREADS": "1",
            **self.environment,
        }
        return {name: value for name, value in made.items() if value is not None}

    def strays(self) -> list[str]:
        """What is left in the folder for temporary files, and what stands beside the folders of the place."""
        known = {self.project_name, "home", "tmp"}
        beside = [path.name for path in self.root.iterdir() if path.name.rstrip("0123456789") not in known | REPORTS]
        return sorted([*beside, *(f"tmp/{path.name}" for path in (self.root / "tmp").iterdir())])


class Running:
    """A command in a forked child, at the head of a process group of its own."""

    def __init__(
        self,
        arguments: Sequence[str],
        place: Place,
        *,
        limits: Limits | None = None,
        instead: Callable[[], None] | None = None,
        program: Sequence[str] = (),
        number: int = 0,
    ) -> None:
        """Start it.

        Args:
            arguments: the words after `icdctl`, or after `program`.
            place: where it runs.
            limits: its bounds; None for no bounds.
            instead: called in the child in place of the command.
            program: another program to run instead of icdctl.
            number: its number among the commands that run in the place at the same time.
        """
        self._limits = limits
        self._reports = {name: place.root / f"{name}{number or ''}" for name in REPORTS}
        for path in self._reports.values():  # it may be killed before it makes them
            path.touch()
        self._started = time.monotonic()
        self._base = _least_peak_bytes()
        sys.stdout.flush()
        sys.stderr.flush()
        self.pid = os.fork()
        if self.pid == 0:
            _child(arguments, place, self._reports, limits, instead, program)
        with suppress(PermissionError):  # a program has begun in it, in a group of its own by then
            os.setpgid(self.pid, self.pid)  # the child does it too: whoever is first

    def wait(self, seconds: float | None = None) -> Ended | None:
        """Wait until it ends; None where it is still at work after so many seconds."""
        descriptor = os.pidfd_open(self.pid)
        try:
            if not select.select([descriptor], [], [], seconds)[0]:
                return None
        finally:
            os.close(descriptor)
        return self._reap(timed_out=False)

    def kill(self) -> Ended:
        """Kill it and all that it started, at once."""
        os.killpg(self.pid, signal.SIGKILL)
        return self._reap(timed_out=False)

    def finish(self) -> Ended:
        """Wait until it ends; kill it where it takes longer than its limits allow."""
        ended = self.wait(None if self._limits is None else self._limits.wall_seconds)
        if ended is not None:
            return ended
        os.killpg(self.pid, signal.SIGKILL)
        return self._reap(timed_out=True)

    def _reap(self, *, timed_out: bool) -> Ended:
        _, status, usage = os.wait4(self.pid, 0)
        texts = {name: path.read_bytes().decode("utf-8", "replace") for name, path in self._reports.items()}
        return Ended(
            code=os.waitstatus_to_exitcode(status),
            out=texts["out"],
            err=texts["err"],
            seconds=time.monotonic() - self._started,
            cpu_seconds=usage.ru_utime + usage.ru_stime,
            peak_bytes=max(usage.ru_maxrss * 1024 - self._base, 0),
            outside=tuple(dict.fromkeys(texts["outside"].splitlines())),
            timed_out=timed_out,
        )


def run(arguments: Sequence[str], place: Place, **given: Any) -> Ended:
    """Run one command to its end; see `Running`."""
    return Running(arguments, place, **given).finish()


def warm_up() -> None:
    """Import once what commands import, in one thread, so that children find it."""
    import importlib
    import pkgutil

    import matplotlib
    import torch

    import icdctl

    torch.set_num_threads(1)
    matplotlib.use("agg")
    for module in pkgutil.walk_packages(icdctl.__path__, "icdctl."):
        if module.name != "icdctl.__main__":
            importlib.import_module(module.name)
    for name in ("onnx", "onnxruntime", "sklearn.datasets", "PIL.Image", "scipy.stats", "yaml", "requests"):
        importlib.import_module(name)
    gc.collect()
    gc.freeze()  # children don't copy the pages of the parent's objects


def _end_of_traceback(text: str) -> str:
    """Where in icdctl it happened, and what."""
    lines = text.strip().splitlines()
    places = [line.strip() for line in lines if line.startswith("  File ") and "/icdctl/" in line]
    return " ".join([*places[-1:], lines[-1]])[:400]


@functools.cache
def _least_peak_bytes() -> int:
    """Peak memory of a child that does nothing: what it shares with its parent."""
    pid = os.fork()
    if pid == 0:
        os._exit(0)
    return os.wait4(pid, 0)[2].ru_maxrss * 1024


def _child(
    arguments: Sequence[str],
    place: Place,
    reports: Mapping[str, Path],
    limits: Limits | None,
    instead: Callable[[], None] | None,
    program: Sequence[str],
) -> NoReturn:
    code = 70
    try:
        os.setpgid(0, 0)
        os.chdir(place.project)
        os.environ.clear()
        os.environ.update(place.variables())
        tempfile.tempdir = None
        _redirect(reports)
        if program:
            _limit(limits)
            os.execve(program[0], [*program, *arguments], dict(os.environ))
        _watch_writes(place, reports)
        _limit(limits)
        if instead is None:
            code = _command(arguments)
        else:
            instead()
            code = 0
    except BaseException:
        os.write(2, traceback.format_exc().encode("utf-8", "replace"))
    finally:
        try:
            sys.stdout.flush()
            sys.stderr.flush()
        finally:
            os._exit(code)


def _command(arguments: Sequence[str]) -> int:
    from icdctl import cli

    sys.argv = ["icdctl", *arguments]
    try:
        cli.run()
    except SystemExit as leave:
        return leave.code if isinstance(leave.code, int) else int(bool(leave.code))
    return 0


_streams: list[io.TextIOWrapper] = []
"""The streams of this child: a command may put others in their place, and a stream that is not held is closed."""


def _redirect(reports: Mapping[str, Path]) -> None:
    """stdin is empty, stdout and stderr are files; the text streams are made anew, for the environment's encoding."""
    for number, name, flags in ((0, os.devnull, os.O_RDONLY), (1, "out", os.O_WRONLY), (2, "err", os.O_WRONLY)):
        descriptor = os.open(reports.get(name, name), flags | (os.O_CREAT | os.O_TRUNC if number else 0), 0o644)
        os.dup2(descriptor, number)
        os.close(descriptor)
    encoding = "utf-8" if "UTF-8" in os.environ.get("LC_ALL", os.environ.get("LANG", "")) else "ascii"
    sys.stdin = io.TextIOWrapper(io.BufferedReader(io.FileIO(0)), encoding=encoding)
    sys.stdout = io.TextIOWrapper(io.BufferedWriter(io.FileIO(1, "w")), encoding=encoding, errors="strict")
    sys.stderr = io.TextIOWrapper(io.BufferedWriter(io.FileIO(2, "w")), encoding=encoding, errors="backslashreplace")
    _streams.extend((sys.stdin, sys.stdout, sys.stderr))


def _limit(limits: Limits | None) -> None:
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if limits is None:
        return
    if not limits.shared_memory:
        system.hide_shared_memory()
    if limits.obeys_permissions:
        system.obey_permissions()
    if limits.days_ahead:
        _set_clock(limits.days_ahead * 24 * 3600)
    taken = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (taken + limits.address_bytes,) * 2)
    resource.setrlimit(resource.RLIMIT_CPU, (limits.cpu_seconds, limits.cpu_seconds + 2))
    if limits.file_bytes is not None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limits.file_bytes,) * 2)
    if limits.open_files is not None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (limits.open_files,) * 2)


def _set_clock(seconds: float) -> None:
    now, now_ns = time.time, time.time_ns
    time.time = lambda: now() + seconds
    time.time_ns = lambda: now_ns() + round(seconds * 1e9)


def _watch_writes(place: Place, reports: Mapping[str, Path]) -> None:
    """Note every path outside the place that Python code opens for writing, creates, renames, links or deletes."""
    report = os.open(reports["outside"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND, 0o644)
    own = os.path.realpath(place.root)
    folders = {"os.mkdir", "os.remove", "os.rmdir", "os.truncate", "os.chmod", "os.utime"}

    def note(event: str, values: tuple[Any, ...]) -> None:
        paths: Sequence[Any] = ()
        if event == "open":
            flags = values[2] if isinstance(values[2], int) else 0
            if flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC):
                paths = values[:1]
        elif event in folders:
            paths = values[:1]
        elif event in ("os.rename", "os.link", "os.symlink"):
            paths = values[1:2] if event != "os.rename" else values[:2]
        for path in paths:
            if isinstance(path, str | bytes | os.PathLike):
                whole = os.path.realpath(os.fsdecode(path))
                if not (whole + "/").startswith((own + "/", *_HARMLESS)):
                    os.write(report, f"{event} {whole!r}\n".encode("utf-8", "replace"))

    sys.addaudithook(note)
