"""`icdctl fetch-data`: download data sets and verify them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from icdctl import files
from icdctl.commands import console, options
from icdctl.errors import IcdctlError, UsageError, combine

if TYPE_CHECKING:
    from icdctl.data import DatasetRow


def fetch_data(
    names: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="NAME",
            help="Data sets to download, e.g. `cifar100 cub200`; `--list` shows all names.",
            show_default=False,
        ),
    ] = None,
    everything: Annotated[bool, typer.Option("--all", help="Download all data sets.")] = False,
    listing: Annotated[
        bool, typer.Option("--list", help="List the data sets and their state; download nothing.")
    ] = False,
    from_file: options.FromFile = None,
    mirror: options.Mirror = None,
    offline: options.Offline = False,
    data_dir: str | None = None,
    as_json: options.Json = False,
) -> None:
    """Download data sets, check their sizes and hashes, and unpack them into the data folder.

    Example: icdctl fetch-data cifar100
    """
    from icdctl import data
    from icdctl.data import download

    folder = files.data_folder() if data_dir is None else files.user_path(data_dir)
    if listing:
        _show_listing(folder, as_json)
        return
    wanted = list(_fetchable()) if everything else [_resolved(name) for name in names or []]
    options.check_wanted(wanted, from_file, example="icdctl fetch-data cifar100")
    mirrors = download.mirrors_in_order(mirror)
    results, problems = [], []
    for name in dict.fromkeys(wanted):
        try:
            row = data.DATASETS[name]
            results.append(_fetched(name, row, folder, from_file=from_file, mirrors=mirrors, offline=offline))
        except IcdctlError as error:
            problems.append(error)
    if not as_json:
        for result in results:
            console.show_line(f"{result['name']:<11} {result['about']}")
    if problems:
        raise combine(problems)
    if as_json:
        console.show_json({"datasets": results})


def _fetchable() -> dict[str, DatasetRow]:
    """All data sets except folders of the user's own images."""
    from icdctl.data import DATASETS

    return {name: row for name, row in DATASETS.items() if row.description is not None}


def _resolved(name: str) -> str:
    from icdctl import data

    if data.DatasetName.parse(name.strip().lower()).kind == data.IMAGE_FOLDER:
        raise UsageError(
            f"`{name}` is a folder of your own images, there is nothing to fetch", hint="`--list` shows the data sets"
        )
    return data.resolve(name)


def _fetched(
    name: str, row: DatasetRow, folder: Path, *, from_file: Path | None, mirrors: tuple[str, ...], offline: bool
) -> dict[str, str | None]:
    from icdctl.data import pin, release

    if row.release is None:
        if from_file is not None:
            raise UsageError(f"`{name}` is embedded, there is nothing to read from a file", hint="leave `--from` out")
        return {"name": name, "state": "embedded", "path": None, "source": None, "about": "embedded, nothing to fetch"}
    with console.amounts() as begin:
        found = release.install(
            row.release,
            folder,
            from_file=from_file,
            mirrors=mirrors,
            offline=offline,
            pin=pin.find_pin(row.release.archive),
            on_bytes=begin(row.release.archive.name, "MB"),
        )
    about = f"already in {found.path}" if found.source is None else f"{found.path} (from {found.source})"
    return {
        "name": name,
        "state": "there" if found.source is None else "fetched",
        "path": str(found.path),
        "source": found.source,
        "about": f"{about}, as published",
    }


def _show_listing(folder: Path, as_json: bool) -> None:
    from icdctl.data import release

    rows = []
    for name, row in _fetchable().items():
        published = row.release
        file = None if published is None else published.archive
        rows.append(
            {
                "name": name,
                "state": "embedded" if published is None else release.look(published, folder)[0],
                "bytes": None if file is None else file.num_bytes,
                "md5": None if file is None else file.md5,
                "sha256": None if file is None else file.sha256,
                "url": None if file is None else next(iter(file.urls), None),
                "licence": row.licence,
                "source": row.source,
            }
        )
    if as_json:
        console.show_json({"datasets": rows})
        return
    columns = ["name", "state", "bytes", "md5", "url", "licence"]
    console.show_table(columns, [["" if row[key] is None else row[key] for key in columns] for row in rows])
