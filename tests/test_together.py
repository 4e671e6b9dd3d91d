"""Many students of one teacher in one process, and what the engine can do besides: averages, skipped steps, tables."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from step_support import READS
from test_engine import SMALL, history, weights

import icdctl as library
from icdctl import api, data, files, models
from icdctl.api import planning
from icdctl.config.dataset_request import dataset_request
from icdctl.config.run_config import RunConfig
from icdctl.data import Augmentation, ImageStore
from icdctl.engine import precision, teacher_cache
from icdctl.engine.run import Failure, run_together
from icdctl.engine.teacher import InlineTeacher
from icdctl.errors import IcdctlError, UsageError
from icdctl.registry import trained

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("teacher") / "run"
    library.train(model="res8", **SMALL, out=str(out))
    return out


def planned(teacher: Path, out: Path, **changes: Any) -> RunConfig:
    given = {**SMALL, "method": "cd_sdd_dkd", "teacher": str(teacher), "student": "res8", "deterministic": True}
    return planning.plan("distill", {**given, **changes, "out": str(out)})


def together(configs: list[RunConfig], teacher: Path, **options: Any) -> list[Any]:
    dataset = data.load(configs[0].images)
    return run_together(configs, dataset, teacher=trained.resolve(str(teacher)).load(), **options)


@pytest.mark.parametrize("mode", ["inline", "ahead", "cache"])
def test_each_student_is_the_one_that_it_would_be_alone(teacher: Path, tmp_path: Path, mode: str) -> None:
    changes: list[dict[str, Any]] = [
        {"method": "kd"},
        {"method": "cd_sdd_dkd"},
        {"method": "cd_sdd_dkd", "settings": {"gamma": 4}},
        {"method": "sdd_nkd", "scales": "1,2"},
        {"method": "kd", "seed": 1},
        {"method": "cd_sdd_kd", "student": "res14", "epochs": 3},
    ]
    views = {"crop_padding": 1, "teacher_mode": mode}
    configs = [planned(teacher, tmp_path / str(n), **views, **change) for n, change in enumerate(changes)]
    results = together(configs, teacher)
    assert all(result.finished for result in results)
    assert results[0].metrics["students_at_once"] == len(changes)
    for number, change in enumerate(changes):
        alone = tmp_path / f"alone-{number}"
        given = {**SMALL, "teacher": str(teacher), "student": "res8", "deterministic": True, **views, **change}
        library.distill(**given, out=str(alone))
        assert weights(alone) == weights(tmp_path / str(number))
        assert history(alone) == history(tmp_path / str(number))


def test_a_failing_student_does_not_take_the_others_down(teacher: Path, tmp_path: Path) -> None:
    configs = [planned(teacher, tmp_path / str(seed), seed=seed) for seed in range(3)]
    configs[1] = configs[1].model_copy(update={"lr": 1e30})
    first, failed, last = together(configs, teacher)
    assert isinstance(failed, Failure)
    assert "no longer finite" in failed.error.message
    assert (first.finished, last.finished) == (True, True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0", "2"]


def test_students_that_differ_in_what_is_shared_are_refused(teacher: Path, tmp_path: Path) -> None:
    one, other = planned(teacher, tmp_path / "a"), planned(teacher, tmp_path / "b", batch_size=16)
    with pytest.raises(UsageError, match="`batch_size` 32 and 16"):
        together([one, other], teacher)
    with pytest.raises(UsageError, match="two runs would write"):
        together([one, one], teacher)
    assert not (tmp_path / "a").exists()


def test_students_resume_together_from_where_each_of_them_is(teacher: Path, tmp_path: Path) -> None:
    configs = [planned(teacher, tmp_path / str(seed), seed=seed, epochs=3) for seed in range(2)]
    stopped = [config.model_copy(update={"time_limit_seconds": 1e-6}) for config in configs]
    assert [result.finished for result in together(stopped, teacher)] == [False, False]
    assert together(configs[:1], teacher, resume=True)[0].finished
    assert [result.finished for result in together(configs, teacher, resume=True)] == [True, True]
    for seed in range(2):
        library.distill(configs[seed], out=str(tmp_path / f"alone-{seed}"))
        assert weights(tmp_path / str(seed)) == weights(tmp_path / f"alone-{seed}")


def test_a_mode_that_a_run_began_with_is_kept(teacher: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    given = {**SMALL, "epochs": 3, "method": "kd", "teacher": str(teacher), "student": "res8", "out": str(out)}
    library.distill(**given, teacher_mode="inline", time_limit=0.001)
    with pytest.raises(UsageError, match="began with `--teacher-mode inline`"):
        library.distill(**given, teacher_mode="cache", resume=True)
    result = library.distill(**given, resume=True)
    assert result.finished
    library.distill(**given, resume=True)
    assert json.loads((out / "config.json").read_text())["teacher_mode"] == "inline"


def test_the_average_of_the_weights_is_evaluated_kept_and_resumed(tmp_path: Path) -> None:
    given = {**SMALL, "epochs": 3, "model": "res8"}
    plain = library.train(**given, out=str(tmp_path / "plain"))
    whole = library.train(**given, ema_decay=0.9, out=str(tmp_path / "whole"))
    assert weights(plain.out) != weights(whole.out)
    assert [row["ce"] for row in history(plain.out)] == [row["ce"] for row in history(whole.out)]
    assert history(plain.out)[-1]["test_loss"] != history(whole.out)[-1]["test_loss"]
    parts = tmp_path / "parts"
    library.train(**given, ema_decay=0.9, out=str(parts), time_limit=0.001)
    library.train(**given, ema_decay=0.9, out=str(parts), resume=True)
    assert weights(whole.out) == weights(parts)
    assert api.evaluate(whole.out).numbers.top1 == whole.top1


def test_a_step_that_is_not_finite_is_skipped_where_that_is_asked_for(tmp_path: Path) -> None:
    class Poisoned(torch.nn.Module):
        """Not finite at some of its batches, counted from 1."""

        def __init__(self, bad: range) -> None:
            super().__init__()
            self.bad = bad
            self.inner = models.create("res8", 100)
            self.calls = 0

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            self.calls += self.training
            logits: torch.Tensor = self.inner(images)
            return logits * torch.nan if self.training and self.calls in self.bad else logits

    result = library.train(model=Poisoned(range(3, 4)), **SMALL, on_nonfinite="skip", out=str(tmp_path / "run"))
    assert result.metrics["nonfinite_steps"] == 1
    assert all(torch.isfinite(tensor).all() for tensor in result.model.state_dict().values())
    with pytest.raises(IcdctlError, match="no step of epoch 1 was finite"):
        library.train(model=Poisoned(range(9)), **SMALL, on_nonfinite="skip", out=str(tmp_path / "lost"))


def test_a_batch_that_was_not_finite_is_kept_for_a_closer_look(teacher: Path, tmp_path: Path) -> None:
    given = {**SMALL, "method": "cd_sdd_dkd", "teacher": str(teacher), "student": "res8", "lr": 1e30}
    with pytest.raises(IcdctlError, match="the batch is kept in") as caught:
        library.distill(**given, clip_norm=1e30, out=str(tmp_path / "run"))
    path = Path(caught.value.message.rpartition("`")[0].rpartition("`")[2])
    kept = load_file(path)
    numbers = ", ".join(map(str, kept["image_numbers"].tolist()))
    assert numbers in caught.value.message
    assert kept["pixels"].shape == (len(kept["labels"]), 32, 32, 3)
    assert kept["teacher_logits"].shape == (len(kept["labels"]), 100)
    assert kept["teacher_regions"].shape == (len(kept["labels"]), 100, 4, 4)


def test_a_student_may_start_from_weights_of_its_own(tmp_path: Path) -> None:
    first = library.train(model="res8", **SMALL, out=str(tmp_path / "first"))
    start = first.out / "student.safetensors"
    result = library.train(model="res8", **SMALL, init_weights=str(start), out=str(tmp_path / "on"))
    assert result.config.init_sha256 == files.sha256_file(start)
    assert history(result.out)[0]["ce"] < history(first.out)[0]["ce"]
    again = library.train(result.config, out=str(tmp_path / "again"))
    assert weights(again.out) == weights(result.out)
    with pytest.raises(IcdctlError, match="can't be read"):
        library.train(model="res8", **SMALL, init_weights=str(tmp_path / "none"), out=str(tmp_path / "x"))
    with pytest.raises(IcdctlError, match="res14"):
        library.train(model="res14", **SMALL, init_weights=str(start), out=str(tmp_path / "x"))
    start.write_bytes((result.out / "student.safetensors").read_bytes())
    with pytest.raises(IcdctlError, match="the configuration states"):
        library.train(result.config, out=str(tmp_path / "x"))


def store_of(count: int, augmentation: Augmentation) -> tuple[ImageStore, data.Dataset]:
    dataset = data.load(dataset_request("digits100", train_images=count, test_images=2))
    return ImageStore(dataset.train_images, dataset.preprocessing, augmentation, device=CPU), dataset


def test_every_view_has_a_number(tmp_path: Path) -> None:
    store, _ = store_of(5, Augmentation(crop_padding=1, flip=True))
    assert store.num_views == 18
    views = store.numbered(torch.arange(90))
    assert torch.equal(store.numbers(views), torch.arange(90))
    assert len(torch.unique(store.pixels(views).flatten(1), dim=0)) == 90
    drawn = store.epoch(seed=1, epoch=2)
    again = store.numbered(store.numbers(drawn))
    assert torch.equal(store.pixels(again), store.pixels(drawn))
    uncounted, _ = store_of(2, Augmentation(crop_scale=(0.5, 1.0)))
    assert uncounted.num_views is None
    with pytest.raises(ValueError, match="no numbers"):
        uncounted.numbered(torch.arange(2))


def asked(
    store: ImageStore, dataset: data.Dataset, **changes: Any
) -> tuple[teacher_cache.Demand, teacher_cache.CachePlan]:
    facts = {
        "num_streams": 1,
        "num_images": 10**6,
        "shapes": {"logits": (100,), "regions": (100, 4, 4)},
        "deterministic": True,
    }
    demand = teacher_cache.Demand(**{**facts, **changes})
    table = teacher_cache.plan_cache(store, demand, dataset, teacher_sha256="a" * 64, precision="fp32")
    assert table is not None
    return demand, table


def test_a_table_of_answers_is_kept_checked_and_made_anew_where_it_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(teacher_cache, "_KEPT_FROM_VIEWS", 1)
    store, dataset = store_of(12, Augmentation(crop_padding=1))
    demand, table = asked(store, dataset)
    torch.manual_seed(0)
    model = models.create("res8", 100).eval()
    inline = InlineTeacher(model, reads=READS, device=CPU)
    told: list[str] = []

    def make(teacher: InlineTeacher) -> Any:
        told.clear()
        mode = teacher_cache.choose_mode("auto", table, demand, CPU)
        assert mode == "cache"
        return teacher_cache.make_teacher(
            mode,
            teacher,
            store,
            table,
            begin=lambda what, total: told.append(f"{what} {total}"),
            advance=lambda count: None,
            message=told.append,
        )

    first = make(inline)
    assert told == ["filling the teacher cache 108"]
    views = store.epoch(seed=0, epoch=1)
    expected = inline(store.inputs(views))
    for made in (first, make(inline)):
        found = made.epoch(views, 64)(0, views, store.inputs(views))
        torch.testing.assert_close(found["logits"], expected["logits"], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(found["regions"], expected["regions"], rtol=1e-4, atol=1e-4)
    assert told == []  # the second one came from the disk
    torch.manual_seed(1)
    make(InlineTeacher(models.create("res8", 100).eval(), reads=READS, device=CPU))
    assert told[0].endswith("it is filled again: the teacher computes other answers now")
    assert table.folder is not None
    with (table.folder / "cells.npy").open("r+b") as file:
        file.seek(-3, os.SEEK_END)
        last = file.read(1)
        file.seek(-3, os.SEEK_END)
        file.write(bytes([last[0] ^ 1]))
    make(inline)
    assert told == [
        f"warning: the teacher cache `{table.folder}` can't be used, it is filled again: `cells.npy` was changed after "
        "it was written",
        "filling the teacher cache 108",
    ]
    assert sorted(path.name for path in table.folder.iterdir()) == ["cells.npy", "facts.json", "logits.npy"]


def test_the_mode_is_the_one_that_is_less_work_and_has_room() -> None:
    store, dataset = store_of(12, Augmentation(crop_padding=1))
    demand, table = asked(store, dataset, num_images=100)
    assert teacher_cache.choose_mode("auto", table, demand, CPU) == "inline"  # 108 views for 100 questions
    demand, table = asked(store, dataset, num_images=200)
    assert teacher_cache.choose_mode("auto", table, demand, CPU) == "cache"
    huge = teacher_cache.CachePlan(10**9, torch.float16, 10**16, None)
    assert (
        teacher_cache.choose_mode("auto", huge, teacher_cache.Demand(1, 10**12, {"logits": (100,)}, False), CPU)
        == "inline"
    )
    with pytest.raises(UsageError, match=r"needs 10000000\.0 GB"):
        teacher_cache.choose_mode("cache", huge, demand, CPU)
    large = asked(store_of(4000, Augmentation(crop_padding=4, flip=True))[0], dataset, deterministic=False)[1]
    assert (large.num_views, large.dtype) == (648_000, torch.float16)
    assert large.num_bytes == 648_000 * 100 * 17 * 2


def test_half_precision_is_chosen_where_it_pays_and_agrees(teacher: Path) -> None:
    model = trained.resolve(str(teacher)).load()
    store, _ = store_of(256, Augmentation())

    def chosen(wanted: str, num_images: int, *, deterministic: bool = False) -> str:
        return precision.choose_teacher_precision(
            wanted, model, store, num_images=num_images, deterministic=deterministic
        )

    assert chosen("auto", 1000) == "fp32"
    assert chosen("auto", 10**9, deterministic=True) == "fp32"
    assert chosen("bf16", 1) == "bf16"
    assert chosen("auto", 10**9) in ("fp32", "bf16")  # as this machine is
    logits = torch.randn((50, 10), generator=torch.Generator().manual_seed(0))
    assert precision._agree(logits, logits + 1e-3)
    assert not precision._agree(logits, logits * 1.5)
    assert not precision._agree(logits, logits * torch.inf)


def test_a_bf16_teacher_trains_a_student(teacher: Path, tmp_path: Path) -> None:
    given = {**SMALL, "method": "cd_sdd_dkd", "teacher": str(teacher), "student": "res8"}
    exact = library.distill(**given, teacher_precision="fp32", out=str(tmp_path / "exact"))
    half = library.distill(**given, teacher_precision="bf16", out=str(tmp_path / "half"))
    assert half.config.teacher_precision == "bf16"
    for key in ("ce", "kd", "cluster"):
        assert history(half.out)[0][key] == pytest.approx(history(exact.out)[0][key], rel=0.05)
