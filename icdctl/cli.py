"""The command line: the list of commands, and the one place where an error becomes a message and an exit code.

0 done, 1 known failure, 2 wrong usage, 130 or 143 interrupted. Nothing here, and nothing that a command module imports
at its head, imports torch: help must come at once.
"""

from __future__ import annotations

import os
import signal
import sys
import traceback
from types import FrameType
from typing import Annotated

import typer

from icdctl import console
from icdctl.commands import (
    demo,
    distill,
    doctor,
    evaluate,
    export,
    fetch_data,
    fetch_teachers,
    list_,
    registry,
    train,
    validate,
    verify,
)
from icdctl.errors import IcdctlError

app = typer.Typer(
    name="icdctl",
    help="Knowledge distillation of image classifiers: iCD, SDD, DKD, NKD and KD.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("demo")(demo.demo)
app.command("fetch-data")(fetch_data.fetch_data)
app.command("fetch-teachers")(fetch_teachers.fetch_teachers)
app.command("train")(train.train)
app.command("distill")(distill.distill)
app.command("eval")(evaluate.evaluate)
app.command("export")(export.export)
app.command("verify")(verify.verify)
app.add_typer(registry.app, name="registry")
app.command("list")(list_.list_)
app.command("validate")(validate.validate)
app.command("doctor")(doctor.doctor)


def _show_version(wanted: bool) -> None:
    if wanted:
        from icdctl import __version__

        console.show_line(f"icdctl {__version__}")
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[
        bool, typer.Option("--version", help="Show the version and leave.", callback=_show_version, is_eager=True)
    ] = False,
) -> None:
    pass


def main(arguments: list[str] | None = None) -> int:
    """Run one command; return its exit code.

    Args:
        arguments: without the program's name; `sys.argv` by default.
    """
    given = sys.argv[1:] if arguments is None else arguments
    as_json = "--json" in given
    try:
        result = app(args=given, prog_name="icdctl", standalone_mode=False)
        return result if isinstance(result, int) else 0
    except IcdctlError as error:
        return _fail(error.exit_code, error.message, error.hint, as_json)
    except typer.TyperException as error:
        message = error.format_message()
        return _fail(2, message[:1].lower() + message[1:].rstrip("."), _help_hint(given), as_json)
    except typer.Exit as leave:
        return int(leave.exit_code)
    except (KeyboardInterrupt, typer.Abort) as interrupt:
        code = 143 if interrupt.args == (signal.SIGTERM,) else 130
        return _fail(code, "interrupted", "run the same command again", as_json)
    except MemoryError:
        return _fail(1, "there is not enough memory for that", "ask for fewer images or smaller batches", as_json)
    except BrokenPipeError:
        # Whoever read our output has left, which is no failure; and nothing may be flushed to it at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def run() -> None:
    """The entry point of `icdctl`."""
    signal.signal(signal.SIGTERM, _terminate)
    sys.exit(main())


def _terminate(number: int, frame: FrameType | None) -> None:
    """Stop as on Ctrl-C, so that state is saved, but remember what it was."""
    raise KeyboardInterrupt(signal.SIGTERM)


def _fail(code: int, message: str, hint: str, as_json: bool) -> int:
    if os.environ.get("ICDCTL_DEBUG") == "1":
        traceback.print_exc()
    console.show_error(message, hint)
    if as_json:
        console.show_json({"error": {"code": code, "message": message, "hint": hint}})
    return code


def _help_hint(arguments: list[str]) -> str:
    """Where the options of the command that was meant are explained."""
    names = [name for name in arguments[:1] if not name.startswith("-")]
    return f"`{' '.join(['icdctl', *names])} --help` shows what it takes"
