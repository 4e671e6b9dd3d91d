"""`icdctl recipes`: training recipes and the papers' cells, by name."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from icdctl import files
from icdctl.commands import console, options
from icdctl.commands.list_ import recipe_rows

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from icdctl.papers.copying import Copied

app = typer.Typer(
    help="Show and copy recipes: training recipes, and the cells of the papers' tables, ready to train.",
    no_args_is_help=True,
)

To = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="File to write to.", show_default="params.yaml of the project"),
]
Seeds = Annotated[
    str | None,
    typer.Option(
        metavar="0-4",
        help="Train every cell of the file with these seeds.",
        show_default="those of the file, or 0-4",
    ),
]
Replace = Annotated[bool, typer.Option("--replace", help="Overwrite entries of the same name that differ.")]


@app.command("list")
def list_(
    texts: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="TEXT", help="Take only recipes with all of these texts in their name.", show_default=False
        ),
    ] = None,
    table: Annotated[
        str | None,
        typer.Option(
            help="Take only cells of this table; `icdctl reproduce --list` shows the tables.", show_default=False
        ),
    ] = None,
    family: Annotated[
        str | None,
        typer.Option(
            help="Take only cells with gamma (the weight of the cluster term) as in one paper: `gamma2` or `gamma8`.",
            show_default="both",
        ),
    ] = None,
    as_json: options.Json = False,
) -> None:
    """List the training recipes, then the papers' cells; the last column says why a cell can't be run.

    Example: icdctl recipes list res32x4-mv2 cd_sdd --family gamma8
    """
    from icdctl.papers import catalogue, describe

    training, cells = catalogue.select(texts or [], table=table, family=family)
    first = [row for row in recipe_rows() if row["name"] in training]
    rows = [describe.paper_row(recipe) for recipe in cells]
    if as_json:
        console.show_json({"recipes": [{**row, "kind": "training"} for row in first] + rows})
        return
    if first:
        console.show_table(list(first[0]), [list(row.values()) for row in first])
    if first and rows:
        console.show_line("")
    if rows:
        shown = [
            [
                row["name"],
                " ".join(row["families"]),
                " ".join(row["tables"]) or "a file of the reference",
                " ".join(f"{number:g}" for number in row["published"]),
                row["corrections"] or "",
                row["why_not"] or "yes",
            ]
            for row in rows
        ]
        console.show_table(["name", "families", "tables", "published top-1", "corrections", "runs"], shown)


@app.command("show")
def show(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Recipe to show; `icdctl recipes list` shows all names.")],
    as_json: options.Json = False,
) -> None:
    """Show one recipe: its numbers, the published results, and what was corrected in the reference's files.

    Example: icdctl recipes show cifar100/res32x4-mv2-cd_sdd_dkd-beta2-gamma2
    """
    from icdctl.config.recipes import Recipe
    from icdctl.papers import catalogue, describe

    found = catalogue.find(name)
    if isinstance(found, Recipe):
        facts = describe.training(name)
        if as_json:
            console.show_json(facts)
        else:
            console.show_table(
                ["field", "value"], [[key, _text(value)] for key, value in facts.items() if key != "kind"]
            )
        return
    facts = describe.paper(found)
    if as_json:
        console.show_json(facts)
    else:
        _show_paper(facts)


@app.command("copy")
def copy(
    names: Annotated[
        list[str], typer.Argument(metavar="NAME", help="Recipes to copy; `icdctl recipes list` shows all names.")
    ],
    to: To = None,
    seeds: Seeds = None,
    replace: Replace = False,
    as_json: options.Json = False,
) -> None:
    """Add recipes to params.yaml: a training recipe as its section `train`, cells of the papers as `cells`.

    All other lines of params.yaml stay as they are, comments too.

    cells.yaml, if there is one, is written again.

    Example: icdctl recipes copy cifar100/res32x4-mv2-cd_sdd_dkd-beta2-gamma2 --seeds 0-4
    """
    from icdctl.papers import copying

    done = copying.copy(names, to or _params_file(), seeds=seeds, replace=replace)
    _report(done, done.warnings, as_json, {})


@app.command("import")
def import_(
    file: Annotated[
        Path, typer.Argument(metavar="FILE", help="A YAML file of mdistiller, SDD or iCD, or a run's config.json.")
    ],
    name: Annotated[str | None, typer.Option(help="Name of the new cell.", show_default="made from the file")] = None,
    family: Annotated[
        str, typer.Option(help="Paper whose beta and gamma are taken where FILE states none: `gamma2` or `gamma8`.")
    ] = "gamma2",
    scales: Annotated[
        str | None,
        typer.Option(
            help="Patch grids, which YAML files do not state: whole numbers from 1 to 8, with commas between them.",
            show_default="1,2,4",
        ),
    ] = None,
    to: To = None,
    seeds: Seeds = None,
    replace: Replace = False,
    as_json: options.Json = False,
) -> None:
    """Add a cell to params.yaml from another project's configuration; warn about what can't be taken over.

    Example: icdctl recipes import configs/cifar100/dkd/res32x4_mv2.yaml
    """
    from icdctl.papers import copying, foreign

    found = foreign.read(file, name=name, family=family, scales=scales)
    done = copying.write_cells([found.cell], to or _params_file(), seeds=seeds, replace=replace)
    _report(done, (*found.warnings, *done.warnings), as_json, {"name": found.cell.name})


def _params_file() -> Path:
    from icdctl.grid.cells import PARAMS_FILE

    return files.project_root() / PARAMS_FILE


def _report(done: Copied, warnings: Sequence[str], as_json: bool, more: Mapping[str, object]) -> None:
    written, expanded = done.written, done.expanded
    for warning in warnings:
        console.talk(f"warning: {warning}")
    counts = {"added": written.added, "replaced": written.replaced, "unchanged": written.unchanged}
    counted = ", ".join(f"{len(names)} {what}" for what, names in counts.items() if names)
    console.talk(f"{written.path}: {counted}")
    if expanded is not None:
        console.talk(f"{expanded.path}: {expanded.difference or 'unchanged'}")
    if as_json:
        lists = {what: list(names) for what, names in counts.items()}
        console.show_json({**more, "file": str(written.path), **lists, "warnings": list(warnings)})
    elif written.text:
        console.show_line(written.text.rstrip("\n"))


def _show_paper(facts: Mapping[str, Any]) -> None:
    from icdctl import methods

    facts_shown = [[key, _text(facts[key])] for key in ("name", "dataset", "teacher", "student", "method", "scales")]
    facts_shown += [
        ["families", _text(facts["families"])],
        ["runs", facts["why_not"] or "yes"],
        *([["note", facts["note"]]] if facts["note"] else []),
    ]
    console.show_table(["cell", ""], facts_shown)
    if facts["training"] is not None:
        stated = {**facts["overrides"], **facts["settings"]}
        usual = {**methods.get(facts["method"]).defaults, "variant": facts["method_settings"]["variant"]}
        numbers = [
            [
                key,
                _text(value),
                "the cell"
                if key in stated
                else f"default of {facts['method']}"
                if key in usual and usual[key] == value
                else f"recipe {facts['recipe']}",
            ]
            for key, value in {**facts["method_settings"], **facts["training"]}.items()
        ]
        console.show_line("")
        console.show_table(["number", "value", "from"], numbers)
    _section(
        ["table", "published", "what it is", "source", "suspect"],
        [
            [row["table"], _number(row), row["number"] or "", ", ".join(row["sources"]), row["suspect"] or ""]
            for row in facts["tables"]
        ],
    )
    _section(["file of the reference"], [[name] for name in facts["files"]])
    columns = ["config", "key", "said", "used", "why"]
    _section(columns, [[row[key] for key in columns] for row in facts["corrections"]])


def _section(columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    if rows:
        console.show_line("")
        console.show_table(columns, rows)


def _number(row: Mapping[str, Any]) -> str:
    if row["seconds_per_step"] is not None:
        low, high = row["seconds_per_step"]
        return f"{low:g} s/step" if low == high else f"{low:g} to {high:g} s/step"
    return "" if row["top1"] is None else f"{row['top1']:g}"


def _text(value: object) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_text(each)}" for key, each in value.items())
    if isinstance(value, list | tuple):
        return ",".join(map(_text, value))
    if value is None or value in ((), [], {}):
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:g}" if isinstance(value, float) else str(value)
