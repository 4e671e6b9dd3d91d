"""Fetch a published teacher: verify the original file, read it without running code, measure, convert and record it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from icdctl import data, evaluation, files, models
from icdctl.data import DatasetInfo, Request, download
from icdctl.data.download import USUAL_PATIENCE, OnBytes, Patience
from icdctl.errors import ArtifactError
from icdctl.models import Classifier
from icdctl.run_files import WEIGHTS_FILE
from icdctl.teachers.published_teachers import (
    LockEntry,
    PublishedTeacher,
    load_list,
    lock_path,
    read_lock,
    record,
    today,
)

TOLERANCE = 0.15
"""The largest accepted difference between the published and the measured top-1, in percentage points."""
ORIGINAL_FILE = "ckpt_epoch_240.pth"


@dataclass(frozen=True)
class FetchOptions:
    """Options of `icdctl fetch-teachers`."""

    from_file: Path | None = None
    """A copy of the original file, used instead of a download."""
    mirrors: Sequence[str] = ()
    """Addresses to try before the published ones."""
    offline: bool = False
    keep_original: bool = False
    """Keep the original .pth file beside the converted one."""
    accept_accuracy: bool = False
    """Accept the teacher whatever its accuracy is."""
    data_folder: Path | None = None
    """The folder with the data sets; None for the usual one."""
    device: str = "cpu"
    """The device that measures the accuracy."""


@dataclass(frozen=True)
class FetchProgress:
    """Functions that receive the progress, each as (done, total)."""

    on_bytes: OnBytes = lambda here, total: None
    """Bytes that were downloaded."""
    on_images: OnBytes = lambda here, total: None
    """Images that were classified to measure the accuracy."""
    on_decoded: OnBytes = lambda here, total: None
    """Images that were decoded; this happens once, before they are classified."""


@dataclass(frozen=True)
class FetchedTeacher:
    """A published teacher that was fetched."""

    name: str
    path: Path
    """Path of the converted weights."""
    entry: LockEntry
    published_top1: float
    new: bool
    """False if it had been fetched before."""
    data_caveat: str | None = None
    """A remark about the data that the accuracy was measured on; None if there is none."""

    @property
    def gate(self) -> str:
        """The outcome of the comparison with the published accuracy: `open` (not measured yet), `passed` or `accepted`
        (despite a difference)."""
        if self.entry.measured_top1 is None:
            return "open"
        return "accepted" if self.entry.accuracy_accepted else "passed"

    def as_json(self) -> dict[str, object]:
        """An entry of `icdctl fetch-teachers --json`."""
        return {
            "name": self.name,
            "path": str(self.path),
            "new": self.new,
            "published_top1": self.published_top1,
            "gate": self.gate,
            **self.entry.model_dump(mode="json"),
        }


def place_of(teacher: PublishedTeacher) -> Path:
    """Path of the converted weights, whether or not they have been fetched."""
    return files.state_folder() / "teachers" / teacher.dataset / teacher.model / WEIGHTS_FILE


def find_fetched(teacher: PublishedTeacher) -> Path | None:
    """Path of the converted weights; None if they have not been fetched for this project.

    Raises:
        ArtifactError: the weights have been changed, or are not as accurate as published.
    """
    entry = read_lock().get(teacher.name)
    path = place_of(teacher)
    if entry is None or not path.is_file():
        return None
    if files.sha256_file(path) != entry.converted_sha256:
        raise ArtifactError(
            f"`{path}` has been changed since it was fetched: its sha256 is not {entry.converted_sha256}",
            hint=f"delete it, then fetch it again with `icdctl fetch-teachers {teacher.name}`",
        )
    if _is_outside(teacher, entry) and not entry.accuracy_accepted:
        raise _not_accurate(teacher, entry)
    return path


def fetch_teacher(
    teacher: PublishedTeacher,
    options: FetchOptions,
    progress: FetchProgress = FetchProgress(),
    *,
    patience: Patience = USUAL_PATIENCE,
) -> FetchedTeacher:
    """Fetch a published teacher, convert it and record it; a teacher that is already there is only checked.

    Args:
        teacher: the teacher to fetch, from `find_published` or `load_list`.
        options: where to fetch it from, and what to accept.
        progress: functions that receive the progress.
        patience: how long a download waits and how often it is repeated.

    Raises:
        ArtifactError: the file could not be fetched, does not have the pinned hash, does not fit its model, or is
            not as accurate as published. Nothing is kept then.
    """
    place = place_of(teacher)
    with files.waited_lock(place.with_name(f".{place.name}.lock")):
        entry = read_lock().get(teacher.name)
        _check_record(teacher, entry)
        if options.from_file is not None:
            download.verify(teacher.remote(entry), options.from_file)
        if entry is not None and _is_right(place, entry):
            return _checked_again(teacher, entry, options, progress)
        original, url = _original(teacher, entry, options, progress, patience)
        try:
            return _converted(teacher, original, url, entry, options, progress)
        finally:
            if options.from_file is None:
                original.unlink(missing_ok=True)


def clear_cache() -> None:
    """Delete the archives that teachers were extracted from; interrupted downloads stay, so that they can continue."""
    for path in _cache().glob("*.tar*"):
        path.unlink(missing_ok=True)


def overview() -> list[dict[str, object]]:
    """The published teachers and the state of each on this machine, as `--list` shows them."""
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


def _state(teacher: PublishedTeacher) -> str:
    try:
        if find_fetched(teacher) is not None:
            return "fetched"
    except ArtifactError:
        return "refused"
    return "not fetched" if teacher.urls else "by hand, from its page"


def _cache() -> Path:
    return files.cache_folder() / "teachers"


def _check_record(teacher: PublishedTeacher, entry: LockEntry | None) -> None:
    if entry is not None and teacher.sha256 is not None and entry.sha256 != teacher.sha256:
        raise ArtifactError(
            f"`{lock_path()}` records sha256 {entry.sha256} for `{teacher.name}`, published is {teacher.sha256}",
            hint=f"that file was edited; delete its entry `{teacher.name}`, then fetch the teacher again",
        )


def _is_right(place: Path, entry: LockEntry) -> bool:
    return place.is_file() and files.sha256_file(place) == entry.converted_sha256


def _trained_on(teacher: PublishedTeacher) -> DatasetInfo:
    return data.describe(Request(teacher.dataset, files.data_folder()))


def _original(
    teacher: PublishedTeacher,
    entry: LockEntry | None,
    options: FetchOptions,
    progress: FetchProgress,
    patience: Patience,
) -> tuple[Path, str]:
    """Path of the published file, which is verified, and the address that it came from."""
    if options.from_file is not None:
        return options.from_file, f"file:{options.from_file.name}"
    if not (teacher.urls or options.mirrors):
        raise _page_only(teacher)
    file = teacher.remote(entry)
    if options.offline and not any(mirror.startswith("file:") for mirror in options.mirrors):
        raise ArtifactError(
            f"teacher `{teacher.name}` has not been fetched: `{place_of(teacher)}` does not exist, and `--offline` "
            "forbids the download",
            hint=file.carry_over,
        )

    def check(path: Path) -> None:
        _loaded(teacher, path)  # raises where the file does not fit the model

    temporary = _cache() / f"{teacher.dataset}-{teacher.reference}.pth"
    temporary.unlink(missing_ok=True)  # left by a run that was killed; its address is no longer known
    origin = download.fetch(
        file,
        temporary,
        mirrors=options.mirrors,
        offline=options.offline,
        on_bytes=progress.on_bytes,
        check=check,
        patience=patience,
    )
    return temporary, str(origin.url)


def _loaded(teacher: PublishedTeacher, path: Path) -> tuple[Classifier, str]:
    """The model with the weights of a file, and the sha256 of the bytes that were read."""
    known = _trained_on(teacher)
    model = models.create(teacher.model, known.num_classes, image_size=known.preprocessing.size)
    try:
        return model, models.load_weights(model, path).sha256
    except ArtifactError as error:
        if not path.is_file():
            raise
        # The error's own hint is for users who choose model and data set; here both are fixed.
        file = teacher.page_file or teacher.remote(None).name
        hint = f"it is not the published `{file}`; download that again from {teacher.page or teacher.source}"
        raise ArtifactError(error.message, hint=hint) from error


def _converted(
    teacher: PublishedTeacher,
    original: Path,
    url: str,
    entry: LockEntry | None,
    options: FetchOptions,
    progress: FetchProgress,
) -> FetchedTeacher:
    """Measure, convert and record, in this order, so that a teacher that is not accepted leaves no files."""
    model, sha256 = _loaded(teacher, original)
    if sha256 != (teacher.pin(entry) or sha256):
        raise ArtifactError(f"`{original}` changed while it was being read", hint="run the command again")
    if entry is None:
        entry = LockEntry(sha256=sha256, converted_sha256=sha256, url=url, first_use=today())
    entry, caveat = _measured(teacher, model, entry, options, progress)
    entry = _accepted(teacher, entry, options, caveat)
    place = place_of(teacher)
    metadata = _trained_on(teacher).weights_metadata(teacher.model)
    origin = {"url": url, "sha256": sha256, "source": teacher.source, "licence": teacher.licence}
    if options.keep_original:
        files.write_bytes(
            place.with_name(ORIGINAL_FILE), files.read_regular(original, most_bytes=files.LARGEST_FOREIGN_BYTES)
        )
    converted = models.save_weights(place, model, {**metadata, "origin": origin})
    entry = entry.model_copy(update={"converted_sha256": converted})
    record(teacher.name, entry)
    return FetchedTeacher(teacher.name, place, entry, teacher.top1, True, caveat)


def _checked_again(
    teacher: PublishedTeacher, entry: LockEntry, options: FetchOptions, progress: FetchProgress
) -> FetchedTeacher:
    """A teacher that was fetched before; its accuracy is measured now if the data were missing then."""
    place = place_of(teacher)
    model, _ = _loaded(teacher, place)
    measured, caveat = _measured(teacher, model, entry, options, progress)
    if measured != entry:
        record(teacher.name, measured)
    accepted = _accepted(teacher, measured, options, caveat)
    if accepted != measured:
        record(teacher.name, accepted)
    return FetchedTeacher(teacher.name, place, accepted, teacher.top1, False, caveat)


def _measured(
    teacher: PublishedTeacher, model: Classifier, entry: LockEntry, options: FetchOptions, progress: FetchProgress
) -> tuple[LockEntry, str | None]:
    """The entry with top-1 on the test set, if that is on this machine, and a remark about the data or None."""
    folder = options.data_folder or files.data_folder()
    if entry.measured_top1 is not None or not data.is_there(teacher.dataset, folder):
        return entry, None
    held = data.load(Request(teacher.dataset, folder), on_images=progress.on_decoded)
    device = torch.device(options.device)
    predict = evaluation.module_predictor(model.eval().to(device), held.preprocessing, device)
    total, here = held.test_images.shape[0], 0

    def count(images: int) -> None:
        nonlocal here
        here += images
        progress.on_images(here, total)

    logits = evaluation.predict_all(predict, held.test_images, on_batch=count)
    model.to("cpu")
    top1 = evaluation.evaluate_logits(logits, held.test_labels).top1
    return entry.model_copy(update={"measured_top1": top1}), held.caveat


def _is_outside(teacher: PublishedTeacher, entry: LockEntry) -> bool:
    return entry.measured_top1 is not None and round(abs(entry.measured_top1 - teacher.top1), 6) > TOLERANCE


def _accepted(teacher: PublishedTeacher, entry: LockEntry, options: FetchOptions, caveat: str | None) -> LockEntry:
    """The entry, marked if the user accepts an accuracy that differs from the published one.

    Raises:
        ArtifactError: the accuracy differs, and the user does not accept that.
    """
    if not _is_outside(teacher, entry) or entry.accuracy_accepted:
        return entry
    if not options.accept_accuracy:
        raise _not_accurate(teacher, entry, caveat)
    return entry.model_copy(update={"accuracy_accepted": True})


def _not_accurate(teacher: PublishedTeacher, entry: LockEntry, caveat: str | None = None) -> ArtifactError:
    note = f" ({caveat})" if caveat else ""
    return ArtifactError(
        f"teacher `{teacher.name}` reaches top-1 {entry.measured_top1:.2f} on the test set, published is "
        f"{teacher.top1:.2f} (allowed difference {TOLERANCE}); it is not accepted{note}",
        hint="the checkpoint or the test data differ from the published ones; to use it nevertheless, run "
        f"`icdctl fetch-teachers {teacher.name} --accept-accuracy`",
    )


def _page_only(teacher: PublishedTeacher) -> ArtifactError:
    where = "no address is known"
    if teacher.page is not None:
        where = f"`{teacher.page_file}` is on {teacher.page}, which programs can't download from"
    return ArtifactError(
        f"teacher `{teacher.name}` can't be downloaded: {where}",
        hint=f"download it by hand, then run `icdctl fetch-teachers {teacher.name} --from FILE`; or train one with "
        f"`icdctl train --model {teacher.model} --dataset {teacher.dataset} --as-teacher`",
    )
