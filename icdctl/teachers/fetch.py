"""Getting a published teacher: the original verified, read without running code, measured, converted, recorded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from icdctl import data, evaluation, files, models
from icdctl.data import DatasetInfo, download
from icdctl.data.download import USUAL_PATIENCE, OnBytes, Patience
from icdctl.errors import ArtifactError
from icdctl.models import Classifier
from icdctl.run_files import WEIGHTS_FILE
from icdctl.teachers.sources import Published, Recorded, load_list, lock_path, read_lock, record, today

TOLERANCE = 0.15
"""Percentage points of top-1 between the published value and ours."""
ORIGINAL_FILE = "ckpt_epoch_240.pth"


@dataclass(frozen=True)
class Wishes:
    """How a person wants teachers fetched."""

    from_file: Path | None = None
    """A copy of the original; nothing is downloaded then."""
    mirrors: Sequence[str] = ()
    offline: bool = False
    keep_original: bool = False
    accept_accuracy: bool = False
    """Take it whatever its accuracy is."""
    data_folder: Path | None = None
    device: str = "cpu"


@dataclass(frozen=True)
class Watcher:
    """Who is told of the progress."""

    on_bytes: OnBytes = lambda here, total: None
    on_images: OnBytes = lambda here, total: None
    """The same of images that are classified."""
    on_decoded: OnBytes = lambda here, total: None
    """The same of images that are decoded before that, the first time."""


@dataclass(frozen=True)
class Fetched:
    """A published teacher in its place."""

    name: str
    path: Path
    """The converted weights."""
    entry: Recorded
    published_top1: float
    new: bool
    """False where it was there already."""
    data_caveat: str | None = None
    """What a reader of the measured accuracy must know of the data."""

    @property
    def gate(self) -> str:
        """What the comparison with the published accuracy came to."""
        if self.entry.measured_top1 is None:
            return "open"
        return "accepted" if self.entry.accuracy_accepted else "passed"

    def as_json(self) -> dict[str, Any]:
        """A line of `icdctl fetch-teachers --json`."""
        return {
            "name": self.name,
            "path": str(self.path),
            "new": self.new,
            "published_top1": self.published_top1,
            "gate": self.gate,
            **self.entry.model_dump(mode="json"),
        }


def place_of(teacher: Published) -> Path:
    """Where the converted weights lie."""
    return files.state_folder() / "teachers" / teacher.dataset / teacher.model / WEIGHTS_FILE


def find_fetched(teacher: Published) -> Path | None:
    """The converted weights, if this project's record knows them and they are as it says.

    Raises:
        ArtifactError: they have been changed, or are not as accurate as published.
    """
    entry = read_lock().get(teacher.name)
    path = place_of(teacher)
    if entry is None or not path.is_file():
        return None
    if files.sha256_file(path) != entry.converted_sha256:
        raise ArtifactError(
            f"`{path}` has been changed since it was fetched: its sha256 is not {entry.converted_sha256}",
            hint=f"delete it, then `icdctl fetch-teachers {teacher.name}` brings it again",
        )
    if _is_outside(teacher, entry) and not entry.accuracy_accepted:
        raise _not_accurate(teacher, entry)
    return path


def fetch_teacher(
    teacher: Published,
    wishes: Wishes,
    watcher: Watcher = Watcher(),
    *,
    patience: Patience = USUAL_PATIENCE,
) -> Fetched:
    """Have a published teacher in its place, converted and recorded.

    Raises:
        ArtifactError: it can't be had, is another file than the one that is pinned, does not fit its model, or is
            not as accurate as published. Nothing of it is kept then.
    """
    place = place_of(teacher)
    with files.waited_lock(place.with_name(f".{place.name}.lock")):
        entry = read_lock().get(teacher.name)
        _check_record(teacher, entry)
        if wishes.from_file is not None:
            download.verify(teacher.remote(entry), wishes.from_file)
        if entry is not None and _is_right(place, entry):
            return _through_the_gate(teacher, entry, wishes, watcher)
        original, url = _original(teacher, entry, wishes, watcher, patience)
        try:
            return _take(teacher, original, url, entry, wishes, watcher)
        finally:
            if wishes.from_file is None:
                original.unlink(missing_ok=True)


def clear_cache() -> None:
    """Delete the archives that teachers were taken from; downloads that were cut stay, to be gone on with."""
    for path in _cache().glob("*.tar*"):
        path.unlink(missing_ok=True)


def overview() -> list[dict[str, Any]]:
    """The published teachers, and what became of each here, as `--list` shows them."""
    lock = read_lock()
    rows = []
    for teacher in load_list():
        entry = lock.get(teacher.name)
        recorded = "first use" if entry is None else "recorded"
        rows.append(
            {
                "name": teacher.name,
                "dataset": teacher.dataset,
                "model": teacher.model,
                "published top-1": teacher.top1,
                "measured top-1": None if entry is None else entry.measured_top1,
                "state": _state(teacher),
                "hash": "published" if teacher.sha256 else recorded,
                "sha256": teacher.pin(entry),
                "source": teacher.page or teacher.source,
                "licence": teacher.licence,
            }
        )
    return rows


def _state(teacher: Published) -> str:
    try:
        if find_fetched(teacher) is not None:
            return "fetched"
    except ArtifactError:
        return "refused"
    return "not fetched" if teacher.urls else "by hand, from its page"


def _cache() -> Path:
    return files.cache_folder() / "teachers"


def _check_record(teacher: Published, entry: Recorded | None) -> None:
    if entry is not None and teacher.sha256 is not None and entry.sha256 != teacher.sha256:
        raise ArtifactError(
            f"`{lock_path()}` records sha256 {entry.sha256} for `{teacher.name}`, published is {teacher.sha256}",
            hint=f"somebody changed it; delete its entry `{teacher.name}`, then fetch the teacher again",
        )


def _is_right(place: Path, entry: Recorded) -> bool:
    return place.is_file() and files.sha256_file(place) == entry.converted_sha256


def _trained_on(teacher: Published) -> DatasetInfo:
    return data.describe(data.request(teacher.dataset))


def _original(
    teacher: Published, entry: Recorded | None, wishes: Wishes, watcher: Watcher, patience: Patience
) -> tuple[Path, str]:
    """The file as published, verified, and where it is from."""
    if wishes.from_file is not None:
        return wishes.from_file, f"file:{wishes.from_file.name}"
    if not (teacher.urls or wishes.mirrors):
        raise _page_only(teacher)
    file = teacher.remote(entry)
    if wishes.offline and not any(mirror.startswith("file:") for mirror in wishes.mirrors):
        raise ArtifactError(
            f"teacher `{teacher.name}` is not there: no `{place_of(teacher)}`, and `--offline` forbids to download it",
            hint=file.carry_over,
        )

    def check(path: Path) -> None:
        _loaded(teacher, path)  # read, and compared with the model

    stopover = _cache() / f"{teacher.dataset}-{teacher.reference}.pth"
    stopover.unlink(missing_ok=True)  # of a run that was killed; its address is not known any more
    origin = download.fetch(
        file,
        stopover,
        mirrors=wishes.mirrors,
        offline=wishes.offline,
        on_bytes=watcher.on_bytes,
        check=check,
        patience=patience,
    )
    return stopover, str(origin.url)


def _loaded(teacher: Published, path: Path) -> tuple[Classifier, str]:
    """The model with the weights of a file, and the sha256 of what was read."""
    known = _trained_on(teacher)
    model = models.create(teacher.model, known.num_classes, image_size=known.preprocessing.size)
    try:
        return model, models.load_weights(model, path).sha256
    except ArtifactError as error:
        if not path.is_file():
            raise
        # Its hint is for a person who may choose model and data set.
        file = teacher.page_file or teacher.remote(None).name
        hint = f"it is not `{file}` as published; get that again from {teacher.page or teacher.source}"
        raise ArtifactError(error.message, hint=hint) from error


def _take(
    teacher: Published, original: Path, url: str, entry: Recorded | None, wishes: Wishes, watcher: Watcher
) -> Fetched:
    """Measure, convert, record, in this order: what the gate refuses leaves no trace."""
    model, sha256 = _loaded(teacher, original)
    if sha256 != (teacher.pin(entry) or sha256):
        raise ArtifactError(f"`{original}` was replaced while it was being read", hint="run the command again")
    if entry is None:
        entry = Recorded(sha256=sha256, converted_sha256=sha256, url=url, first_use=today())
    entry, caveat = _measured(teacher, model, entry, wishes, watcher)
    entry = _accepted(teacher, entry, wishes, caveat)
    place = place_of(teacher)
    said = _trained_on(teacher).weights_metadata(teacher.model)
    origin = {"url": url, "sha256": sha256, "source": teacher.source, "licence": teacher.licence}
    if wishes.keep_original:
        files.write_bytes(place.with_name(ORIGINAL_FILE), original.read_bytes())
    converted = models.save_weights(place, model, {**said, "origin": origin})
    entry = entry.model_copy(update={"converted_sha256": converted})
    record(teacher.name, entry)
    return Fetched(teacher.name, place, entry, teacher.top1, True, caveat)


def _through_the_gate(teacher: Published, entry: Recorded, wishes: Wishes, watcher: Watcher) -> Fetched:
    """A teacher that is there: measured now, if that could not be done when it was fetched."""
    place = place_of(teacher)
    model, _ = _loaded(teacher, place)
    measured, caveat = _measured(teacher, model, entry, wishes, watcher)
    if measured != entry:
        record(teacher.name, measured)
    accepted = _accepted(teacher, measured, wishes, caveat)
    if accepted != measured:
        record(teacher.name, accepted)
    return Fetched(teacher.name, place, accepted, teacher.top1, False, caveat)


def _measured(
    teacher: Published, model: Classifier, entry: Recorded, wishes: Wishes, watcher: Watcher
) -> tuple[Recorded, str | None]:
    """The entry with top-1 on the test set, where it is here, and what to know of the data."""
    folder = wishes.data_folder or files.data_folder()
    if entry.measured_top1 is not None or not data.is_there(teacher.dataset, folder):
        return entry, None
    held = data.load(data.request(teacher.dataset, folder=folder), on_images=watcher.on_decoded)
    device = torch.device(wishes.device)
    predict = evaluation.module_predictor(model.eval().to(device), held.preprocessing, device)
    total, here = held.test_images.shape[0], 0

    def count(images: int) -> None:
        nonlocal here
        here += images
        watcher.on_images(here, total)

    logits = evaluation.predict_all(predict, held.test_images, on_batch=count)
    model.to("cpu")
    top1 = evaluation.evaluate_logits(logits, held.test_labels).top1
    return entry.model_copy(update={"measured_top1": top1}), held.caveat


def _is_outside(teacher: Published, entry: Recorded) -> bool:
    return entry.measured_top1 is not None and round(abs(entry.measured_top1 - teacher.top1), 6) > TOLERANCE


def _accepted(teacher: Published, entry: Recorded, wishes: Wishes, caveat: str | None) -> Recorded:
    """The entry, with a note where a person takes an accuracy that was not published.

    Raises:
        ArtifactError: it is not what was published, and nobody accepts that.
    """
    if not _is_outside(teacher, entry) or entry.accuracy_accepted:
        return entry
    if not wishes.accept_accuracy:
        raise _not_accurate(teacher, entry, caveat)
    return entry.model_copy(update={"accuracy_accepted": True})


def _not_accurate(teacher: Published, entry: Recorded, caveat: str | None = None) -> ArtifactError:
    note = f" ({caveat})" if caveat else ""
    return ArtifactError(
        f"teacher `{teacher.name}` reaches top-1 {entry.measured_top1:.2f} on the test set, published is "
        f"{teacher.top1:.2f} (allowed difference {TOLERANCE}); it is not accepted{note}",
        hint="it is another checkpoint, or the data are others; "
        f"`icdctl fetch-teachers {teacher.name} --accept-accuracy` takes it nevertheless",
    )


def _page_only(teacher: Published) -> ArtifactError:
    where = "it has no address"
    if teacher.page is not None:
        where = f"`{teacher.page_file}` lies on {teacher.page}, which no program can download from"
    return ArtifactError(
        f"teacher `{teacher.name}` can't be downloaded: {where}",
        hint=f"get it there, then `icdctl fetch-teachers {teacher.name} --from FILE`; or "
        f"`icdctl train --model {teacher.model} --dataset {teacher.dataset} --as-teacher` trains one",
    )
