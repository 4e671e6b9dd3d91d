"""CIFAR-100 in its "python version", read from the archive's unpacked folder.

The files are pickles. The unpickler allows only the few names that such files need and refuses every other one, so
that a forged file can't run code.
"""

from __future__ import annotations

import hashlib
import io
import math
import pickle
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from icdctl import files
from icdctl.data.archive import Limits
from icdctl.data.assemble import fingerprint, of_halves
from icdctl.data.dataset import Dataset, DatasetInfo, OnImages, Preprocessing, Request
from icdctl.data.download import RemoteFile
from icdctl.data.release import Release
from icdctl.errors import ArtifactError
from icdctl.files import pickles

FOLDER = "cifar-100-python"
ARCHIVE = "cifar-100-python.tar.gz"
URL = "https://www.cs.toronto.edu/~kriz/cifar-100-python.tar.gz"
ARCHIVE_MD5 = "eb9058c3a382ffc7106e4002c42a8d85"
MEMBER_MD5 = {
    "train": "16019d7e3df5f24257cddd939b257f8d",
    "test": "f0ef6b0ae62326f3e7ffdfab6717acfc",
    "meta": "7973b15100ade9c7d40fb424638fde48",
}
RELEASE = Release(
    archive=RemoteFile(
        name=ARCHIVE,
        urls=(URL,),
        num_bytes=169_001_437,
        sha256="85cd44d02ba6437773c5bbd22e183051d648de2e7d6b014e1ef29b855ba677a7",
        md5=ARCHIVE_MD5,
    ),
    folder=FOLDER,
    member_md5=MEMBER_MD5,
    limits=Limits(members=16, unpacked_bytes=200_000_000),
)
MEAN = (0.5071, 0.4867, 0.4408)
STD = (0.2675, 0.2565, 0.2761)
SOURCE = "Krizhevsky 2009, https://www.cs.toronto.edu/~kriz/cifar.html"
LICENCE = "none stated by its authors; research use is customary"
SIDE = 32
_FINE_LABELS = """
apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus butterfly camel can
castle caterpillar cattle chair chimpanzee clock cloud cockroach couch crab crocodile cup dinosaur dolphin
elephant flatfish forest fox girl hamster house kangaroo keyboard lamp lawn_mower leopard lion lizard lobster
man maple_tree motorcycle mountain mouse mushroom oak_tree orange orchid otter palm_tree pear pickup_truck
pine_tree plain plate poppy porcupine possum rabbit raccoon ray road rocket rose sea seal shark shrew skunk
skyscraper snail snake spider squirrel streetcar sunflower sweet_pepper table tank telephone television tiger
tractor train trout tulip turtle wardrobe whale willow_tree wolf woman worm
"""
CLASS_NAMES = tuple(_FINE_LABELS.split())
"""The fine labels, in the order of the files."""
DESCRIPTION = DatasetInfo("cifar100", CLASS_NAMES, Preprocessing((SIDE, SIDE), MEAN, STD), SOURCE, LICENCE)


class _Array(pickles.StandIn):
    """Takes the place of a NumPy array: it has no bytes until the file gives all of them."""

    array: npt.NDArray[np.generic] | None = None

    def __setstate__(self, state: object) -> None:
        """Take over shape, type and bytes.

        Raises:
            pickle.UnpicklingError: they do not fit each other.
        """
        _, shape, dtype, in_columns, raw = state if isinstance(state, tuple) and len(state) == 5 else (None,) * 5
        if not (isinstance(shape, tuple) and isinstance(dtype, pickles.PlainDtype) and isinstance(raw, bytes)):
            raise pickle.UnpicklingError("an array in it is more than numbers")
        flat = np.frombuffer(raw, np.dtype(dtype.order + dtype.text))
        if any(not isinstance(side, int) or side < 0 for side in shape) or math.prod(shape) != len(flat):
            raise pickle.UnpicklingError("an array in it has another shape than its bytes")
        self.array = flat.reshape(shape, order="F" if in_columns else "C")


_STAND_INS = {
    ("numpy.core.multiarray", "_reconstruct"): _Array,
    ("numpy._core.multiarray", "_reconstruct"): _Array,  # the same function in files that numpy 2 wrote
    ("numpy", "ndarray"): _Array,
    ("numpy", "dtype"): pickles.PlainDtype,
    ("_codecs", "encode"): pickles.encode_latin,
}


