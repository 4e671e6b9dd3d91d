"""`python -m icdctl` and the program `icdctl`.

The command line takes a quarter of a second to import, and torch seconds. So this module first decides what Ctrl-C and
SIGTERM do meanwhile, with nothing imported that Python has not loaded already.
"""

from __future__ import annotations

import os
import signal
import sys

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_HINT = "run the same command again"


def _leave(number: int, frame: object) -> None:
    """End at once: nothing has begun yet, and an exception would be lost in a half-imported module."""
    code = 128 + number
    if "--json" in sys.argv:
        failure = f'{{"error": {{"code": {code}, "message": "interrupted", "hint": "{_HINT}"}}}}\n'
        _write(1, failure)
    _write(2, f"error: interrupted\n\nhint: {_HINT}\n")
    os._exit(code)


def _write(descriptor: int, text: str) -> None:
    try:
        os.write(descriptor, text.encode())
    except OSError:  # closed, or the reader is gone: the exit code still says it
        return


for _number in _SIGNALS:
    if signal.getsignal(_number) is not signal.SIG_IGN:  # ignored where a shell starts it in the background
        signal.signal(_number, _leave)


def run() -> None:
    """The entry point of `icdctl`."""
    try:
        from icdctl import cli
    except (OSError, MemoryError) as error:  # too few open files, or too little memory, to load the program
        reason = os.strerror(error.errno) if isinstance(error, OSError) and error.errno else "not enough memory"
        _write(2, f"error: icdctl can't be loaded: {reason}\n\nhint: `ulimit -a` shows the limits of this shell\n")
        os._exit(1)
    cli.run()


if __name__ == "__main__":
    run()
