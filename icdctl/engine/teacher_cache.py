"""The teacher cache, and the choice between it and running the teacher on each batch or some steps ahead.

A frozen teacher in eval mode is a pure function of the view, so its answers may be computed at any time. A table of all
views is kept on disk, under the hashes of everything that it depends on; a part of it is computed again and compared
before it is used.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from icdctl import files
from icdctl.data import Dataset, ImageStore
from icdctl.engine.teacher import SUPER_BATCH, AheadTeacher, CachedTeacher, InlineTeacher, Teacher
from icdctl.errors import ArtifactError, UsageError
from icdctl.methods import LOGITS, REGIONS, SMALL_READS

Mode = Literal["inline", "ahead", "cache"]

_CHECKED_VIEWS = 1000
_KEPT_FROM_VIEWS = 20 * _CHECKED_VIEWS
"""Least number of views to keep on disk: checking a smaller table would cost nearly as much as filling it."""
_LARGEST_FP32_BYTES = 2 * 1024**3
_ALLOWED = {"float16": 2.0**-9, "float32": 1e-4}
"""Largest accepted difference of a checked answer, relative to the largest answer."""
_SCHEME = 2
"""Part of the key: raise it whenever answers change."""


@dataclass(frozen=True)
class Demand:
    """How often, and for which tensors, a teacher will be called."""

    num_streams: int
    """Different orders of the images."""
    num_images: int
    """Number of views in all, over all streams and epochs."""
    shapes: Mapping[str, tuple[int, ...]]
    """Its answer for one view: name of the tensor -> shape."""
    deterministic: bool


@dataclass(frozen=True)
class CachePlan:
    """A table of the answers for all views: how large it is, and where it is kept."""

    num_views: int
    """Number of views of all images together."""
    dtype: torch.dtype
    num_bytes: int
    folder: Path | None
    """None where it is not worth keeping, or the teacher has no hash."""
    about: Mapping[str, str] = field(default_factory=dict)
    """The teacher and the data set, stated in the folder for the user who looks at it."""
    left_out: str | None = None
    """Tensors that are too large to be cached, and why; None where everything is cached."""

    @property
    def is_kept(self) -> bool:
        """Whether it is on disk."""
        return self.folder is not None and (self.folder / "facts.json").is_file()


def plan_cache(
    store: ImageStore, demand: Demand, dataset: Dataset, *, teacher_sha256: str, precision: str, teacher: str = ""
) -> CachePlan | None:
    """The table that a cache would need; None where the views are too many to count.

    Args:
        store: the training images.
        demand: what the teacher will be called for.
        dataset: the data set of the images.
        teacher_sha256: sha256 of the teacher's weights; empty for a module without a file.
        precision: the precision of the teacher.
        teacher: its model's name.
    """
    if store.num_views is None:
        return None
    num_views = store.num_images * store.num_views
    numbers = num_views * sum(math.prod(shape) for shape in demand.shapes.values())
    exact = demand.deterministic or numbers * 4 <= _LARGEST_FP32_BYTES
    dtype = torch.float32 if exact else torch.float16
    folder = None
    if teacher_sha256 and num_views >= _KEPT_FROM_VIEWS:
        facts = [_SCHEME, teacher_sha256, dataset.sha256, dataset.preprocessing.as_json(), store.fingerprint]
        facts += [str(dtype), precision, REGIONS in demand.shapes]
        if more := sorted(demand.shapes.keys() - {LOGITS, REGIONS}):  # as before there were others
            facts.append(more)
        key = hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:32]
        folder = files.cache_folder() / "answers" / key
    about = {"teacher": teacher, "teacher_sha256": teacher_sha256, "dataset": dataset.name, "precision": precision}
    left_out = _left_out(demand.shapes)
    return CachePlan(num_views, dtype, numbers * dtype.itemsize, folder, about, left_out)


def _left_out(shapes: Mapping[str, tuple[int, ...]]) -> str | None:
    """Why a cache can't hold all that is asked of the teacher."""
    maps = [
        f"`{name}` ({' x '.join(map(str, shape))}, {4 * math.prod(shape) / 1024:,.0f} KiB a view)"
        for name, shape in shapes.items()
        if name not in SMALL_READS
    ]
    if not maps:
        return None
    return f"the teacher cache keeps {', '.join(sorted(SMALL_READS))}; the method also reads {', '.join(maps)}"


