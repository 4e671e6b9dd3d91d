"""Which process holds a lock, as far as the system says it."""

from __future__ import annotations

from pathlib import Path

from icdctl.errors import arguments_without_secrets

_LOCKS = Path("/proc/locks")
_LONGEST_COMMAND = 120


def holder_of(path: Path) -> str | None:
    """The process that holds the lock file `path`: `process 4711, icdctl train ...`.

    Returns:
        None where that is not known: the system is not Linux, or the process is another user's or on another machine.
    """
    try:
        inode = path.stat().st_ino
        # "1: FLOCK  ADVISORY  WRITE 4711 08:01:1234 0 EOF"
        lines = [line.split() for line in _LOCKS.read_text(encoding="ascii").splitlines()]
        pids = [line[4] for line in lines if len(line) > 5 and line[5].rpartition(":")[2] == str(inode)]
        content = Path("/proc", pids[0], "cmdline").read_bytes() if pids else b""
    except (OSError, ValueError):
        return None
    if not pids:
        return None
    words = content.decode("utf-8", errors="replace").split("\0")
    command = " ".join(arguments_without_secrets([word for word in words if word]))
    shown = command if len(command) <= _LONGEST_COMMAND else f"{command[:_LONGEST_COMMAND]}..."
    return f"process {pids[0]}, `{shown}`" if shown else f"process {pids[0]}"
