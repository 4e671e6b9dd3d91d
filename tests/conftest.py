"""What all tests share: a clean environment, the command line as a function, and the golden summary."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import golden_support
import pytest
import torch

CommandLine = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    """The bytes that a run leaves depend on the number of threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def clean_surroundings(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test depends on the developer's shell, or leaves anything in the project."""
    for name in [name for name in os.environ if name.startswith("ICDCTL_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("ICDCTL_HOME", str(tmp_path_factory.getbasetemp() / "state"))
    monkeypatch.setenv("MPLCONFIGDIR", str(tmp_path_factory.getbasetemp() / "matplotlib"))
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.chdir(tmp_path_factory.mktemp("project"))


@pytest.fixture
def icdctl(capsys: pytest.CaptureFixture[str]) -> CommandLine:
    """Run one command in this process: exit code, stdout, stderr."""
    from icdctl.cli import main

    def command(*arguments: str | Path) -> tuple[int, str, str]:
        capsys.readouterr()
        code = main([str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        return code, out, err

    return command


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MB; where none may be mounted, the test is skipped."""
    place = tmp_path / "small"
    place.mkdir()
    made = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(place)], capture_output=True, text=True, check=False
    )
    if made.returncode != 0:
        pytest.skip(f"no tmpfs may be mounted here: {made.stderr.strip()}")
    try:
        yield place
    finally:
        subprocess.run(["umount", str(place)], check=True)


LONGEST_FIRST = ("test_torture.py", "test_pipeline.py", "test_grid.py", "test_device_loop.py", "test_report.py")
"""Files that take a minute or more: at the end, one process would wait for the other."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the longest files; all others keep their order."""
    places = {name: place for place, name in enumerate(LONGEST_FIRST)}
    items.sort(key=lambda item: places.get(item.path.name, len(places)))


def pytest_sessionstart() -> None:
    """Ctrl-C works in the processes that tests start, even where the tests themselves run in the background."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """How many golden numbers were compared, and which were not, by what rule."""
    for line in golden_support.summary_lines():
        terminalreporter.write_line(line)
