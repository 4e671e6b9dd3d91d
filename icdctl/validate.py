"""Check whether a run folder, a configuration, a weights file, an export or a folder of images is sound."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from pydantic import ValidationError

from icdctl import data, files
from icdctl.config.dataset_request import dataset_request
from icdctl.config.run_config import RunConfig
from icdctl.config.sources import from_validation
from icdctl.data import IMAGE_FOLDER, DatasetName, OnImages, Request, folder_layout, imagefolder
from icdctl.data.decode import BrokenImage, broken_images_message, decode_in_order
from icdctl.data.folder_layout import Division
from icdctl.data.part_files import PartFiles, duplicates, is_dark, nearly_black_message
from icdctl.errors import ArtifactError, IcdctlError
from icdctl.exporting import VerificationReport, verify_file, verify_folder
from icdctl.registry import trained
from icdctl.run_files import HISTORY_FILE, read_history

_AGAIN = "train it again, or continue it with `--resume`"


@dataclass(frozen=True)
class Finding:
    """The outcome of one check."""

    what: str
    """What was checked, e.g. `weights`."""
    sound: bool | None
    """The result of the check; None if it could not be made."""
    found: str
    """What was found, in one sentence."""
    hint: str = ""
    """What to do if it is not sound."""

    def as_json(self) -> dict[str, object]:
        """A value that `json` can write."""
        return asdict(self)


def inspect(path: Path, *, dataset: str | None = None, on_images: OnImages = lambda done, total: None) -> list[Finding]:
    """Check a file or folder with every check that applies to its kind.

    Args:
        path: a run folder, a configuration, a weights file, an export folder, an .onnx file, or `imagefolder:DIR`.
        dataset: the data set of a weights file that does not state it.
        on_images: receives the progress as (done, total) while images are decoded.

    Raises:
        ArtifactError: `path` does not exist, or icdctl does not know this kind of file or folder.
    """
    if DatasetName.parse(str(path)).is_image_folder:
        return _image_folder(dataset_request(str(path)), on_images)
    if not path.exists():
        raise ArtifactError(f"`{path}` does not exist", hint="name a run folder, a file or an export folder")
    if path.is_dir():
        if (path / "manifest.json").is_file() and (path / "model.onnx").is_file():
            return _export_findings(verify_folder(path))
        if (path / "config.json").is_file():
            return _run_folder(path)
        raise ArtifactError(
            f"`{path}` is neither a run folder nor an export",
            hint=f"name the folder itself; to check a folder of images, write `{DatasetName(IMAGE_FOLDER, str(path))}`",
        )
    if path.suffix == ".onnx":
        return _export_findings(verify_file(path))
    if path.suffix == ".json":
        return [_attempt("config", lambda: _config(path))]
    return [_attempt("weights", lambda: _weights(path, dataset))]


def _export_findings(report: VerificationReport) -> list[Finding]:
    hint = "make it again with `icdctl export`"
    sound = {"pass": True, "fail": False}
    return [Finding(check.name, sound.get(check.status), check.detail, hint) for check in report.checks]


def _run_folder(folder: Path) -> list[Finding]:
    findings = [_attempt("config", lambda: _config(folder / "config.json"))]
    if not (folder / "metrics.json").is_file():
        return [*findings, Finding("metrics", False, "the run is not finished: no metrics.json", _AGAIN)]
    findings.append(_attempt("weights", lambda: _weights(folder)))
    findings.append(_attempt("history", lambda: _history(folder)))
    return findings


def _attempt(what: str, look: Callable[[], str]) -> Finding:
    """The finding of a check that returns what it found, or raises an error if that is not sound."""
    try:
        return Finding(what, True, look())
    except trained.CustomModuleError as error:
        return Finding(what, None, error.message, error.hint)
    except IcdctlError as error:
        return Finding(what, False, error.message, error.hint)


def _config(path: Path) -> str:
    stated = files.read_json(path, what="config", hint=_AGAIN)
    if not isinstance(stated, dict):
        raise ArtifactError(f"`{path}` does not hold a JSON object", hint=_AGAIN)
    try:
        config = RunConfig.stated(stated)
    except ValidationError as error:
        raise ArtifactError(f"`{path}`: {from_validation(error).message}", hint=_AGAIN) from error
    except ValueError as error:
        raise ArtifactError(f"`{path}`: {error}", hint=_AGAIN) from error
    return f"{config.method}, {config.student}, {config.dataset}, variant {config.settings['variant']}"


def _weights(path: Path, dataset: str | None = None) -> str:
    found = trained.resolve(str(path), dataset=None if dataset is None else data.describe(dataset_request(dataset)))
    found.load()
    return f"{found.model}, {found.num_classes} classes, finite, sha256 {found.sha256[:12]}"


def _image_folder(wanted: Request, on_images: OnImages) -> list[Finding]:
    """Check that the folder can be divided into parts, and that all its images can be decoded."""
    folder = imagefolder.folder_of(wanted.name)
    try:
        classes = folder_layout.class_names(folder)
        division = folder_layout.divide(
            folder, test_split=wanted.test_split or 0.0, val_split=wanted.val_split, seed=wanted.split_seed
        )
    except IcdctlError as error:
        unchecked = Finding("images", None, "not checked")
        return [Finding("classes", False, error.message, error.hint), unchecked]
    side = imagefolder.side_of(wanted)
    left_out = division.left_out
    return [
        Finding("classes", True, _counted(division, classes)),
        Finding("not read", None if left_out.may_be_images else True, str(left_out) or "no file"),
        *_decoded(folder, division, classes, side, on_images),
    ]


def _counted(division: Division, classes: Sequence[str]) -> str:
    counts = torch.bincount(division.train.labels, minlength=len(classes)).tolist()
    fewest = counts.index(min(counts))
    parts = [
        f"{len(classes)} classes of {counts[fewest]:,} (`{classes[fewest]}`) to {max(counts):,} images for training",
        f"{len(division.test.names):,} images for testing" + ("" if division.has_own_test else ", split off"),
    ]
    if division.val is not None:
        parts.append(f"{len(division.val.names):,} for validation")
    if division.unlabeled:
        parts.append(f"{len(division.unlabeled):,} without labels")
    return "; ".join(parts)


def _decoded(folder: Path, division: Division, classes: Sequence[str], side: int, on_images: OnImages) -> list[Finding]:
    """Decode all images: those that can't be decoded, those that are there twice, those that are nearly black."""
    parts = {"training": division.train, "testing": division.test, "validation": division.val}
    files_of = {use: part.names for use, part in parts.items() if part is not None} | {"unlabelled": division.unlabeled}
    total, number = sum(len(names) for names in files_of.values()), 0
    broken: list[BrokenImage] = []
    dark: list[str] = []
    found: list[PartFiles] = []
    for use, names in files_of.items():
        part, kept, hashes = parts.get(use), [], []
        with closing(decode_in_order((folder / name for name in names), resize=(side, side), crop=None)) as results:
            for row, result in enumerate(results):
                if isinstance(result, BrokenImage):
                    broken.append(result)
                else:
                    kept.append(row)
                    hashes.append(result.sha256)
                    dark += [names[row]] if is_dark(int(result.pixels.max())) else []
                number += 1
                on_images(number, total)
        of_rows = [] if part is None else [classes[label] for label in part.labels[kept].tolist()]
        found.append(PartFiles(use, tuple(names[row] for row in kept), tuple(of_rows), tuple(hashes)))
    twice = duplicates(found)
    return [
        _decodable(broken, total, folder),
        Finding("duplicates", None if twice else True, "; ".join(twice) or "no image is there twice"),
        Finding("brightness", None if dark else True, nearly_black_message(dark) if dark else "no image is black"),
    ]


def _decodable(broken: Sequence[BrokenImage], total: int, folder: Path) -> Finding:
    if broken:
        message = broken_images_message(broken, total, folder=folder)
        return Finding("images", False, message, "fix them, or train with `--skip-broken`")
    return Finding("images", True, f"all {total:,} images can be decoded")


def _history(folder: Path) -> str:
    """Check that every epoch appears once, all values are finite, and the last epoch agrees with metrics.json."""
    path = folder / HISTORY_FILE
    metrics = files.read_json(folder / "metrics.json", what="metrics", hint=_AGAIN)
    try:
        rows = read_history(folder)
        # A run with validation images uses the test images only after its last epoch.
        column, key = ("val_top1", "final_val_top1") if "final_val_top1" in metrics else ("test_top1", "final_top1")
        last, stated = rows[-1][column], files.percentage(metrics[key])
    except (OSError, KeyError, IndexError, TypeError, ValueError) as error:
        raise ArtifactError(f"`{path}` can't be read: {error}", hint=_AGAIN) from error
    if last != stated:
        raise ArtifactError(f"`{path}` ends with {column} {last}, metrics.json states {stated}", hint=_AGAIN)
    return f"{len(rows)} epochs, {column} {stated:.2f}"