def _stand_in(module_name: str, global_name: str) -> object:
    """What takes the place of a global: arrays, lists, dictionaries and bytes are allowed."""
    if (module_name, global_name) not in _STAND_INS:
        raise pickle.UnpicklingError(f"it asks for `{module_name}.{global_name}`")
    return _STAND_INS[module_name, global_name]


def load(wanted: Request, on_images: OnImages) -> Dataset:
    """Read the unpacked archive; the number of images is whatever the files hold.

    Raises:
        ArtifactError: a file is missing or broken.
    """
    folder = wanted.folder
    train_pixels, train_labels, train_published = read_split(folder, "train")
    test_pixels, test_labels, test_published = read_split(folder, "test")
    caveat = None
    if not (train_published and test_published):
        caveat = f"`{folder / FOLDER}` is not the published CIFAR-100 (other md5): results can't be compared"
    tensors = tuple(torch.from_numpy(array) for array in (train_pixels, train_labels, test_pixels, test_labels))
    return of_halves(DESCRIPTION, tensors, wanted, sha256=fingerprint(*tensors), caveat=caveat)


def how_to_get(folder: Path) -> str:
    """The hint for users who do not have the data yet."""
    return (
        f"`icdctl fetch-data cifar100` downloads {URL} (md5 {ARCHIVE_MD5}); if you have it elsewhere, pass the "
        f"folder that holds `{FOLDER}` (here `{folder}`) with `--data-dir`; `--dataset digits100` needs no download"
    )


def read_split(folder: Path, split: str) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64], bool]:
    """Images [N, 32, 32, 3] uint8, labels [N] int64, and whether the file is the published one, by its md5.

    Args:
        folder: the folder that holds `cifar-100-python`.
        split: "train" or "test".

    Raises:
        ArtifactError: the file is missing, is not such a pickle, or its arrays have other shapes.
    """
    content, published = _read_member(folder, split)
    pixels, labels = content.get(b"data"), content.get(b"fine_labels")
    if not isinstance(pixels, np.ndarray) or not isinstance(labels, list) or pixels.dtype != np.uint8:
        raise _not_cifar(folder / FOLDER / split, "it holds no `data` and `fine_labels`")
    if pixels.shape != (len(labels), 3 * SIDE * SIDE) or not labels:
        raise _not_cifar(folder / FOLDER / split, f"`data` is {list(pixels.shape)} for {len(labels)} labels")
    for row, label in enumerate(labels):
        if type(label) is not int:  # a number of another type may have lost its fraction, or be no number
            cause = f"label {row} is of type {type(label).__name__}, expected a whole number from 0 to 99"
            raise _not_cifar(folder / FOLDER / split, cause)
        if not 0 <= label < 100:
            raise _not_cifar(folder / FOLDER / split, "a label is not in 0 to 99")
    fine_labels = np.array(labels, dtype=np.int64)
    images = pixels.reshape(-1, 3, SIDE, SIDE).transpose(0, 2, 3, 1)
    return np.ascontiguousarray(images), fine_labels, published


def _read_member(folder: Path, member: str) -> tuple[Mapping[bytes, object], bool]:
    """The dictionary in a file, and whether the file is the published one."""
    path = folder / FOLDER / member
    try:
        raw = files.read_regular(path, most_bytes=files.LARGEST_FOREIGN_BYTES)
    except FileNotFoundError as error:
        raise ArtifactError(f"CIFAR-100 is missing: `{path}` does not exist", hint=how_to_get(folder)) from error
    except OSError as error:
        raise ArtifactError(f"`{path}` can't be read: {error.strerror}", hint=how_to_get(folder)) from error
    try:
        content = pickles.unpickle(io.BytesIO(raw), _stand_in, encoding="bytes")
    except Exception as error:  # a broken pickle can raise almost any exception
        raise _not_cifar(path, str(error) or type(error).__name__) from error
    if not isinstance(content, dict):
        raise _not_cifar(path, f"it holds a {type(content).__name__}, expected a dictionary")
    content = {key: value.array if isinstance(value, _Array) else value for key, value in content.items()}
    return content, hashlib.md5(raw, usedforsecurity=False).hexdigest() == MEMBER_MD5[member]


def _not_cifar(path: Path, cause: str) -> ArtifactError:
    return ArtifactError(
        f"`{path}` is not a file of CIFAR-100's python version: {cause}",
        hint=f"delete it; `icdctl fetch-data cifar100` then downloads it again from {URL} (md5 {ARCHIVE_MD5})",
    )
