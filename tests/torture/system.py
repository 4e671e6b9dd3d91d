"""What a process takes away from itself before it runs a command, on Linux: root's way past permissions, /dev/shm."""

from __future__ import annotations

import ctypes
import os

_VERSION = 0x20080522
_PASS_PERMISSIONS = (1 << 1) | (1 << 2)
"""CAP_DAC_OVERRIDE and CAP_DAC_READ_SEARCH."""
_NEW_MOUNTS = 0x20000
_PRIVATE, _READ_ONLY = 0x44000, 1
_SHARED_MEMORY = b"/dev/shm"


class _Header(ctypes.Structure):
    _fields_ = (("version", ctypes.c_uint32), ("pid", ctypes.c_int))


class _Sets(ctypes.Structure):
    _fields_ = (("effective", ctypes.c_uint32), ("permitted", ctypes.c_uint32), ("inheritable", ctypes.c_uint32))


def obey_permissions() -> None:
    """Permissions of files hold from now on, also for root."""
    libc = _libc()
    header, sets = _Header(_VERSION, 0), (_Sets * 2)()
    _succeed(libc.capget(ctypes.byref(header), sets))
    sets[0].effective &= ~_PASS_PERMISSIONS
    sets[0].permitted &= ~_PASS_PERMISSIONS
    _succeed(libc.capset(ctypes.byref(header), sets))


def hide_shared_memory() -> None:
    """/dev/shm is empty and read-only from now on, for this process and its children.

    Raises:
        OSError: this user may not do that.
    """
    libc = _libc()
    _succeed(libc.unshare(_NEW_MOUNTS))
    _succeed(libc.mount(b"none", b"/", None, _PRIVATE, None))
    _succeed(libc.mount(b"tmpfs", _SHARED_MEMORY, b"tmpfs", _READ_ONLY, None))


def can_hide_shared_memory() -> bool:
    """Whether this user may."""
    pid = os.fork()
    if pid == 0:
        try:
            hide_shared_memory()
            os._exit(0)
        finally:
            os._exit(1)
    return os.waitpid(pid, 0)[1] == 0


def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def _succeed(result: int) -> None:
    if result != 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
