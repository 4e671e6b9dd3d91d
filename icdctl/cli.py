"""The command line: the list of commands, and the only place where an error becomes a message and an exit code.

Exit codes: 0 done, 1 known failure, 2 wrong usage, 130 or 143 interrupted. Neither this module nor the top of a command
module imports torch, so that help appears at once.
"""

from __future__ import annotations

import os
import signal
import sys
import traceback
from pathlib import Path
from types import FrameType
from typing import Annotated

import typer

from icdctl.commands import (
    bench,
    clean,
    console,
    demo,
    distill,
    doctor,
    evaluate,
    export,
    fetch_data,
    fetch_teachers,
    grid,
    list_,
    predict,
    recipes,
    registry,
    report,
    reproduce,
    train,
    validate,
    verify,
)
from icdctl.commands.setting_flags import WithAllSettings, WithSettings
from icdctl.errors import IcdctlError

_LONGEST_PATH = 120
_INTERRUPTED, _TERMINATED = 130, 143

_terminated: list[int] = []
"""The signals that ended this process."""

app = typer.Typer(
    name="icdctl",
    help="Train small image classifiers to imitate large ones: knowledge distillation (iCD, SDD, DKD, NKD, KD).",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("demo", cls=WithSettings)(demo.demo)
app.command("fetch-data", cls=WithSettings)(fetch_data.fetch_data)
app.command("fetch-teachers", cls=WithSettings)(fetch_teachers.fetch_teachers)
app.command("train", cls=WithAllSettings)(train.train)
app.command("distill", cls=WithAllSettings)(distill.distill)
app.command("eval", cls=WithSettings)(evaluate.evaluate)
app.command("export", cls=WithSettings)(export.export)
app.command("verify")(verify.verify)
app.add_typer(registry.app, name="registry")
app.command("predict", cls=WithSettings)(predict.predict)
app.command("list")(list_.list_)
app.add_typer(recipes.app, name="recipes")
app.command("validate")(validate.validate)
app.command("doctor")(doctor.doctor)
app.command("bench", cls=WithSettings)(bench.bench)
app.command("clean")(clean.clean)
app.add_typer(grid.app, name="grid")
app.command("reproduce", cls=WithSettings)(reproduce.reproduce)
app.command("report", cls=WithSettings)(report.report)


def _show_version(wanted: bool) -> None:
    if wanted:
        from icdctl import __version__

        console.show_line(f"icdctl {__version__}")
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", callback=_show_version, is_eager=True)
    ] = False,
) -> None:
    pass


def main(arguments: list[str] | None = None) -> int:
    """Run one command; return its exit code.

    Args:
        arguments: the words after the program's name; those of `sys.argv` by default.
    """
    given = sys.argv[1:] if arguments is None else arguments
    as_json = "--json" in given
    try:
        if not _has_current_folder():
            return _fail(1, "the current folder no longer exists", "`cd` to one that exists", as_json)
        result = app(args=given, prog_name="icdctl", standalone_mode=False)
        if result == _INTERRUPTED:  # typer handled Ctrl-C itself
            return _interrupted(as_json)
        return result if isinstance(result, int) else 0
    except IcdctlError as error:
        return _fail_with(error, as_json)
    except typer.TyperException as error:
        message = error.format_message().strip() or "no command is given"
        return _fail(2, message[:1].lower() + message[1:].rstrip("."), _help_hint(given), as_json)
    except (KeyboardInterrupt, typer.Abort):
        return _interrupted(as_json)
    except typer.Exit as leave:
        return _interrupted(as_json) if leave.exit_code == _INTERRUPTED else int(leave.exit_code)
    except MemoryError:
        return _fail(1, "there is not enough memory for this", "use fewer images or smaller batches", as_json)
    except OSError as error:  # a failure of the machine, not a bug: a name too long, a deleted folder
        where = f"`{str(error.filename)[:_LONGEST_PATH]}`: " if error.filename else ""
        return _fail(1, f"{where}{error.strerror or error}", "check the path, and the folder you are in", as_json)


def run() -> None:
    """The entry point of `icdctl`."""
    signal.signal(signal.SIGTERM, _terminate)
    sys.exit(main())


def _interrupted(as_json: bool) -> int:
    code = _INTERRUPTED if not _terminated else _TERMINATED
    return _fail(code, "interrupted", "run the same command again", as_json)


def _terminate(number: int, frame: FrameType | None) -> None:
    """Stop as on Ctrl-C, so that the state is saved, and remember the signal for the exit code."""
    _terminated.append(number)
    raise KeyboardInterrupt(signal.SIGTERM)


def _has_current_folder() -> bool:
    try:
        Path.cwd()
    except FileNotFoundError:
        return False
    return True


def _fail(code: int, message: str, hint: str, as_json: bool) -> int:
    error = IcdctlError(message, hint=hint)
    error.exit_code = code
    return _fail_with(error, as_json)


def _fail_with(error: IcdctlError, as_json: bool) -> int:
    if os.environ.get("ICDCTL_DEBUG") == "1":
        traceback.print_exc()
    console.show_error(error.messages, error.hints)
    if as_json:
        try:
            failure = {"code": error.exit_code, "message": error.message, "hint": error.hint}
            console.show_json({"error": failure})
        except IcdctlError:
            pass  # stdout can't be written; the first error has been printed on stderr
    return error.exit_code


def _help_hint(arguments: list[str]) -> str:
    """The hint that points to the help of the command that the user meant."""
    commands = [command.name for command in app.registered_commands] + [group.name for group in app.registered_groups]
    names = [name for name in arguments[:1] if name in commands]
    return f"`{' '.join(['icdctl', *names])} --help` shows what it takes"
