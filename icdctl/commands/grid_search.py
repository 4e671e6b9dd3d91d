"""`icdctl grid run --search optuna`: trials on held-out images, then the best values with every seed."""

from __future__ import annotations

from typing import TYPE_CHECKING

from icdctl.commands import console, grid_training

if TYPE_CHECKING:
    from icdctl.grid import SearchResult
    from icdctl.grid.trials import Search


class SearchDisplay(grid_training.GridDisplay):
    """Prints the progress of a search; as tables on stdout, unless the result is to be JSON."""

    def __init__(self, as_json: bool) -> None:
        super().__init__()
        self._as_json = as_json

    def searched(self, search: Search) -> None:
        """See `icdctl.grid.search.SearchObserver`."""
        if not self._as_json:
            _show(search)


def report(result: SearchResult, as_json: bool) -> None:
    """Print what became of the cells with the best values, and as JSON of the trials too.

    Raises:
        IcdctlError: some runs failed.
    """
    training = result.training
    if not as_json or training.failed:
        grid_training.report(training, as_json, earlier=result.earlier)
        return
    searched = {
        search.cell.name: {**search.as_json(), "best": dict(search.best.values), "cell": search.winner.name}
        for search in result.searches
    }
    runs = [each.as_json() for each in training.outcomes]
    console.show_json({"searched": searched, "runs": runs, "already_done": training.num_before})


def _show(search: Search) -> None:
    """Print all trials, the best first."""
    keys = list(search.space)
    rows = [
        [place, *(trial.values[key] for key in keys), "failed" if trial.val_top1 is None else f"{trial.score:.2f}"]
        for place, trial in sorted(enumerate(search.trials), key=lambda item: -item[1].score)
    ]
    console.show_line(f"{search.cell.name}: top-1 on held-out training images")
    console.show_table(["trial", *keys, "held-out top-1"], rows)
    console.show_line(f"\n{search.winner.name}: the best values, on all training images")
