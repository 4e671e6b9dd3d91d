"""`icdctl registry`: finished runs as numbered versions."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from icdctl.commands import console, options
from icdctl.errors import ArtifactError

app = typer.Typer(help="Keep finished runs as numbered versions with hashes and lineage.", no_args_is_help=True)

Folder = Annotated[
    Path | None,
    typer.Option("--registry", metavar="DIR", help="Folder of the registry.", show_default="`registry` in the project"),
]


@app.command("add")
def add(
    run_folder: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a finished run; its files are copied.")],
    name: Annotated[
        str | None, typer.Option(help="Name to register it under.", show_default="<dataset>/<student>-<method>")
    ] = None,
    export_folder: Annotated[
        Path | None,
        typer.Option(
            "--onnx",
            metavar="DIR",
            help="Folder that `icdctl export` made from this run, to register with it.",
            show_default=False,
        ),
    ] = None,
    folder: Folder = None,
    as_json: options.Json = False,
) -> None:
    """Register a finished run as the next version of its name.

    Example: icdctl registry add runs/digits100/res20-ce-s0
    """
    from icdctl import registry

    where = folder or registry.default_folder()
    artifact = registry.add(where, run_folder, export_folder=export_folder, name=name, message=console.talk)
    if as_json:
        console.show_json(artifact.as_json())
    else:
        console.show_line(artifact.reference)
        console.talk(f"in {artifact.folder}")


@app.command("list")
def list_(folder: Folder = None, as_json: options.Json = False) -> None:
    """List all registered versions.

    Example: icdctl registry list
    """
    from icdctl import registry

    found = [artifact.as_json() for artifact in registry.list_artifacts(folder or registry.default_folder())]
    if as_json:
        console.show_json({"artifacts": found})
    elif found:
        rows = [
            [str(item["reference"]), str(item["variant"]), str(item["teacher"] or ""), _top1(item["final_top1"])]
            for item in found
        ]
        console.show_table(["artifact", "variant", "teacher", "top-1"], rows)
    else:
        console.talk("nothing is registered; `icdctl registry add RUN` registers a finished run")


def _top1(value: object) -> str:
    return f"{value:.2f}" if isinstance(value, int | float) else ""


@app.command("show")
def show(
    name: Annotated[
        str,
        typer.Argument(metavar="NAME", help="Artifact to show: `NAME` for its newest version, `NAME@vN` for another."),
    ],
    folder: Folder = None,
    as_json: options.Json = False,
) -> None:
    """Show the card and the lineage of one artifact.

    Example: icdctl registry show digits100/res8-cd_sdd_dkd
    """
    from icdctl import registry

    where = folder or registry.default_folder()
    artifact = registry.find(where, name)
    line = registry.lineage(where, artifact)
    problem = registry.card_problem(artifact)
    if problem is not None:
        console.talk(f"warning: {problem}; shown is what the manifest says; `git checkout` restores it")
    if as_json:
        console.show_json({**artifact.as_json(), "manifest": artifact.manifest.as_json(), "lineage": line})
        return
    console.show_line(registry.card(artifact).rstrip())
    console.show_line("\n## Lineage\n")
    for step in line:
        console.show_line(f"- {step}")


@app.command("verify")
def verify(
    name: Annotated[
        str | None,
        typer.Argument(
            metavar="NAME", help="Version to check: `NAME` or `NAME@vN`.", show_default="all versions of all artifacts"
        ),
    ] = None,
    folder: Folder = None,
    as_json: options.Json = False,
) -> None:
    """Compare registered files with their hashes; files that are not on this machine count as absent, not broken.

    Example: icdctl registry verify
    """
    from icdctl import registry

    results = registry.verify(folder or registry.default_folder(), name)
    broken = [result for result in results if not result.sound]
    if as_json and not broken:
        console.show_json({"artifacts": [result.as_json() for result in results]})
    elif not as_json:
        rows = [[result.reference, "sound" if result.sound else "BROKEN", result.summary] for result in results]
        console.show_table(["artifact", "result", "files"], rows)
    if broken:
        raise ArtifactError(
            f"{len(broken)} of {len(results)} artifacts are broken: "
            + "; ".join(f"{result.reference}: {result.summary}" for result in broken),
            hint="restore files with `dvc checkout` or `dvc pull`, and manifests and cards with `git checkout`; or "
            "register the run again",
        )
