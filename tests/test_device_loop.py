"""What a CUDA graph would hold, run as a plain function on a CPU: it leaves the bytes that the plain loop leaves."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from step_support import make_step, teacher_for
from test_engine import SMALL, Stop, history, weights
from test_step import META
from test_together import planned, store_of, together
from torch import Tensor

import icdctl as library
from icdctl import data, models
from icdctl.api import planning
from icdctl.config.dataset_request import dataset_request
from icdctl.data import Augmentation, ImageStore
from icdctl.engine import device_loop, shared_data, student_run, teacher
from icdctl.engine import run as engine
from icdctl.engine.feed import Feed
from icdctl.engine.observer import SilentObserver
from icdctl.methods import METHODS, ModelProbe
from icdctl.methods.patch import pooled_in_order

ByPosition = Callable[[], None]


@pytest.fixture(scope="module")
def taught(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("teacher") / "run"
    library.train(model="res8", **SMALL, out=str(out))
    return out


@pytest.fixture
def by_position(monkeypatch: pytest.MonkeyPatch) -> ByPosition:
    """From the call on, runs go as on CUDA, rehearsals too; in place of a replay stands the function itself."""

    def switch() -> None:
        monkeypatch.setattr(shared_data, "is_device_driven", lambda device: True)
        monkeypatch.setattr(device_loop, "is_device_driven", lambda device: True)
        monkeypatch.setattr(device_loop, "record", lambda step, stream, pool: step)

    return switch


OPTIMIZERS: dict[str, dict[str, Any]] = {
    "sgd": {},
    "nesterov": {"nesterov": True},
    # The update of AdamW reads the rate in double precision, so this one is a float32 number at every step.
    "adamw": {"optimizer": "adamw", "lr": 2.0**-10, "schedule": "step"},
}


@pytest.mark.parametrize(
    ("mode", "optimizer"),
    [("inline", "nesterov"), ("inline", "adamw"), ("ahead", "sgd"), ("cache", "sgd"), ("cache", "adamw")],
)
def test_steps_by_position_leave_the_bytes_of_the_plain_loop(
    taught: Path, tmp_path: Path, by_position: ByPosition, monkeypatch: pytest.MonkeyPatch, mode: str, optimizer: str
) -> None:
    monkeypatch.setattr(teacher, "_STEPS_AHEAD", 3)  # four steps an epoch: both halves of the buffer are used
    monkeypatch.setattr(device_loop, "_REHEARSALS", 1)
    shared = {**OPTIMIZERS[optimizer], "teacher_mode": mode, "crop_padding": 1, "flip": True}
    changes: list[dict[str, Any]] = [
        {"method": "kd"},
        {"method": "cd_sdd_dkd"},
        {"method": "cd_sdd_dkd", "settings": {"gamma": 4}, "ema_decay": 0.9, "on_nonfinite": "skip"},
        {"method": "kd", "max_steps": 6},
        {"method": "ce", "on_nonfinite": "skip"},
        {"method": "sdd_nkd", "seed": 1, "epochs": 3},
    ]

    def trained(name: str) -> list[Path]:
        outs = [tmp_path / name / str(number) for number in range(len(changes))]
        configs = [planned(taught, out, **shared, **change) for out, change in zip(outs, changes, strict=True)]
        assert all(result.finished for result in together(configs, taught))
        return outs

    plain = trained("plain")
    # What one run saved must not be where another one starts.
    monkeypatch.setenv("ICDCTL_HOME", str(tmp_path / "state"))
    by_position()
    for one, other in zip(plain, trained("static"), strict=True):
        assert weights(one) == weights(other)
        assert history(one) == history(other)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_training_without_a_teacher_by_position_resumes_to_the_same_bytes(
    tmp_path: Path, by_position: ByPosition, optimizer: str
) -> None:
    given = {**SMALL, "epochs": 3, "model": "res8", **OPTIMIZERS[optimizer], "crop_scale": "0.5,1"}
    library.train(**given, out=str(tmp_path / "plain"))
    by_position()
    library.train(**given, out=str(tmp_path / "whole"))
    with pytest.raises(engine.Interrupted, match="the state after epoch 1 of 3 is saved"):
        library.train(**given, out=str(tmp_path / "parts"), observer=Stop(after_epoch=1))
    library.train(**given, out=str(tmp_path / "parts"), resume=True)
    assert weights(tmp_path / "plain") == weights(tmp_path / "whole") == weights(tmp_path / "parts")
    assert history(tmp_path / "plain") == history(tmp_path / "whole") == history(tmp_path / "parts")


def test_students_fork_from_the_stream_of_the_step_and_join_it(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []

    class Stream:
        device = torch.device("cpu")

        def __init__(self, name: str) -> None:
            self.name = name

        def wait_stream(self, other: Stream) -> None:
            told.append(f"{self.name} after {other.name}")

    class Student:
        student, state = None, ()

        def __init__(self, name: str) -> None:
            self.name = name

        def __call__(self, *arguments: Any) -> None:
            told.append(f"{self.name} on {current[-1].name}")

    @contextmanager
    def on(stream: Stream) -> Iterator[None]:
        current.append(stream)
        yield
        current.pop()

    def record(step: Callable[[], None], stream: Stream, pool: Any) -> Callable[[], None]:
        told.append(f"capture into {pool}")
        with on(stream):
            step()
        return lambda: told.append(f"replay on {current[-1].name}")

    current = [Stream("main")]
    names = iter(("own", "left", "right"))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: current[-1])
    monkeypatch.setattr(torch.cuda, "stream", on)
    pools = iter(("one pool", "another pool"))
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: next(pools))
    monkeypatch.setattr(device_loop, "is_device_driven", lambda device: True)
    monkeypatch.setattr(device_loop, "side_stream", lambda device: Stream(next(names)))
    monkeypatch.setattr(device_loop, "record", record)
    monkeypatch.setattr(device_loop, "_REHEARSALS", 1)
    store, dataset = store_of(8, Augmentation())
    loop = device_loop.DeviceLoop(store, dataset.train_labels, 4, None, pytest.fail)
    loop.start_epoch(store.epoch(seed=0, epoch=1))
    students: list[Any] = [Student("a"), Student("b")]
    for index in range(2):
        loop.step(index, students, 4)
    once = ["left after own", "a on left", "right after own", "b on right", "own after left", "own after right"]
    captured = ["main after own", "capture into one pool", *once]
    assert told == ["own after main", *once, *captured, "replay on main", "replay on main"]
    told.clear()
    # Torch refuses to capture into a pool whose graphs are all gone.
    loop.forget(students[0])
    loop.step(2, students[1:], 4)
    captured = ["main after own", "capture into another pool", "b on own"]
    assert told == ["own after main", "b on own", *captured, "replay on main"]


def test_work_that_is_under_way_is_waited_for_where_another_student_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []

    @contextmanager
    def beside(stream: str | None) -> Iterator[None]:
        yield

    class Student:
        student, state, compiler = None, (), None

        def __init__(self, *, fails: bool) -> None:
            self.fails = fails

        def __call__(self, *arguments: Any) -> None:
            if self.fails:
                raise torch.OutOfMemoryError("CUDA out of memory")

    names = iter(("own", "left", "right"))
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
    monkeypatch.setattr(device_loop, "is_device_driven", lambda device: True)
    monkeypatch.setattr(device_loop, "side_stream", lambda device: next(names))
    monkeypatch.setattr(device_loop, "beside", beside)
    monkeypatch.setattr(device_loop, "join", lambda stream: told.append(f"joined {stream}"))
    monkeypatch.setattr(device_loop, "_restore", lambda state, saved: told.append("restored"))
    store, dataset = store_of(8, Augmentation())
    said: list[str] = []
    loop = device_loop.DeviceLoop(store, dataset.train_labels, 4, None, said.append)
    loop.start_epoch(store.epoch(seed=0, epoch=1))
    students: list[Any] = [Student(fails=False), Student(fails=True)]
    with pytest.raises(torch.OutOfMemoryError):  # again, without a graph
        loop.step(0, students, 4)
    assert told[:4] == ["joined left", "joined right", "restored", "joined own"]
    assert len(said) == 1


def test_a_capture_that_fails_leaves_the_stream_and_names_its_cause(monkeypatch: pytest.MonkeyPatch) -> None:
    current = ["main"]

    class On:
        def __init__(self, stream: str) -> None:
            self.stream = stream

        def __enter__(self) -> None:
            self.before, current[0] = current[0], self.stream

        def __exit__(self, *error: object) -> None:
            current[0] = self.before

    class Broken(On):
        """What `torch.cuda.graph` is before torch 2.15, where the capture fails: its stream stays the current one."""

        def __init__(self, graph: Any, *, pool: Any, stream: str, capture_error_mode: str) -> None:
            super().__init__(stream)

        def __exit__(self, *error: object) -> None:
            raise RuntimeError("CUDA error: operation failed due to a previous error during capture\nmore of it")

    def step() -> None:
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: None)
    monkeypatch.setattr(torch.cuda, "graph", Broken)
    monkeypatch.setattr(torch.cuda, "stream", On)
    with pytest.raises(RuntimeError) as caught:
        device_loop.record(step, "own", None)  # type: ignore[arg-type]  # a name in place of a stream
    assert current == ["main"]
    assert str(device_loop._cause(caught.value)) == "operation not permitted when stream is capturing"


class Listener(SilentObserver):
    def __init__(self) -> None:
        self.said: list[str] = []

    def message(self, text: str) -> None:
        self.said.append(text)


def test_where_a_capture_fails_the_steps_run_plainly_and_it_is_said_once(
    taught: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = {**SMALL, "method": "cd_sdd_dkd", "teacher": str(taught), "student": "res8"}
    library.distill(**given, out=str(tmp_path / "plain"))
    monkeypatch.setattr(shared_data, "is_device_driven", lambda device: True)
    # This machine's torch captures nothing.
    monkeypatch.setattr(device_loop, "is_device_driven", lambda device: True)

    def refuse(*arguments: Any) -> None:
        raise RuntimeError("operation not permitted when stream is capturing\nmore of it")

    monkeypatch.setattr(device_loop, "record", refuse)
    listener = Listener()
    library.distill(**given, out=str(tmp_path / "static"), observer=listener)
    assert listener.said == [
        "warning: steps run without a CUDA graph, slower, with the same numbers: "
        "operation not permitted when stream is capturing"
    ]
    assert weights(tmp_path / "plain") == weights(tmp_path / "static")


def test_random_augmentation_and_foreign_modules_are_never_captured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*arguments: Any) -> None:
        raise AssertionError("captured")

    class Foreign(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3072, 100))
            self.calls = 0

        def forward(self, images: Tensor) -> Tensor:
            self.calls += self.training
            logits: Tensor = self.inner(images)
            return logits

    module = Foreign()
    monkeypatch.setattr(shared_data, "is_device_driven", lambda device: True)
    monkeypatch.setattr(device_loop, "is_device_driven", lambda device: True)
    monkeypatch.setattr(device_loop, "record", refuse)
    assert library.train(model=module, **SMALL, out=str(tmp_path / "foreign")).finished
    assert module.calls == 8
    assert library.train(model="res8", **SMALL, randaugment_ops=1, out=str(tmp_path / "random")).finished


def test_a_step_that_is_not_finite_ends_the_run_with_its_epoch(
    taught: Path, tmp_path: Path, by_position: ByPosition
) -> None:
    by_position()
    configs = [planned(taught, tmp_path / str(number)) for number in range(2)]
    configs[0] = configs[0].model_copy(update={"lr": 1e30, "clip_norm": 1e30})
    failed, finished = together(configs, taught)
    assert isinstance(failed, engine.Failure)
    assert "step 2 of 4" in failed.error.message
    assert "the batch is kept in" in failed.error.message
    assert finished.finished


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_a_first_step_that_is_left_out_leaves_nothing_behind(tmp_path: Path, optimizer: str) -> None:
    # torch's fused SGD allocates its momentum at the first step and fills it in the kernel, which is left out here.
    config = planned_train(tmp_path, on_nonfinite="skip", **OPTIMIZERS[optimizer])
    shared = shared_data.make_shared_data(config, data.load(config.images), torch.device("cpu"), "fp32")
    student = student_run.StudentRun(config, shared, None, None)
    before = [parameter.detach().clone() for parameter in student.step.student.parameters()]
    images = torch.full((8, 3, 32, 32), torch.nan)
    student.step(0, images, torch.zeros(8, dtype=torch.int64), None)
    for old, new in zip(before, student.step.student.parameters(), strict=True):
        assert torch.equal(old, new)
    states = student.step.optimizer.state.values()
    assert all(not value.any() for state in states for value in state.values())


def planned_train(tmp_path: Path, **changes: Any) -> Any:
    return planning.plan("train", {**SMALL, "student": "res8", **changes, "out": str(tmp_path / "run")})


class TensorRate(torch.optim.Optimizer):
    """Descent by a rate on the device: torch's fused kernels do not run on `meta`."""

    def __init__(self, parameters: Any, rate: Tensor) -> None:
        super().__init__(parameters, {"lr": rate})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]  # torch's own has overloads
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.sub_(group["lr"] * parameter.grad)


