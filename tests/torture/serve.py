"""A server on 127.0.0.1, in a process of its own, that sends the archive of CIFAR-100's stand-in slowly."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager

from fetch_support import running_origin

from .originals import CIFAR_ARCHIVE, CIFAR_NAME


@contextmanager
def serving() -> Iterator[str]:
    """Serve it while the block runs; the URL of the mirror.

    It is not a thread of this process, because this process forks.
    """
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            with running_origin() as origin, os.fdopen(writing, "w") as out:
                origin.serve(f"/{CIFAR_NAME}", CIFAR_ARCHIVE, slow=0.02)
                out.write(origin.url)
                out.close()
                signal.pause()
        finally:
            os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as told:
        url = told.read()
    try:
        yield url
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
