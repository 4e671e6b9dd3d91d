"""`icdctl grid run --search optuna`: trials on held-out images, kept, gone on with, not chosen by the test set."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from conftest import CommandLine
from grid_support import PLAIN, started, wait_until, write_params

from icdctl.errors import IcdctlError, UsageError
from icdctl.grid.cells import read_grid
from icdctl.grid.search_space import Range, Trial, parse_space, searchable
from icdctl.grid.trials import Search

pytest.importorskip("optuna", reason="optuna is not installed (`pip install 'icdctl[search]'`)")

TRAIN: dict[str, Any] = {"dataset": "digits100", "train_images": 300, "test_images": 50, "epochs": 1, "device": "cpu"}
SEARCH = ("grid", "run", "mine", "--search", "optuna", "--sweep", "lr=0.01..0.1:log", "--sweep", "batch_size=32,64")


@pytest.fixture(autouse=True)
def project() -> None:
    write_params({"mine": PLAIN}, train=TRAIN, seeds=[3, 4])


def trials_of(cell: str) -> list[dict[str, Any]]:
    held = json.loads((Path("runs") / f"{cell}-search/search.json").read_text())
    return list(held["trials"])


def made(**changes: Any) -> Search:
    """A search that trains nothing."""
    grid = read_grid(Path.cwd())
    given = {"space": parse_space(["lr=0.01..0.1:log"]), "seeds": (3,), "val_split": 0.1, **changes}
    return Search(grid, grid.cells[0], given["space"], seeds=given["seeds"], val_split=given["val_split"])


def test_spaces_by_hand() -> None:
    assert parse_space(["gamma=0.5..8", "lr=1e-3..0.1:log", "batch-size=32..64", "scales=1,2;1,2,4"]) == {
        "gamma": Range(0.5, 8.0, is_logarithmic=False, is_whole=False),
        "lr": Range(0.001, 0.1, is_logarithmic=True, is_whole=False),
        "batch_size": Range(32, 64, is_logarithmic=False, is_whole=True),
        "scales": ("1,2", "1,2,4"),
    }
    for wrong in (
        [],
        ["gamma=8..0.5"],
        ["gamma=1..x"],
        ["gamma=0..8:log"],
        ["gamma=1..inf"],
        ["gamma=1..8:cubic"],
        ["=1..8"],
        ["gamma=1..8", "gamma=1,2"],
        ["gamma"],
    ):
        with pytest.raises(UsageError):
            parse_space(wrong)


def test_trials_are_judged_on_held_out_images_and_the_best_is_trained_on_all(icdctl: CommandLine) -> None:
    code, out, err = icdctl(*SEARCH, "--trials", "3", "--together", "2", "--json")
    assert code == 0, err
    told = json.loads(out)
    found = told["searched"]["mine"]
    assert len(found["trials"]) == 3
    for trial in found["trials"]:
        values = trial["values"]
        folder = Path("runs/mine-search") / f"lr{values['lr']}-batchsize{values['batch_size']}" / "s3"
        config, metrics = (json.loads((folder / name).read_text()) for name in ("config.json", "metrics.json"))
        assert (config["val_split"], config["lr"], config["seed"]) == (0.1, float(values["lr"]), 3)
        assert trial["val_top1"] == [metrics["final_val_top1"]]
    scores = [trial["val_top1"][0] for trial in found["trials"]]
    assert found["best"] == found["trials"][scores.index(max(scores))]["values"]
    assert found["cell"] == "mine-searched"
    assert [run["label"] for run in told["runs"]] == ["mine-searched/s3", "mine-searched/s4"]
    config = json.loads(Path("runs/mine-searched/s4/config.json").read_text())
    assert (config["val_split"], config["lr"]) == (0.0, float(found["best"]["lr"]))
    # What trials reach on the test images is told to nobody.
    lines = [json.loads(line) for line in Path("runs/grid.jsonl").read_text().splitlines()]
    done = [line for line in lines if line["state"] == "done"]
    assert [("top1" in line) for line in done] == ["searched" in line["label"] for line in done]
    assert "search/lr" in err
    assert not [line for line in err.splitlines() if "mine-search/" in line and "top-1" in line]
    # The same again trains nothing; more trials go on from these.
    code, out, err = icdctl(*SEARCH, "--trials", "3", "--json")
    assert (code, json.loads(out)["runs"], json.loads(out)["already_done"]) == (0, [], 2)
    code, out, err = icdctl(*SEARCH, "--trials", "3")
    assert code == 0, err
    assert [line.split()[:2] for line in out.splitlines()[-2:]] == [[f"mine-searched/s{n}", "done"] for n in (3, 4)]
    code, out, err = icdctl(*SEARCH, "--trials", "4", "--replace")
    assert code == 0, err
    assert trials_of("mine")[:3] == found["trials"]
    assert len(trials_of("mine")) == 4
    assert "held-out top-1" in out


def test_trials_of_other_settings_are_not_mixed_with_new_ones(icdctl: CommandLine) -> None:
    given = ("grid", "run", "--search", "optuna", "--sweep", "lr=0.01..0.1:log", "--trials")
    assert icdctl(*given, "1")[0] == 0
    write_params({"mine": PLAIN}, train={**TRAIN, "epochs": 2}, seeds=[3, 4])
    code, _, err = icdctl(*given, "2")
    assert (code, "they had other settings: epochs 1 -> 2" in err, len(trials_of("mine"))) == (2, True, 1), err
    write_params({"mine": PLAIN}, train=TRAIN, seeds=[3, 4])
    code, _, err = icdctl(*given, "2", "--replace")
    assert (code, len(trials_of("mine"))) == (0, 2), err


def test_cells_that_lack_what_is_searched_are_left_out(icdctl: CommandLine) -> None:
    other = {"teacher": "teacher", "student": "res8", "method": "kd"}
    grid = read_grid(Path.cwd())
    write_params({"mine": PLAIN, "other": other}, train=TRAIN, seeds=[3, 4])
    both = read_grid(Path.cwd())
    assert searchable(grid, parse_space(["lr=0.01..0.1"])) == (grid, [])
    found, left_out = searchable(both, parse_space(["temperature=1..4"]))
    assert ([cell.name for cell in found.cells], len(left_out)) == (["other"], 1)
    assert "`mine` is left out" in left_out[0]


def test_a_search_that_was_stopped_asks_for_the_same_and_goes_on(icdctl: CommandLine) -> None:
    asked = made().ask(3)
    assert asked == made().ask(3)
    assert all(0.01 <= float(values["lr"]) <= 0.1 for values in asked)
    given = ("grid", "run", "--search", "optuna", "--sweep", "lr=0.01..0.1:log", "--trials", "3")
    code, _, err = icdctl(*given, "--time-limit", "0.001s")
    assert code == 0, err
    assert "the time limit came first" in err
    assert not Path("runs/mine-search/search.json").exists()
    code, _, err = icdctl(*given)
    assert code == 0, err
    assert [trial["values"] for trial in trials_of("mine")] == asked


def test_what_comes_next_follows_from_the_trials(icdctl: CommandLine) -> None:
    first, second = made(), made()
    for search in (first, second):
        search.trials = [Trial({"lr": f"{0.01 * n}"}, (10.0 * n,)) for n in range(1, 10)] + [Trial({"lr": "0.1"}, None)]
    assert first.ask(2) == second.ask(2)
    assert first.best.values == {"lr": "0.09"}
    assert first.trials[-1].score == -math.inf
    assert Trial({}, (1.0, 2.0)).score == 1.5
    first.trials = first.trials[-1:]
    with pytest.raises(IcdctlError, match="all trials of `mine` failed"):
        _ = first.best


def test_a_small_space_is_tried_whole(icdctl: CommandLine) -> None:
    given = ("grid", "run", "--search", "optuna", "--sweep", "batch_size=32,64", "--trials", "9")
    code, _, err = icdctl(*given)
    assert code == 0, err
    assert sorted(trial["values"]["batch_size"] for trial in trials_of("mine")) == ["32", "64"]
    assert "all values of the space were tried" in err


def test_a_trial_that_fails_is_none_to_choose(icdctl: CommandLine) -> None:
    given = ("grid", "run", "--search", "optuna", "--sweep", "lr=0.05,1e30", "--trials", "2")
    code, out, err = icdctl(*given)
    assert code == 0, err
    by_lr = {trial["values"]["lr"]: trial["val_top1"] for trial in trials_of("mine")}
    assert by_lr["1e30"] is None
    assert len(by_lr["0.05"]) == 1
    assert "failed" in out


@pytest.mark.parametrize(
    ("more", "code", "message"),
    [
        (["--search", "random"], 2, "unknown search `random`"),
        (["--search", "optuna", "--jobs", "2"], 2, "in this process"),
        (["--search", "optuna", "--gpus", "0"], 2, "in this process"),
        (["--search", "optuna", "--trial-seeds", "3"], 2, "`--trial-seeds 3`"),
        (["--search", "optuna", "--val-split", "0"], 2, "`--val-split 0`"),
        (["--search", "optuna", "--sweep", "gamma=1..2"], 2, "no cell that is swept has `gamma`"),
        (["--search", "optuna", "--sweep", "momentum=0.5..2"], 2, "`momentum`"),
        (["--search", "optuna", "--sweep", "lr=0.02..0.2"], 2, "for the second time"),
    ],
)
def test_what_can_not_be_searched_is_told(icdctl: CommandLine, more: list[str], code: int, message: str) -> None:
    found, out, err = icdctl("grid", "run", "--sweep", "lr=0.01..0.1", *more)
    assert (found, out) == (code, "")
    assert message in err
    assert not Path("runs").exists()


def test_trials_of_another_space_or_a_broken_file_are_refused(icdctl: CommandLine) -> None:
    search = made()
    search.trials = [Trial({"lr": "0.05"}, (1.0,))]
    Path("runs/mine-search").mkdir(parents=True)
    path = Path("runs/mine-search/search.json")
    path.write_text(json.dumps(search.as_json()))
    assert made().trials == search.trials
    given = ("grid", "run", "--search", "optuna", "--sweep")
    code, _, err = icdctl(*given, "lr=0.01..0.2:log")
    assert (code, "trials of another space" in err) == (2, True)
    for broken in ("{}", "[]", '{"of": 1', json.dumps({**search.as_json(), "trials": [{"values": 3}]})):
        path.write_text(broken)
        code, _, err = icdctl(*given, "lr=0.01..0.1:log")
        assert code in (1, 2), err
        assert "delete `" in err


def status(icdctl: CommandLine) -> dict[str, Any]:
    """What `grid status` says of the one search."""
    code, out, err = icdctl("grid", "status", "--json")
    assert code == 0, err
    told = json.loads(out)
    assert [cell["name"] for cell in told["cells"]] == ["mine"]
    (found,) = told["searches"]
    assert isinstance(found, dict)
    return found


def test_status_shows_a_search_and_the_cell_that_it_made(icdctl: CommandLine) -> None:
    assert json.loads(icdctl("grid", "status", "--json")[1])["searches"] == []
    given = ("grid", "run", "--search", "optuna", "--sweep", "lr=0.05,1e30", "--trials", "2")
    assert icdctl(*given)[0] == 0
    found = status(icdctl)
    (score,) = next(trial["val_top1"] for trial in trials_of("mine") if trial["val_top1"] is not None)
    assert found["best"] == {"values": {"lr": "0.05"}, "val_top1": score}
    assert (found["done"], found["failed"], found["running"], found["begun"], found["note"]) == (1, 1, [], [], "")
    assert {trial["values"]["lr"]: trial["state"] for trial in found["trials"]} == {"0.05": "done", "1e30": "failed"}
    winner = found["searched"]
    assert (winner["name"], winner["done"], winner["missing"], len(winner["top1"])) == ("mine-searched", 2, 0, 2)
    path = Path("runs/mine-search/search.json")
    whole = path.read_text()
    path.write_text(whole.replace(str(score), "99.0"))
    assert "search.json` has changed since a search wrote it" in status(icdctl)["note"]
    path.write_text(whole)
    lines = [line.split() for line in icdctl("grid", "status")[1].splitlines()]
    assert [line[:2] for line in lines[1:3]] == [["mine", "0"], ["mine-searched", "2"]]
    assert lines[-1] == ["mine", "1", "0", "0", "1", f"{score:.2f}", "lr", "0.05"]
    code, out, err = icdctl("grid", "plan")
    assert (code, "2 of 2 runs are left" in err, "searches are not counted here" in err) == (0, True, True)
    assert "mine-searched" not in out
    write_params({"mine": PLAIN}, train={**TRAIN, "epochs": 2}, seeds=[3, 4])
    found = status(icdctl)
    assert found["note"] == "its trials had other settings: epochs 1 -> 2"
    assert (found["searched"]["stale"], found["searched"]["note"]) == (2, "epochs 1 -> 2")
    path.write_text("{")
    found = status(icdctl)
    assert (found["trials"], found["best"], found["searched"]) == ([], None, None)
    assert "can't be read" in found["note"]


def test_status_tells_trials_at_work_from_those_that_were_interrupted(icdctl: CommandLine) -> None:
    write_params({"mine": PLAIN}, train={**TRAIN, "epochs": 400}, seeds=[3])
    given = ("grid", "run", "--search", "optuna", "--sweep", "lr=0.01,0.02", "--trials", "2", "--together", "2")
    with started(*given):
        wait_until(lambda: len(list(Path("runs/mine-search").glob("lr*/s3/history.csv"))) == 2, what="both trials")
        found = status(icdctl)
        assert (found["running"], found["begun"], found["done"]) == (["lr0.01", "lr0.02"], [], 0)
        assert (found["best"], found["searched"]) == (None, None)
    found = status(icdctl)
    assert (found["running"], found["begun"], found["done"]) == ([], ["lr0.01", "lr0.02"], 0)
    assert icdctl("grid", "status")[1].splitlines()[-1].split() == ["mine", "0", "0", "2", "0"]


def test_a_cell_that_is_called_as_a_search_is_none(icdctl: CommandLine) -> None:
    write_params({"mine": PLAIN, "mine-search": PLAIN}, train=TRAIN, seeds=[3])
    assert icdctl("grid", "run", "mine-search")[0] == 0
    assert json.loads(icdctl("grid", "status", "--json")[1])["searches"] == []


def test_where_the_data_lie_makes_no_other_search(icdctl: CommandLine) -> None:
    given = ("grid", "run", "--search", "optuna", "--sweep", "lr=0.01..0.1:log", "--trials")
    assert icdctl(*given, "1", "--data-dir", "here")[0] == 0
    code, _, err = icdctl(*given, "2", "--data-dir", "there", "--replace")
    assert (code, len(trials_of("mine"))) == (0, 2), err