@pytest.mark.parametrize("mode", ["inline", "ahead", "cache"])
@pytest.mark.parametrize("method", METHODS)
def test_a_step_by_position_looks_at_no_value(method: str, mode: str) -> None:
    # On `meta` anything that needs a value raises; on CUDA it would stall the loop, and break a capture.
    with META:
        pixels = torch.empty((20, 32, 32, 3), dtype=torch.uint8)
        labels = torch.empty(20, dtype=torch.int64)
        network = models.create("res8", 100)
        students = [models.create("res8", 100) for _ in range(2)]
        rate = torch.tensor(0.1)
    preprocessing = data.describe(dataset_request("cifar100")).preprocessing
    store = ImageStore(pixels, preprocessing, Augmentation(crop_padding=4, flip=True), device=META)
    inline = teacher_for(method, network, META)
    asked: Any = inline
    if mode == "ahead":
        asked = teacher.AheadTeacher(inline, store)
    elif mode == "cache":
        rows = store.num_images * (store.num_views or 1)
        probe = ModelProbe(network, (32, 32))
        tables = {
            name: torch.empty((rows, *probe.shape(name)), device=META, dtype=torch.float16)
            for name in probe.names(inline.reads)
        }
        asked = teacher.CachedTeacher(store, tables)
    steps = [
        make_step(
            method,
            student,
            network,
            lambda parameters: TensorRate(parameters, rate),
            steps_per_epoch=2,
            device=META,
            skip_nonfinite=True,
            ema_decay=0.9,
        )
        for student in students
    ]
    loop = device_loop.DeviceLoop(store, labels, 16, asked, pytest.fail)
    for epoch in (1, 2):
        loop.start_epoch(store.epoch(seed=0, epoch=epoch))
        for step in steps:
            step.start_epoch(epoch)
        for index, size in ((0, 16), (1, 4)):
            rate.fill_(0.1 / epoch)
            loop.step(index, steps, size)
    assert steps[0].log.shape == (2, len(steps[0].objective.term_names) + 1)
    with pytest.raises(RuntimeError, match="meta"):
        steps[1].num_right.item()


