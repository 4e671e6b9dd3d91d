"""`icdctl fetch-teachers`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated

import typer

from icdctl import files
from icdctl.commands import console, options
from icdctl.errors import IcdctlError, combine

if TYPE_CHECKING:
    from icdctl.teachers import FetchedTeacher, FetchProgress


def fetch_teachers(
    names: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="NAME",
            help="Teachers to fetch, e.g. `res32x4`, which means `cifar100/res32x4`; `--list` shows all names.",
            show_default=False,
        ),
    ] = None,
    everything: Annotated[
        bool, typer.Option("--all", help="Fetch every teacher that can be downloaded without a browser.")
    ] = False,
    listing: Annotated[
        bool, typer.Option("--list", help="List the published teachers and their state; fetch nothing.")
    ] = False,
    from_file: options.FromFile = None,
    mirror: options.Mirror = None,
    offline: options.Offline = False,
    keep_original: Annotated[
        bool, typer.Option("--keep-original", help="Keep the original .pth file beside the converted one.")
    ] = False,
    accept_accuracy: Annotated[
        bool,
        typer.Option("--accept-accuracy", help="Accept a teacher whose measured top-1 differs from the published one."),
    ] = False,
    data_dir: str | None = None,
    as_json: options.Json = False,
) -> None:
    """Download published teachers, verify them by hash and by accuracy, and convert them to safetensors.

    Example: icdctl fetch-teachers res32x4
    """
    from icdctl import teachers
    from icdctl.data import download
    from icdctl.engine.device import resolve_device

    if listing:
        _show_listing(as_json)
        return
    if everything:
        wanted = [teacher for teacher in teachers.load_list() if teacher.urls]
    else:
        wanted = list({row.name: row for row in map(teachers.find_published, names or [])}.values())
    options.check_wanted([row.name for row in wanted], from_file, example="icdctl fetch-teachers res32x4")
    fetch_options = teachers.FetchOptions(
        from_file=from_file,
        mirrors=download.mirrors_in_order(mirror),
        offline=offline,
        keep_original=keep_original,
        accept_accuracy=accept_accuracy,
        data_folder=None if data_dir is None else files.user_path(data_dir),
        device=str(resolve_device("auto")),
    )
    results: list[FetchedTeacher] = []
    problems: list[IcdctlError] = []
    for teacher in wanted:
        try:
            with _watched(teacher.name) as progress:
                results.append(teachers.fetch_teacher(teacher, fetch_options, progress))
        except IcdctlError as error:
            problems.append(error)
    teachers.clear_cache()
    _report(results, problems, as_json)


def _report(results: list[FetchedTeacher], problems: list[IcdctlError], as_json: bool) -> None:
    for result in results:
        if result.entry.measured_top1 is None:
            console.talk(
                f"{result.name}: its accuracy is not checked yet, because the test images are not on this machine; run "
                f"`icdctl fetch-data {result.name.partition('/')[0]}`, then this command again"
            )
        elif result.data_caveat:
            console.talk(f"warning: {result.data_caveat}")
    if not as_json:
        for result in results:
            console.show_line(f"{result.name:<18} {_about(result)}")
    if problems:
        raise combine(problems)
    if as_json:
        console.show_json({"teachers": [result.as_json() for result in results]})


def _about(result: FetchedTeacher) -> str:
    entry = result.entry
    measured = "not measured" if entry.measured_top1 is None else f"{entry.measured_top1:.2f}"
    accepted = ", accepted despite the difference" if entry.accuracy_accepted else ""
    state = "fetched to" if result.new else "already in"
    return f"{state} {result.path} (top-1 {measured}, published {result.published_top1:.2f}{accepted})"


@contextmanager
def _watched(name: str) -> Iterator[FetchProgress]:
    from icdctl.teachers import FetchProgress

    with console.amounts() as begin:
        yield FetchProgress(
            on_bytes=begin(name, "MB"),
            on_decoded=begin(f"{name}: decoding", "images"),
            on_images=begin(f"{name}: accuracy", "images"),
        )


def _show_listing(as_json: bool) -> None:
    from icdctl import teachers

    rows = teachers.overview()
    if as_json:
        console.show_json({"teachers": rows})
        return
    columns = ["name", "published top-1", "measured top-1", "state", "hash", "source"]
    console.show_table(columns, [["" if row[key] is None else row[key] for key in columns] for row in rows])
