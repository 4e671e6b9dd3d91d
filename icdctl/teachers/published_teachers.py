"""The published teachers that `teachers.toml` lists, and the fetched ones that `teachers.lock` records."""

from __future__ import annotations

import datetime
import importlib.resources
import tomllib
from functools import cache
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from icdctl import data, files, models, registry
from icdctl.data.download import RemoteFile
from icdctl.errors import ArtifactError, UsageError, unknown_name

LOCK_FILE = "teachers.lock"
FIRST_USE = "first-use"
_USUAL_DATASET = "cifar100"
"""The data set of a teacher that is named without one."""
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


def _known_dataset(name: str) -> str:
    if name not in data.DATASETS:
        raise ValueError(f"icdctl has no data set `{name}`")
    return name


def _known_model(name: str) -> str:
    if name not in models.MODELS:
        raise ValueError(f"icdctl has no model `{name}`")
    return name


class _FrozenModel(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class _Row(_FrozenModel):
    reference: str
    top1: Annotated[float, Field(gt=0, le=100)]
    sha256: Sha256 | Literal["first-use"]
    page_file: str | None = None


class _Collection(_FrozenModel):
    source: str
    licence: str
    urls: tuple[str, ...]
    page: str | None = None
    teachers: dict[Annotated[str, AfterValidator(_known_model)], _Row]


class PublishedTeacher(_FrozenModel):
    """A trained model that others published, which can be used as a teacher."""

    dataset: str
    model: str
    """Name of the architecture in `MODELS`."""
    reference: str
    """The same model in the publisher's spelling."""
    top1: float
    """Published top-1 on the test set, in percent."""
    sha256: str | None
    """Hash of the original file; None if its publisher states none, so that the first download decides."""
    urls: tuple[str, ...]
    """Addresses that programs can download the file from; may be empty."""
    page: str | None = None
    """The web page for downloading the file by hand, if programs can't."""
    page_file: str | None = None
    """Name of the file on that page."""
    source: str = ""
    licence: str = ""

    @property
    def name(self) -> str:
        """The full name that `fetch-teachers` takes, e.g. `cifar100/res32x4`."""
        return f"{self.dataset}/{self.model}"

    @property
    def short_name(self) -> str:
        """The shortest name that `fetch-teachers` takes: without the data set if that is CIFAR-100."""
        return self.model if self.dataset == _USUAL_DATASET else self.name

    def remote(self, recorded: LockEntry | None) -> RemoteFile:
        """The file to download, pinned to the published hash or to the one recorded at its first use."""
        first_use = self.sha256 is None and recorded is not None
        return RemoteFile(
            name=f"{self.reference}_vanilla/ckpt_epoch_240.pth",
            urls=self.urls,
            sha256=self.pin(recorded),
            pinned_by=f"the one that `{lock_path()}` recorded at first use as" if first_use else "the published",
        )

    def pin(self, recorded: LockEntry | None) -> str | None:
        """The only accepted sha256; None if any file is accepted, because this is its first use."""
        return self.sha256 or (None if recorded is None else recorded.sha256)


class LockEntry(_FrozenModel):
    """What `teachers.lock` records about a fetched teacher."""

    sha256: Sha256
    """Hash of the original file."""
    converted_sha256: Sha256
    """Hash of the safetensors file that was made from it."""
    url: str
    """Address that the original file came from."""
    first_use: str
    """Date of the first use, in UTC."""
    measured_top1: float | None = None
    """Measured top-1 on the test set, in percent; None if the test set was not on this machine."""
    accuracy_accepted: bool = False
    """True if the accuracy differs from the published one and the user accepted that."""


@cache
def load_list() -> tuple[PublishedTeacher, ...]:
    """All published teachers, in the order of `teachers.toml`."""
    text = importlib.resources.files("icdctl").joinpath("teachers.toml").read_text(encoding="utf-8")
    return parse_list(text)


def parse_list(text: str) -> tuple[PublishedTeacher, ...]:
    """The teachers in a text with the format of `teachers.toml`.

    Raises:
        ArtifactError: the text does not have this format; the message names the first problem.
    """
    try:
        names = Annotated[str, AfterValidator(_known_dataset)]
        collections = TypeAdapter(dict[names, _Collection]).validate_python(tomllib.loads(text))
    except tomllib.TOMLDecodeError as error:
        raise ArtifactError(f"the list of teachers is not valid TOML: {error}", hint="install icdctl again") from error
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        raise ArtifactError(
            f"the list of teachers is broken at `{place}`: {first['msg']}", hint="install icdctl again"
        ) from error
    return tuple(
        PublishedTeacher(
            dataset=dataset,
            model=model,
            reference=row.reference,
            top1=row.top1,
            sha256=None if row.sha256 == FIRST_USE else row.sha256,
            urls=tuple(url.replace("{reference}", row.reference) for url in collection.urls),
            page=collection.page,
            page_file=row.page_file,
            source=collection.source,
            licence=collection.licence,
        )
        for dataset, collection in collections.items()
        for model, row in collection.teachers.items()
    )


def find_published(name: str) -> PublishedTeacher:
    """The published teacher with a name like `res32x4`, `resnet32x4` or `cifar100/res32x4`.

    A name without a data set means CIFAR-100.

    Raises:
        UsageError: no teacher is published under that name.
    """
    dataset, slash, model = name.rpartition("/")
    dataset = dataset.lower().replace("-", "").replace("_", "") if slash else _USUAL_DATASET
    published = load_list()
    if dataset not in {row.dataset for row in published}:
        known = [row.name for row in published]
        raise unknown_name("published teacher", name, known, listing="icdctl fetch-teachers --list")
    wanted = models.resolve(model)
    for row in published:
        if (row.dataset, row.model) == (dataset, wanted):
            return row
    raise UsageError(
        f"no teacher `{wanted}` for `{dataset}` is published",
        hint=f"train one with `icdctl train --model {wanted} --dataset {dataset} --as-teacher`; `icdctl fetch-teachers "
        "--list` shows the published ones",
    )


def lock_path() -> Path:
    """Path of `teachers.lock`, the project's record of the teachers that it uses."""
    return registry.default_folder() / LOCK_FILE


def read_lock() -> dict[str, LockEntry]:
    """Name -> entry of each fetched teacher; empty if none was fetched yet.

    Raises:
        ArtifactError: the file is broken.
    """
    path = lock_path()
    if not path.exists():
        return {}
    hint = "restore it, e.g. with `git checkout`; without it, the hashes recorded at first use are lost"
    value = files.read_json(path, what="record of teachers", hint=hint)
    try:
        return TypeAdapter(dict[str, LockEntry]).validate_python(value)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        raise ArtifactError(f"`{path}` is broken at `{place}`: {first['msg']}", hint=hint) from error


def record(name: str, entry: LockEntry) -> None:
    """Write one entry; other processes may write theirs at the same time.

    Raises:
        ArtifactError: another hash is recorded already, or the file can't be written.
    """
    with files.lock_beside(lock_path()):
        known = read_lock()
        earlier = known.get(name)
        if earlier is not None and earlier.sha256 != entry.sha256:
            raise ArtifactError(
                f"`{lock_path()}` records sha256 {earlier.sha256} for `{name}`, this file has {entry.sha256}",
                hint="another process recorded it at the same time; run the command again",
            )
        known[name] = entry
        rows = {key: known[key].model_dump(mode="json") for key in sorted(known)}
        files.write_json(lock_path(), rows)


def today() -> str:
    """Today's date in UTC, as `teachers.lock` records it."""
    return datetime.datetime.now(datetime.UTC).date().isoformat()
