"""`icdctl fetch-teachers`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any

import typer

from icdctl import files
from icdctl.commands import console, options
from icdctl.errors import IcdctlError, combine

if TYPE_CHECKING:
    from icdctl.teachers import Fetched, Watcher


def fetch_teachers(
    names: Annotated[
        list[str] | None,
        typer.Argument(metavar="NAME", help="e.g. `res32x4`, which is `cifar100/res32x4`.", show_default=False),
    ] = None,
    everything: Annotated[bool, typer.Option("--all", help="All that can be downloaded.")] = False,
    listing: Annotated[bool, typer.Option("--list", help="Show what there is; fetch nothing.")] = False,
    from_file: options.FromFile = None,
    mirror: options.Mirror = None,
    offline: options.Offline = False,
    keep_original: Annotated[
        bool, typer.Option("--keep-original", help="Keep the .pth beside the converted file.")
    ] = False,
    accept_accuracy: Annotated[
        bool, typer.Option("--accept-accuracy", help="Take it though its top-1 is not the published one.")
    ] = False,
    data_dir: options.DataDir = None,
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
    wishes = teachers.Wishes(
        from_file=from_file,
        mirrors=download.mirrors_in_order(mirror),
        offline=offline,
        keep_original=keep_original,
        accept_accuracy=accept_accuracy,
        data_folder=None if data_dir is None else files.user_path(data_dir),
        device=str(resolve_device("auto")),
    )
    results: list[Fetched] = []
    problems: list[IcdctlError] = []
    for teacher in wanted:
        try:
            with _watched(teacher.name) as watcher:
                results.append(teachers.fetch_teacher(teacher, wishes, watcher))
        except IcdctlError as error:
            problems.append(error)
    teachers.clear_cache()
    _report(results, problems, as_json)


def _report(results: list[Fetched], problems: list[IcdctlError], as_json: bool) -> None:
    for result in results:
        if result.entry.measured_top1 is None:
            console.talk(
                f"{result.name}: its accuracy is not checked yet, for the data are not here; after `icdctl fetch-data "
                f"{result.name.partition('/')[0]}`, run this command again"
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


def _about(result: Fetched) -> str:
    entry = result.entry
    measured = "not measured" if entry.measured_top1 is None else f"{entry.measured_top1:.2f}"
    accepted = ", accepted nevertheless" if entry.accuracy_accepted else ""
    state = "fetched to" if result.new else "already in"
    return f"{state} {result.path} (top-1 {measured}, published {result.published_top1:.2f}{accepted})"


@contextmanager
def _watched(name: str) -> Iterator[Watcher]:
    from icdctl.teachers import Watcher

    with console.amounts() as begin:
        yield Watcher(
            on_bytes=begin(name, "MB"),
            on_decoded=begin(f"{name}: decoding", "images"),
            on_images=begin(f"{name}: accuracy", "images"),
        )


def _show_listing(as_json: bool) -> None:
    from icdctl import teachers

    rows: list[dict[str, Any]] = teachers.overview()
    if as_json:
        console.show_json({"teachers": rows})
        return
    columns = ["name", "published top-1", "measured top-1", "state", "hash", "source"]
    console.show_table(columns, [["" if row[key] is None else row[key] for key in columns] for row in rows])
