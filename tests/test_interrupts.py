"""Ctrl-C and SIGTERM at moments that no `except` covers: before the imports, twice, and where Python drops them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import icdctl as package

SIGNALS = [(signal.SIGINT, 130), (signal.SIGTERM, 143)]


def run(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run Python code with these words as the command line of `icdctl`."""
    head = f"import os, signal, sys\nsys.argv = {['icdctl', *arguments]!r}\n"
    head += "def send(number): os.kill(os.getpid(), number)\n"
    environment = {**os.environ, "PYTHONPATH": str(Path(package.__file__).parents[1])}
    return subprocess.run(
        [sys.executable, "-c", head + code], env=environment, capture_output=True, text=True, check=False, timeout=60
    )


@pytest.mark.parametrize(("number", "code"), SIGNALS)
def test_a_signal_before_the_command_line_is_imported(number: int, code: int) -> None:
    before = f"""
import icdctl.__main__
assert "typer" not in sys.modules
send({number:d})
"""
    done = run(before)
    assert (done.returncode, done.stdout) == (code, "")
    assert done.stderr == "error: interrupted\n\nhint: run the same command again\n"

    done = run(before, "list", "--json")
    assert json.loads(done.stdout)["error"]["code"] == done.returncode == code


def test_the_program_starts_with_the_module_that_handles_signals() -> None:
    text = (Path(package.__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8")
    assert 'icdctl = "icdctl.__main__:run"' in text


def test_ctrl_c_that_a_shell_ignores_stays_ignored() -> None:
    done = run(
        """
signal.signal(signal.SIGINT, signal.SIG_IGN)
import icdctl.__main__
send(signal.SIGINT)
icdctl.__main__.run()
""",
        "--version",
    )
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(("first", "code"), SIGNALS)
@pytest.mark.parametrize("second", [number for number, _ in SIGNALS])
def test_a_second_signal_while_the_first_is_reported(first: int, second: int, code: int) -> None:
    done = run(
        f"""
import io, pathlib
from icdctl import cli
class Interrupted(io.StringIO):
    def write(self, text): send({second:d})
sys.stderr = Interrupted()
pathlib.Path.cwd = lambda: send({first:d})
cli.run()
""",
        "list",
        "models",
    )
    assert (done.returncode, done.stdout, done.stderr) == (code, "", "")


@pytest.mark.parametrize(("number", "code"), SIGNALS)
def test_a_signal_in_a_finalizer_is_not_lost(number: int, code: int) -> None:
    done = run(
        f"""
import pathlib, time
from icdctl import cli
class Held:
    def __del__(self): send({number:d})
def work():
    Held()
    time.sleep(20)
pathlib.Path.cwd = work
cli.run()
""",
        "list",
        "models",
    )
    assert done.returncode == code
    assert done.stderr == "error: interrupted\n\nhint: run the same command again\n"


def test_an_import_that_makes_another_exception_of_a_signal() -> None:
    done = run(
        """
import pathlib
from icdctl import cli
def work():
    try:
        send(signal.SIGINT)
    except KeyboardInterrupt:
        raise ImportError("numpy.core.multiarray failed to import")
pathlib.Path.cwd = work
cli.run()
""",
        "list",
        "models",
    )
    assert done.returncode == 130
    assert done.stderr == "error: interrupted\n\nhint: run the same command again\n"


@pytest.mark.parametrize(("number", "code"), SIGNALS)
def test_a_signal_in_an_import_ends_at_once(tmp_path: Path, number: int, code: int) -> None:
    # Modules in C++, such as torch's, abort where they get an exception while they are loaded.
    (tmp_path / "in_cpp.py").write_text(
        "import __main__\ntry:\n    __main__.interrupt()\nfinally:\n    print('raised')\n"
    )
    done = run(
        f"""
import pathlib
from icdctl import cli
def interrupt(): send({number:d})
def work():
    sys.path.insert(0, {str(tmp_path)!r})
    import in_cpp
pathlib.Path.cwd = work
cli.run()
""",
        "list",
        "models",
        "--json",
    )
    assert json.loads(done.stdout)["error"]["code"] == done.returncode == code
    assert done.stderr == "error: interrupted\n\nhint: run the same command again\n"


@pytest.mark.parametrize("number", [number for number, _ in SIGNALS])
def test_a_signal_in_the_last_moments_does_not_change_the_exit_code(number: int) -> None:
    done = run(
        f"""
import atexit
from icdctl import cli
class Late:
    def __del__(self): send({number:d})
late = Late()  # which Python deletes when its handlers of signals are gone
cli.run()
""",
        "--version",
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_a_signal_while_python_waits_for_a_thread_ends_the_wait() -> None:
    begun = time.monotonic()
    done = run(
        """
import threading, time
from icdctl import cli
threading.Thread(target=lambda: (time.sleep(0.5), send(signal.SIGINT), time.sleep(20))).start()
cli.run()
""",
        "--version",
    )
    assert time.monotonic() - begun < 15
    assert done.returncode in (0, 130)
    assert "Traceback" not in done.stderr