def choose_mode(wanted: str, table: CachePlan | None, demand: Demand, device: torch.device) -> Mode:
    """`auto` is the cache where that is less work and there is room, else `ahead` on CUDA and `inline` on a CPU.

    Raises:
        UsageError: `cache` is wanted, but the views can't be counted, a method reads what is not cached, or there
            is no room.
    """
    if wanted == "inline":
        return "inline"
    if wanted == "ahead":
        return "ahead"
    if wanted == "cache":
        if table is None:
            raise UsageError(
                "`--teacher-mode cache` needs views that can be counted: not crops of changing size or RandAugment",
                hint="use `--teacher-mode inline` or `ahead`",
            )
        if table.left_out is not None:
            raise UsageError(
                f"`--teacher-mode cache` can't be used: {table.left_out}", hint="use `--teacher-mode inline` or `ahead`"
            )
        if not _has_room(table, device):
            raise UsageError(
                f"`--teacher-mode cache` needs {table.num_bytes / 1e9:.1f} GB for {table.num_views:,} views, and there "
                "is not so much room",
                hint="use `--teacher-mode inline` or `ahead`, or make room in memory and in the state folder",
            )
        return "cache"
    if table is not None and table.left_out is None and cache_pays(table, demand, device) and _has_room(table, device):
        return "cache"
    return "ahead" if device.type == "cuda" else "inline"


def cache_pays(table: CachePlan, demand: Demand, device: torch.device) -> bool:
    """Whether filling the table once is less work than to answer every batch."""
    # A look-up is not free, and on CUDA the teacher runs beside the students.
    share = 0.4 if device.type == "cuda" else 0.8
    # Whether it was filled before must not matter: the answers round differently, and a command would give other bytes.
    return table.num_views <= share * demand.num_images


def make_teacher(
    mode: Mode,
    inline: InlineTeacher,
    store: ImageStore,
    table: CachePlan | None,
    *,
    begin: Callable[[str, int], None],
    advance: Callable[[int], None],
    message: Callable[[str], None],
) -> Teacher:
    """The teacher of a mode, with its table filled.

    Args:
        mode: from `choose_mode`.
        inline: runs the network.
        store: the training images.
        table: from `plan_cache`.
        begin: called with what begins, and its number of views.
        advance: receives how many more are done.
        message: receives what the user should read.

    Raises:
        ArtifactError: the table can't be written.
    """
    if mode == "inline" or (mode == "cache" and table is None):
        return inline
    if mode == "ahead" or table is None:
        return AheadTeacher(inline, store)
    if table.folder is None:
        begin("asking the teacher", table.num_views)
        return _filled(inline, store, table, advance, _in_memory)
    with files.waited_lock(table.folder.with_name(f".{table.folder.name}.lock")):
        if table.is_kept:
            try:
                _check_hashes(table, inline.reads)
                kept = _opened(table, store, inline.reads)
                _check_agrees(kept, inline, store, table)
            except (OSError, EOFError, ValueError) as error:
                message(f"warning: the teacher cache `{table.folder}` can't be used, it is filled again: {error}")
            else:
                return kept
        begin("filling the teacher cache", table.num_views)
        return _kept(inline, store, table, advance)


_Make = Callable[[str, tuple[int, ...], torch.dtype], Tensor]


def _in_memory(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype)


def _filled(
    inline: InlineTeacher, store: ImageStore, table: CachePlan, advance: Callable[[int], None], make: _Make
) -> CachedTeacher:
    """Run the teacher once on every view."""
    tables: dict[str, Tensor] = {}
    for first in range(0, table.num_views, SUPER_BATCH):
        numbers = torch.arange(first, min(first + SUPER_BATCH, table.num_views))
        for name, tensor in inline.of_views(store, store.numbered(numbers)).items():
            if name not in tables:
                tables[name] = make(name, (table.num_views, *tensor.shape[1:]), table.dtype)
            tables[name][numbers] = tensor.to("cpu", table.dtype)
        advance(len(numbers))
    return _placed(store, tables)


def _placed(store: ImageStore, tables: Mapping[str, Tensor]) -> CachedTeacher:
    """The table on the device if there is room, else in the host's memory or in its files."""
    num_bytes = sum(table.numel() * table.element_size() for table in tables.values())
    if store.device.type == "cuda" and num_bytes <= torch.cuda.mem_get_info(store.device)[0] // 2:
        return CachedTeacher(store, {name: table.to(store.device) for name, table in tables.items()})
    return CachedTeacher(store, tables)


