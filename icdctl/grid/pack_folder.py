"""The folder that tells a process which pack to train, and that receives its outcomes.

It holds all that `python -m icdctl.grid.worker FOLDER` needs, so that an executor can start the worker in any process
that sees this folder and the project: the same current folder, the same environment variables.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from icdctl import files
from icdctl.errors import ArtifactError, UsageError
from icdctl.grid.cells import GridCell, GridRun
from icdctl.grid.executors.protocol import Conditions, TimeLeft
from icdctl.grid.packs import Outcome, Pack

_HINT = "this file is made by an executor: start the grid, not the worker"


class PackFolder:
    """Files of one pack; the process that starts a worker writes one of them, the worker the others."""

    def __init__(self, folder: Path) -> None:
        """
        Args:
            folder: an existing folder for this pack alone.
        """
        self._pack, self._outcomes = folder / "pack.json", folder / "outcomes.json"
        self.progress = folder / "progress.txt"
        """What the worker is doing: it appends lines, and the last one counts."""

    def write_pack(self, pack: Pack, conditions: Conditions) -> None:
        """Describe what is to be trained; the time that is left counts from when the worker reads it.

        Raises:
            UsageError: an option of a run has a type that JSON does not know.
            ArtifactError: the folder can't be written to.
        """
        stated = {
            "runs": [_described(run) for run in pack.runs],
            "epochs": pack.epochs,
            "root": str(conditions.root),
            "replace": conditions.replace,
            "seconds": conditions.time.seconds,
        }
        try:
            text = json.dumps(stated, indent=2)
        except TypeError as error:
            raise UsageError(
                f"`{pack.label}` can't be trained in another process: {error}",
                hint="give its cell options as params.yaml takes them, or train it in this process",
            ) from error
        files.write_text(self._pack, text)

    def read_pack(self) -> tuple[Pack, Conditions]:
        """What is to be trained, and under which conditions.

        Raises:
            ArtifactError: there is no description, or it is of another version.
        """
        stated = files.read_json(self._pack, what="pack", hint=_HINT)
        try:
            runs = [
                GridRun(GridCell(each["cell"], each["options"], each["method"]), each["seed"], Path(each["folder"]))
                for each in stated["runs"]
            ]
            conditions = Conditions(Path(stated["root"]), bool(stated["replace"]), TimeLeft(stated["seconds"]))
            return Pack(tuple(runs), int(stated["epochs"])), conditions
        except (KeyError, TypeError, ValueError) as error:
            raise ArtifactError(f"`{self._pack}` is not a pack of this version: {error}", hint=_HINT) from error

    def write_outcomes(self, outcomes: Sequence[Outcome]) -> None:
        """Write the outcomes of the runs.

        Raises:
            ArtifactError: the folder can't be written to.
        """
        files.write_json(self._outcomes, [outcome.as_json() for outcome in outcomes])

    def read_outcomes(self, pack: Pack) -> list[Outcome] | None:
        """The outcomes of the runs of a pack, in order; None until the worker has written all of them."""
        try:
            stated = files.parse_json(files.read_regular(self._outcomes))
            by_label = {each["label"]: Outcome(**each) for each in stated}
            return [by_label[run.label] for run in pack.runs]
        except (OSError, ValueError, TypeError, LookupError):
            return None


def _described(run: GridRun) -> dict[str, object]:
    cell = run.cell
    options = {key: str(value) if isinstance(value, Path) else value for key, value in cell.options.items()}
    return {
        "cell": cell.name,
        "method": cell.method,
        "options": options,
        "seed": run.seed,
        "folder": str(run.folder),
    }