@pytest.mark.parametrize("from_cpu", [False, True])
def test_answers_from_elsewhere_are_read_in_time(monkeypatch: pytest.MonkeyPatch, from_cpu: bool) -> None:
    monkeypatch.setattr(teacher, "_STEPS_AHEAD", 2)
    store, _ = store_of(27, Augmentation(crop_padding=1))
    table = torch.randn((27 * 9, 10), generator=torch.Generator().manual_seed(0))
    cached = teacher.CachedTeacher(store, {"logits": table})
    feed = Feed(5, torch.device("cpu"))
    buffered = teacher._Buffered(feed, cached.of_views, from_cpu=from_cpu)
    for epoch in (1, 2):
        drawn = store.epoch(seed=0, epoch=epoch)
        feed.load(drawn)
        for index in range(6):
            buffered.prepare(index)
            part = drawn[index * 5 : index * 5 + 5]
            views = feed.batch(len(part))
            assert torch.equal(views.index, part.index)
            assert torch.equal(buffered(views, torch.empty(0))["logits"], table[store.numbers(part)])
            feed.position += 1


@pytest.mark.parametrize("side", [1, 2, 4, 7, 8, 14, 28])
def test_pooling_in_order_is_torchs_pooling(side: int) -> None:
    features = torch.randn((2, 3, side, side), dtype=torch.float64, generator=torch.Generator().manual_seed(side))
    torch.testing.assert_close(pooled_in_order(features), F.adaptive_avg_pool2d(features, 4))