def _kept(inline: InlineTeacher, store: ImageStore, table: CachePlan, advance: Callable[[int], None]) -> CachedTeacher:
    """Fill a table on disk under a temporary name, then rename it."""
    assert table.folder is not None
    building = table.folder.with_name(f".{table.folder.name}.part")
    shutil.rmtree(building, ignore_errors=True)  # left by a run that was killed
    shutil.rmtree(table.folder, ignore_errors=True)
    files.make_folder(building)

    def mapped(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        path = building / _file_of(name)
        held = np.lib.format.open_memmap(path, mode="w+", dtype=_numpy_type(dtype), shape=shape)
        with path.open("r+b") as file:  # a full disk fails now, and not by a signal when a page is written
            os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
        return torch.from_numpy(held)

    try:
        _filled(inline, store, table, advance, mapped)
        hashes = {path.name: files.sha256_file(path) for path in sorted(building.iterdir())}
        facts = {"num_views": table.num_views, "dtype": str(table.dtype), "of": dict(table.about), "sha256": hashes}
        files.write_json(building / "facts.json", facts)
        building.rename(table.folder)
    except OSError as error:
        raise files.not_writable(table.folder, error) from error
    finally:
        shutil.rmtree(building, ignore_errors=True)
    try:
        return _opened(table, store, inline.reads)
    except (OSError, EOFError, ValueError) as error:
        raise ArtifactError(
            f"`{table.folder}` can't be read back: {error}", hint="check the disk, or use `--teacher-mode inline`"
        ) from error


def _check_hashes(table: CachePlan, reads: Collection[str]) -> None:
    """Check that the files of a table are those that were written.

    Raises:
        OSError, ValueError: one is missing, or has changed.
    """
    assert table.folder is not None
    stated = files.parse_json(files.read_regular(table.folder / "facts.json"))
    hashes = stated.get("sha256", {}) if isinstance(stated, dict) else None  # tables of earlier versions have none
    if not isinstance(hashes, dict):
        raise ValueError("its facts are broken")
    for name in map(_file_of, sorted(reads)):
        if hashes and hashes.get(name) != files.sha256_file(table.folder / name):
            raise ValueError(f"`{name}` was changed after it was written")


def _opened(table: CachePlan, store: ImageStore, reads: Collection[str]) -> CachedTeacher:
    """The table on disk, mapped.

    Raises:
        OSError, EOFError, ValueError: it is damaged, or not the one that was written.
    """
    assert table.folder is not None
    tables = {name: torch.from_numpy(_mapped(table.folder / _file_of(name))) for name in sorted(reads)}
    if not all(part.shape[0] == table.num_views and part.dtype == table.dtype for part in tables.values()):
        raise ValueError("it has another size")
    files.mark_used(table.folder / "facts.json")
    return _placed(store, tables)


def _file_of(name: str) -> str:
    """The file of a tensor's table. Regions have the name that they had when the first caches were written."""
    return "cells.npy" if name == REGIONS else f"{name}.npy"


def _mapped(path: Path) -> NDArray[Any]:
    """A `.npy` file, mapped copy-on-write and marked as in use as long as it is.

    Raises:
        OSError, ValueError: it is missing, or damaged.
    """
    with files.open_regular(path) as file:
        files.hold_mapped(file)
        if np.lib.format.read_magic(file) != (1, 0):
            raise ValueError("written by another program")
        shape, _, dtype = np.lib.format.read_array_header_1_0(file)
        return np.memmap(file, dtype=dtype, mode="c", offset=file.tell(), shape=shape)


def _check_agrees(kept: CachedTeacher, inline: InlineTeacher, store: ImageStore, table: CachePlan) -> None:
    """Check that some of the views, others each time, have the answers that the teacher gives now.

    Raises:
        ValueError: they have others.
    """
    generator = torch.Generator()
    generator.seed()
    numbers = torch.randint(table.num_views, (_CHECKED_VIEWS,), generator=generator)
    views = store.numbered(numbers).to(store.device)
    now, then = inline.of_views(store, views), kept.of_views(views)
    allowed = _ALLOWED[str(table.dtype).removeprefix("torch.")]
    if not all(bool((now[name] - then[name]).abs().max() <= allowed * now[name].abs().max()) for name in now):
        raise ValueError("the teacher computes other answers now")


def _numpy_type(dtype: torch.dtype) -> type[np.generic]:
    return np.float16 if dtype == torch.float16 else np.float32


def _has_room(table: CachePlan, device: torch.device) -> bool:
    """Whether there is room for it on disk, if it is kept there, and in memory, because it is read at random."""
    if table.folder is not None and not table.is_kept:
        home = next(folder for folder in (table.folder, *table.folder.parents) if folder.exists())
        if shutil.disk_usage(home).free < 1.1 * table.num_bytes:
            return False
    if device.type == "cuda" and table.num_bytes <= torch.cuda.mem_get_info(device)[0] // 2:
        return True
    return table.num_bytes <= _free_memory() // 2


def _free_memory() -> int:
    """Bytes of the host's memory that are free or can be freed."""
    try:
        for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except (OSError, ValueError):
        pass
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    except (ValueError, OSError, AttributeError):
        return 4 * 1024**3
