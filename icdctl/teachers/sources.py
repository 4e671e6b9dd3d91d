"""The published teachers, as `teachers.toml` lists them, and what `teachers.lock` recorded of the fetched ones."""

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
"""Of a teacher that is named without one."""
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


def _known_dataset(name: str) -> str:
    if name not in data.DATASETS:
        raise ValueError(f"`{name}` is no data set of icdctl")
    return name


def _known_model(name: str) -> str:
    if name not in models.MODELS:
        raise ValueError(f"`{name}` is no model of icdctl")
    return name


class _Frozen(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class _Row(_Frozen):
    reference: str
    top1: Annotated[float, Field(gt=0, le=100)]
    sha256: Sha256 | Literal["first-use"]
    page_file: str | None = None


class _Collection(_Frozen):
    source: str
    licence: str
    urls: tuple[str, ...]
    page: str | None = None
    teachers: dict[Annotated[str, AfterValidator(_known_model)], _Row]


class Published(_Frozen):
    """A teacher that somebody published."""

    dataset: str
    model: str
    """A name in `MODELS`."""
    reference: str
    """The same in the publisher's spelling."""
    top1: float
    """As published, on the test set, in percent."""
    sha256: str | None
    """Of the original file; None where its publisher states none, and the first use decides."""
    urls: tuple[str, ...]
    page: str | None = None
    """Where a person finds it, when no program can download it."""
    page_file: str | None = None
    source: str = ""
    licence: str = ""

    @property
    def name(self) -> str:
        """As `fetch-teachers` takes it."""
        return f"{self.dataset}/{self.model}"

    @property
    def short_name(self) -> str:
        """The same, without the data set where that goes without saying."""
        return self.model if self.dataset == _USUAL_DATASET else self.name

    def remote(self, recorded: Recorded | None) -> RemoteFile:
        """The file to download, pinned to the published hash or to the one recorded at its first use."""
        first_use = self.sha256 is None and recorded is not None
        return RemoteFile(
            name=f"{self.reference}_vanilla/ckpt_epoch_240.pth",
            urls=self.urls,
            sha256=self.pin(recorded),
            pinned_by=f"the one that `{lock_path()}` recorded at first use as" if first_use else "the published",
        )

    def pin(self, recorded: Recorded | None) -> str | None:
        """The only sha256 that is accepted, if there is one yet."""
        return self.sha256 or (None if recorded is None else recorded.sha256)


class Recorded(_Frozen):
    """What is known of a teacher since it was fetched."""

    sha256: Sha256
    """Of the original file."""
    converted_sha256: Sha256
    """Of the safetensors file made of it."""
    url: str
    first_use: str
    """The day, UTC."""
    measured_top1: float | None = None
    """On the test set that was here, in percent; None while the accuracy gate is open."""
    accuracy_accepted: bool = False
    """It is further from the published value than the gate allows, and a person took it nevertheless."""


@cache
def load_list() -> tuple[Published, ...]:
    """All published teachers, in the order of the file."""
    text = importlib.resources.files("icdctl").joinpath("teachers.toml").read_text(encoding="utf-8")
    return parse_list(text)


def parse_list(text: str) -> tuple[Published, ...]:
    """The teachers of a list in the format of `teachers.toml`.

    Raises:
        ArtifactError: it is not one; the first problem is named.
    """
    try:
        names = Annotated[str, AfterValidator(_known_dataset)]
        collections = TypeAdapter(dict[names, _Collection]).validate_python(tomllib.loads(text))
    except tomllib.TOMLDecodeError as error:
        raise ArtifactError(f"the list of teachers is no TOML: {error}", hint="install icdctl again") from error
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        raise ArtifactError(
            f"the list of teachers is broken at `{place}`: {first['msg']}", hint="install icdctl again"
        ) from error
    return tuple(
        Published(
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


def find_published(name: str) -> Published:
    """The teacher that a person names: `res32x4`, `resnet32x4`, `cifar100/res32x4`; a bare name is CIFAR-100's.

    Raises:
        UsageError: none is published under that name.
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
        "--list` shows those that are",
    )


def lock_path() -> Path:
    """The project's record of the teachers that it uses."""
    return registry.default_folder() / LOCK_FILE


def read_lock() -> dict[str, Recorded]:
    """Name -> what was recorded of it; nothing where nothing was fetched yet.

    Raises:
        ArtifactError: the file is broken.
    """
    path = lock_path()
    if not path.exists():
        return {}
    hint = "restore it, e.g. with `git checkout`; without it, hashes of first use are not known any more"
    value = files.read_json(path, what="record of teachers", hint=hint)
    try:
        return TypeAdapter(dict[str, Recorded]).validate_python(value)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        raise ArtifactError(f"`{path}` is broken at `{place}`: {first['msg']}", hint=hint) from error


def record(name: str, entry: Recorded) -> None:
    """Write one entry, whatever other processes write at the same time.

    Raises:
        ArtifactError: another hash is recorded already, or the file can't be written.
    """
    with files.waited_lock(files.state_folder() / "locks" / LOCK_FILE):
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
    """The day, UTC, as the record has it."""
    return datetime.datetime.now(datetime.UTC).date().isoformat()
