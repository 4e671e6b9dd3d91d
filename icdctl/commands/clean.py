"""`icdctl clean`."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from icdctl import files
from icdctl.commands import console, options
from icdctl.errors import combine

if TYPE_CHECKING:
    from icdctl.cleanup import Entry


def clean(
    kinds: Annotated[
        list[str] | None,
        typer.Option(
            "--kind",
            metavar="KIND",
            help="Kind to delete; may be repeated. Caches: `images` (decoded), `answers` (teacher caches), `numbers` "
            "(measurements of reports), `downloads`, `remains` (files of killed processes). States of runs: "
            "`finished` (the result is in the run folder, too), `resume` (`--resume` needs them).",
            show_default="all caches",
        ),
    ] = None,
    older_than: Annotated[
        str | None,
        typer.Option(
            metavar="AGE", help="Delete only what was not used for this long: `30d`, `12h`, `2w`.", show_default=False
        ),
    ] = None,
    listing: Annotated[
        bool, typer.Option("--list", help="List everything that is kept, including states of runs; delete nothing.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List what would be deleted; delete nothing.")] = False,
    as_json: options.Json = False,
) -> None:
    """Delete caches that no process uses: decoded images, teacher caches, measurements of reports, downloads.

    Caches are built again when they are needed.

    States of runs are deleted only with `--kind finished` or `--kind resume`.

    Runs whose state is deleted with `--kind resume` can't be continued: `--resume` refuses them.

    Example: icdctl clean --older-than 30d
    """
    from icdctl import cleanup

    if listing:
        _list(cleanup.chosen(kinds or list(cleanup.KINDS), older_than, among=cleanup.entries()), as_json=as_json)
        return
    wanted = cleanup.chosen(kinds or [], older_than, among=cleanup.entries())
    if dry_run:
        in_use = tuple(entry for entry in wanted if entry.is_in_use())
        done = cleanup.Cleaned(tuple(entry for entry in wanted if entry not in in_use), in_use, ())
    else:
        done = cleanup.clean(wanted) if wanted else cleanup.Cleaned((), (), ())
    if as_json and not done.failed:
        console.show_json(
            {
                "dry_run": dry_run,
                "freed": [entry.as_json() for entry in done.freed],
                "bytes": _total(done.freed),
                "in_use": [entry.as_json() for entry in done.in_use],
            }
        )
        return
    if done.freed and not as_json:
        _show(done.freed, [])
    said = "would free" if dry_run else "freed"
    console.talk(f"{said} {_size(_total(done.freed))} in {files.state_folder()}")
    for entry in done.in_use:
        console.talk(f"kept, because a process uses it: {entry.kind} {entry.of or entry.name}")
    if done.failed:
        raise combine(done.failed)


def _list(found: Sequence[Entry], *, as_json: bool) -> None:
    from icdctl import cleanup

    held = {entry.name: entry.is_in_use() for entry in found}
    if as_json:
        rows = [{**entry.as_json(), "in_use": held[entry.name]} for entry in found]
        console.show_json({"folder": str(files.state_folder()), "entries": rows, "bytes": _total(found)})
        return
    if not found:
        console.talk(f"{files.state_folder()} holds nothing to delete")
        return
    _show(found, [name for name, is_held in held.items() if is_held])
    could = _total(entry for entry in found if entry.kind in cleanup.CACHES and not held[entry.name])
    console.talk(
        f"{_size(_total(found))} in {files.state_folder()}; `icdctl clean` would free {_size(could)}; it keeps the "
        "states of runs unless their `--kind` is named"
    )


def _total(entries: Iterable[Entry]) -> int:
    return sum(entry.num_bytes for entry in entries)


def _show(entries: Sequence[Entry], in_use: Sequence[str]) -> None:
    """Print a table with a row for each entry; the numbers of reports, which are many and small, share a row."""
    rows: list[list[object]] = []
    for entry in entries:
        if entry.kind != "numbers":
            note = ", ".join(filter(None, [entry.note, "in use" if entry.name in in_use else ""]))
            rows.append([entry.kind, entry.of, _size(entry.num_bytes), _ago(entry.used), note])
    for note in dict.fromkeys(entry.note for entry in entries if entry.kind == "numbers"):
        group = [entry for entry in entries if entry.note == note and entry.kind == "numbers"]
        used = max(entry.used for entry in group)
        rows.append(["numbers", note, _size(_total(group)), _ago(used), f"{len(group)} files"])
    console.show_table(["kind", "of", "size", "last used", "note"], rows)


def _size(num_bytes: int) -> str:
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if num_bytes >= scale:
            return f"{num_bytes / scale:.1f} {unit}"
    return f"{num_bytes} B"


def _ago(used: float) -> str:
    days = max(0, int((time.time() - used) / 86400))
    return "today" if days == 0 else f"{days} day{'' if days == 1 else 's'} ago"
