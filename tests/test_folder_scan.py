"""Folders of images: every file is read, or counted with its reason; layouts and names as other systems write them."""

from __future__ import annotations

import json
import os
import struct
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from conftest import CommandLine
from PIL import Image, TiffImagePlugin
from test_imagefolder import CLASSES, fill, flat, in_parts, load, picture

import icdctl as library
from icdctl import models
from icdctl.data import image_formats
from icdctl.data.decode import BrokenImageError, decode_image
from icdctl.data.folder_layout import class_names, divide, is_printable
from icdctl.data.folder_scan import LeftOut, images_below
from icdctl.data.image_cache import decode_files
from icdctl.errors import ArtifactError
from icdctl.registry import trained

HEIC = b"\0\0\0\x18ftypheic" + bytes(200)


def divided(folder: Path) -> Any:
    return divide(folder, test_split=0.2, val_split=0, seed=0)


def left_out_of(folder: Path) -> str:
    return str(divided(folder).left_out)


# --- every file is accounted for --------------------------------------------------------------------------------------


def a_text(cat: Path) -> None:
    (cat / "notes.txt").write_text("no image")


def a_heic(cat: Path) -> None:
    (cat / "IMG_1.HEIC").write_bytes(HEIC)


def a_raw_photo(cat: Path) -> None:
    (cat / "a.CR2").write_bytes(b"raw")


def no_suffix(cat: Path) -> None:
    (cat / "image").write_bytes(b"?")


def a_date_for_a_suffix(cat: Path) -> None:
    (cat / "taken at 12.30 in the garden").write_bytes(b"?")


def hidden_files(cat: Path) -> None:
    (cat / "._0.png").write_bytes(b"?")
    (cat / ".ipynb_checkpoints").mkdir()
    (cat / ".ipynb_checkpoints" / "0.png").write_bytes(b"?")


def thumbnails(cat: Path) -> None:
    fill(cat / "@eaDir" / "0.png", 2)
    (cat / "Thumbs.db").write_bytes(b"?")


def a_link_to_nowhere(cat: Path) -> None:
    (cat / "more").symlink_to("/nonexistent/more")


def a_link_in_a_circle(cat: Path) -> None:
    (cat / "again").symlink_to(cat)


def an_image_of_no_class(cat: Path) -> None:
    picture(1).save(cat.parent / "loose.png")


def a_text_beside_the_classes(cat: Path) -> None:
    (cat.parent / "classes.txt").write_text("cat")


def a_folder_of_no_part(cat: Path) -> None:
    fill(cat.parents[1] / "Extra" / "cat", 2)


def a_file_beside_the_parts(cat: Path) -> None:
    (cat.parents[1] / "LICENCE").write_text("mine")


def bytes_that_are_not_utf8(cat: Path) -> None:
    Path(os.fsdecode(os.fsencode(cat) + b"/\xff\n.txt")).write_text("?")


HOW_HEIC = r"`\.heic` \(`pip install pillow-heif` makes icdctl read them\), e\.g\. `train/cat/IMG_1\.HEIC`"
LEFT_OUT: list[tuple[Callable[[Path], None], str, bool]] = [
    (a_text, r"1 `\.txt`, e\.g\. `train/cat/notes\.txt`", False),
    (a_heic, f"1 {HOW_HEIC}", True),
    (a_raw_photo, r"1 `\.cr2` \(convert them to PNG or JPEG\), e\.g\. `train/cat/a\.CR2`", True),
    (no_suffix, r"1 without the suffix of an image, e\.g\. `train/cat/image`", False),
    (a_date_for_a_suffix, r"1 without the suffix of an image, e\.g\. `train/cat/taken at .*`", False),
    (hidden_files, r"2 hidden, e\.g\. `train/cat/\..*`", False),
    (thumbnails, r"2 of other programs \(`@eaDir/`\), .*, 1 of other programs, e\.g\. `train/cat/Thumbs\.db`", False),
    (a_link_to_nowhere, r"1 links whose target does not exist, e\.g\. `train/cat/more`", True),
    (a_link_in_a_circle, r"1 links to a folder that is read already, e\.g\. `train/cat/again`", False),
    (an_image_of_no_class, r"1 images in no class's folder, e\.g\. `train/loose\.png`", True),
    (a_text_beside_the_classes, r"1 `\.txt`, e\.g\. `train/classes\.txt`", False),
    (a_folder_of_no_part, r"2 below `Extra/`, which is no folder of a part, e\.g\. `Extra/cat/0\.png`", True),
    (a_file_beside_the_parts, r"1 without the suffix of an image, e\.g\. `LICENCE`", False),
    (bytes_that_are_not_utf8, r"1 `\.txt`, e\.g\. `train/cat/\\xff\\n\.txt`", False),
]


@pytest.mark.parametrize(("make", "expected", "is_warning"), LEFT_OUT, ids=lambda value: getattr(value, "__name__", ""))
def test_a_file_that_is_not_read_is_counted_and_the_reason_said(
    tmp_path: Path, make: Callable[[Path], None], expected: str, is_warning: bool
) -> None:
    if make is a_heic and image_formats.HAS_HEIC:
        pytest.skip("HEIC is read here")
    in_parts(tmp_path, "train", "val")
    assert divided(tmp_path).left_out.as_note() is None
    make(tmp_path / "train" / "cat")
    found = divided(tmp_path)
    assert (len(found.train.names), len(found.test.names)) == (18, 9)
    note = found.left_out.as_note()
    assert note.startswith("warning: files that are not read: " if is_warning else "files that are not read: ")
    with pytest.raises(AssertionError, match=f"^{expected}"):
        raise AssertionError(str(found.left_out))


def test_a_folder_without_parts_is_accounted_for_too(tmp_path: Path) -> None:
    flat(tmp_path)
    picture(1).save(tmp_path / "loose.png")
    (tmp_path / "labels.csv").write_text("?")
    fill(tmp_path / "@eaDir", 2)
    fill(tmp_path / "unlabeled", 1)
    (tmp_path / "unlabeled" / "a.txt").write_text("?")
    assert class_names(tmp_path) == CLASSES
    found = left_out_of(tmp_path)
    for part in ("1 images in no class's folder", "1 `.csv`", "2 of other programs (`@eaDir/`)", "1 `.txt`"):
        assert part in found


def test_a_hidden_link_is_not_followed(tmp_path: Path) -> None:
    flat(tmp_path / "pets")
    fill(tmp_path / "elsewhere", 3)
    (tmp_path / "pets" / "cat" / ".cache").symlink_to(tmp_path / "elsewhere")
    assert left_out_of(tmp_path / "pets") == "1 hidden, e.g. `cat/.cache`"


def test_training_and_validate_say_what_is_not_read(icdctl: CommandLine, tmp_path: Path) -> None:
    folder = in_parts(tmp_path / "pets", "train", "val")
    (folder / "train" / "cat" / "a.psd").write_bytes(b"?")
    line = "files that are not read: 1 `.psd` (convert them to PNG or JPEG), e.g. `train/cat/a.psd`"
    assert f"warning: {line}" in load(folder).notes
    code, out, err = icdctl("validate", f"imagefolder:{folder}", "--json")
    assert (code, err) == (0, "")
    checks = {check["what"]: check for check in json.loads(out)["checks"]}
    assert checks["not read"]["found"] == line.partition(": ")[2]
    assert checks["not read"]["sound"] is None
    (folder / "train" / "cat" / "a.psd").unlink()
    checks = {
        check["what"]: check for check in json.loads(icdctl("validate", f"imagefolder:{folder}", "--json")[1])["checks"]
    }
    assert (checks["not read"]["found"], checks["not read"]["sound"]) == ("no file", True)


def test_predicting_a_folder_counts_too(tmp_path: Path) -> None:
    fill(tmp_path, 2)
    (tmp_path / "a.psd").write_bytes(b"?")
    left_out = LeftOut()
    assert len(list(images_below(tmp_path, left_out))) == 2
    assert left_out.as_note() == (
        "warning: files that are not read: 1 `.psd` (convert them to PNG or JPEG), e.g. `a.psd`"
    )


def test_predict_says_which_photos_of_a_folder_have_no_class(icdctl: CommandLine, tmp_path: Path) -> None:
    fill(tmp_path / "photos", 2)
    (tmp_path / "photos" / "a.txt").write_text("?")
    name = f"imagefolder:{flat(tmp_path / 'pets')}"
    library.train(model="res8", dataset=name, out=str(tmp_path / "run"), max_steps=1)
    assert icdctl("predict", tmp_path / "run", tmp_path / "photos")[2] == ""
    (tmp_path / "photos" / "a.psd").write_bytes(b"?")
    code, out, err = icdctl("predict", tmp_path / "run", tmp_path / "photos", "--json")
    assert (code, len(json.loads(out)["predictions"])) == (0, 2)
    assert err.startswith("warning: files that are not read: 1 `.psd` (convert them to PNG or JPEG)")


def test_a_class_of_unreadable_files_alone_says_what_they_are(tmp_path: Path) -> None:
    flat(tmp_path)
    (tmp_path / "emu").mkdir()
    (tmp_path / "emu" / "a.nef").write_bytes(b"?")
    with pytest.raises(ArtifactError, match=r"no training images: `emu`; files that are not read: 1 `\.nef`"):
        load(tmp_path)


# --- formats ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".jfif", ".JFIF", ".jpe", ".jif"])
def test_a_jpeg_is_one_by_any_suffix_of_its(tmp_path: Path, suffix: str) -> None:
    flat(tmp_path)
    picture(5).save(tmp_path / "cat" / f"x{suffix}", format="JPEG")
    assert sum(len(part.names) for part in (divided(tmp_path).train, divided(tmp_path).test)) == 19
    decode_image(tmp_path / "cat" / f"x{suffix}", resize=(8, 8), crop=None)


@pytest.mark.skipif(not image_formats.HAS_AVIF, reason="this Pillow has no AVIF")
def test_avif_is_read(tmp_path: Path) -> None:
    picture(5).save(tmp_path / "a.avif", quality=95)
    picture(5).save(tmp_path / "a.png")
    found, expected = (
        decode_image(tmp_path / name, resize=(30, 40), crop=None).astype(int) for name in ("a.avif", "a.png")
    )
    assert np.abs(found - expected).mean() < 4
    assert [path.name for path in images_below(tmp_path)] == ["a.avif", "a.png"] or len(
        list(images_below(tmp_path))
    ) == 2


@pytest.mark.skipif(not image_formats.HAS_HEIC, reason="pillow-heif is not installed")
def test_heic_is_read_where_there_is_a_decoder(tmp_path: Path) -> None:
    image_formats.readable_formats()
    picture(5).save(tmp_path / "a.heic", format="HEIF", quality=95)
    picture(5).save(tmp_path / "a.png")
    found, expected = (
        decode_image(tmp_path / name, resize=(30, 40), crop=None).astype(int) for name in ("a.heic", "a.png")
    )
    assert np.abs(found - expected).mean() < 8


STAND_INS = {
    "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n": "git-lfs pointer.*`git lfs pull`",
    "/annex/objects/SHA256E-s1--00.png\n": "git-annex pointer.*`git annex get`",
}


@pytest.mark.parametrize("content", STAND_INS)
def test_a_pointer_is_called_one(tmp_path: Path, content: str) -> None:
    (tmp_path / "a.png").write_text(content)
    with pytest.raises(BrokenImageError, match=STAND_INS[content]):
        decode_image(tmp_path / "a.png", resize=(8, 8), crop=None)


@pytest.mark.skipif(image_formats.HAS_HEIC, reason="HEIC is read here")
def test_a_heic_photo_under_another_suffix_is_called_one(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(HEIC)
    with pytest.raises(BrokenImageError, match="a HEIC image: `pip install pillow-heif`"):
        decode_image(tmp_path / "a.jpg", resize=(8, 8), crop=None)


def tiff_of_12_bits(values: np.ndarray[Any, np.dtype[np.uint16]]) -> bytes:
    """A grey TIFF whose pixels take 12 bits each, two of them in three bytes."""
    height, width = values.shape
    flat = [int(value) for value in values.ravel()]
    packed = b"".join(
        bytes((first >> 4, (first & 15) << 4 | second >> 8, second & 255))
        for first, second in zip(flat[::2], flat[1::2], strict=True)
    )
    short, long = 3, 4
    tags = [
        *((256, short, width), (257, short, height), (258, short, 12), (259, short, 1), (262, short, 1)),
        *((273, long, 8), (277, short, 1), (278, short, height), (279, long, len(packed))),
    ]
    entries = b"".join(
        struct.pack("<HHI", tag, kind, 1) + struct.pack("<HH" if kind == short else "<I", *([value, 0][: 5 - kind]))
        for tag, kind, value in tags
    )
    return b"II*\0" + struct.pack("<I", 8 + len(packed)) + packed + struct.pack("<H", len(tags)) + entries + bytes(4)


def test_12_bits_of_a_tiff_reach_from_black_to_white(tmp_path: Path) -> None:
    values = np.arange(0, 4096, 64, dtype=np.uint16).reshape(8, 8)
    expected = np.repeat((values >> 4).astype(np.uint8)[:, :, None], 3, axis=2)
    (tmp_path / "packed.tif").write_bytes(tiff_of_12_bits(values))
    tags = TiffImagePlugin.ImageFileDirectory_v2()
    tags[281] = 4095
    Image.fromarray(values).save(tmp_path / "stated.tif", tiffinfo=tags)
    (tmp_path / "a.pgm").write_bytes(b"P5 8 8 4095\n" + values.astype(">u2").tobytes())
    for name in ("packed.tif", "stated.tif", "a.pgm"):
        found = decode_image(tmp_path / name, resize=(8, 8), crop=None)
        assert np.abs(found.astype(int) - expected).max() <= (1 if name == "a.pgm" else 0), name
    # A statement that the values contradict does not count.
    Image.fromarray(values * 16).save(tmp_path / "wrong.tif", tiffinfo=tags)
    assert np.array_equal(decode_image(tmp_path / "wrong.tif", resize=(8, 8), crop=None), expected)


def test_images_that_are_nearly_black_are_said(tmp_path: Path) -> None:
    in_parts(tmp_path, "train", "val")
    grey = np.random.RandomState(0).randint(0, 4096, (20, 20)).astype(np.uint16)
    Image.fromarray(grey).save(tmp_path / "train" / "cat" / "xray.png")
    (warning,) = load(tmp_path).warnings
    assert warning.startswith("1 image is nearly black, e.g. `train/cat/xray.png`: no value is above 15 of 255")
    Image.fromarray(grey * 16).save(tmp_path / "train" / "cat" / "xray.png")
    assert load(tmp_path).warnings == ()


# --- links ------------------------------------------------------------------------------------------------------------


def a_lost_target(path: Path) -> None:
    path.symlink_to("/nonexistent/gone.png")


def a_circle(path: Path) -> None:
    path.symlink_to(path)


def a_pipe(path: Path) -> None:
    os.mkfifo(path)


def a_pointer(path: Path) -> None:
    path.write_text(next(iter(STAND_INS)))


@pytest.mark.parametrize("make", [a_lost_target, a_circle, a_pipe, a_pointer])
def test_what_can_not_be_read_is_left_out_and_counted_where_that_is_asked(
    tmp_path: Path, make: Callable[[Path], None]
) -> None:
    in_parts(tmp_path, "train", "val")
    whole = load(tmp_path)
    make(tmp_path / "train" / "cat" / "lost.png")
    with pytest.raises(ArtifactError, match=r"1 of 19 images can't be decoded: `train/cat/lost\.png`: ") as caught:
        load(tmp_path)
    assert "--skip-broken" in caught.value.hint
    for _ in range(2):  # the second time from the cache
        found = load(tmp_path, skip_broken=True)
        assert found.skipped_images == 1
        assert "lost.png" in str(found.caveat)
        assert torch.equal(found.train_images, whole.train_images)


def test_a_link_whose_target_came_back_is_decoded(tmp_path: Path) -> None:
    in_parts(tmp_path / "pets", "train", "val")
    (tmp_path / "pets" / "train" / "cat" / "z.png").symlink_to(tmp_path / "disk.png")
    assert load(tmp_path / "pets", skip_broken=True).skipped_images == 1
    picture(77).save(tmp_path / "disk.png")
    found = load(tmp_path / "pets", skip_broken=True)
    assert (found.skipped_images, len(found.train_labels)) == (0, 19)


@pytest.mark.parametrize("place", ["train/owl", "test", "train"])
def test_a_folder_that_is_a_link_to_nowhere_is_not_a_class_less(tmp_path: Path, place: str) -> None:
    in_parts(tmp_path, *(part for part in ("train", "val") if part != place))
    (tmp_path / place).symlink_to("/nonexistent/photos")
    with pytest.raises(ArtifactError, match=f"`.*{place}` is a link whose target does not exist, so a folder"):
        load(tmp_path)


# --- names of folders -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["val", "Val", "VALID", "Validation", "dev", "Test", "testing", "eval", "EVALUATION"])
def test_the_folder_of_test_images_is_known_by_many_names(tmp_path: Path, name: str) -> None:
    in_parts(tmp_path, "train", name)
    found = divided(tmp_path)
    assert (len(found.train.names), len(found.test.names), found.own_test) == (18, 9, name)
    assert all(path.startswith(f"{name}/") for path in found.test.names)
    said = f"the test images are those of `{name}/`"
    assert (said in load(tmp_path).notes) == (name != "val")


def test_parts_in_capitals_are_parts(tmp_path: Path) -> None:
    in_parts(tmp_path, "Train", "Dev", "Test")
    found = divided(tmp_path)
    assert found.val is not None
    counts = [len(part.names) for part in (found.train, found.val, found.test)]
    assert counts == [9, 9, 9]
    assert {part.names[0].partition("/")[0] for part in (found.train, found.val, found.test)} == {
        "Train",
        "Dev",
        "Test",
    }
    assert "the validation images are those of `Dev/`" in load(tmp_path).notes


@pytest.mark.parametrize(
    ("first", "second"), [("val", "Val"), ("test", "eval"), ("train", "Training"), ("valid", "dev")]
)
def test_two_folders_for_one_part_are_one_too_many(tmp_path: Path, first: str, second: str) -> None:
    in_parts(tmp_path, *dict.fromkeys(("train", first, second)))
    with pytest.raises(ArtifactError, match="has both `"):
        divided(tmp_path)


def test_without_train_a_class_may_be_named_like_a_part(tmp_path: Path) -> None:
    flat(tmp_path)
    fill(tmp_path / "dev", 3)
    assert class_names(tmp_path) == ("bird", "cat", "dev", "dog")
    in_parts(tmp_path / "parts", "dev", "eval")
    with pytest.raises(ArtifactError, match="has a folder `dev` but no folder `train`"):
        class_names(tmp_path / "parts")


@pytest.mark.parametrize("name", ["test", "val"])
def test_images_that_are_in_no_class_are_not_called_none(tmp_path: Path, name: str) -> None:
    in_parts(tmp_path, "train")
    fill(tmp_path / name, 4)
    with pytest.raises(
        ArtifactError, match=f"`.*{name}` holds 4 images, but none of them is in the folder of a cl"
    ) as e:
        divided(tmp_path)
    assert f"`{name}/<class>/`" in e.value.hint


# --- names of classes -------------------------------------------------------------------------------------------------


Form = Literal["NFC", "NFD"]
FORMS: tuple[Form, ...] = ("NFC", "NFD")


@pytest.mark.parametrize(("in_train", "in_val"), [("NFC", "NFD"), ("NFD", "NFC"), ("NFD", "NFD")])
def test_a_name_is_the_same_however_its_letters_are_encoded(tmp_path: Path, in_train: Form, in_val: Form) -> None:
    names = ("zebra", "Äffchen", "évier", "한국")
    for part, form in (("train", in_train), ("val", in_val)):
        for place, name in enumerate(names):
            fill(tmp_path / part / unicodedata.normalize(form, name), 2, seed=place)
    assert class_names(tmp_path) == ("zebra", "Äffchen", "évier", "한국")
    found = divided(tmp_path)
    assert torch.bincount(found.test.labels).tolist() == [2, 2, 2, 2]


def test_weights_of_an_earlier_version_name_the_same_classes(tmp_path: Path) -> None:
    folder = flat(tmp_path / "pets")
    fill(folder / "évier", 3)
    held = load(folder)
    metadata = held.weights_metadata("res8")
    metadata["class_names"] = [unicodedata.normalize("NFD", name) for name in held.class_names]
    models.save_weights(tmp_path / "a.safetensors", models.create("res8", 4), metadata)
    assert trained.resolve(str(tmp_path / "a.safetensors")).class_names == held.class_names == (*CLASSES, "évier")


def test_one_name_encoded_in_two_ways_is_refused_within_a_folder(tmp_path: Path) -> None:
    flat(tmp_path)
    for form in FORMS:
        fill(tmp_path / unicodedata.normalize(form, "évier"), 2)
    with pytest.raises(ArtifactError, match=r"two folders named `évier`, .*'e\\u0301vier'"):
        class_names(tmp_path)


PRINTABLE = {
    "نی\u200cست": True,  # Persian, with a non-joiner
    "क्\u200dष": True,  # Hindi, after a virama
    "ണ്\u200d": True,  # Malayalam, at the end
    "👩\u200d🌾": True,
    "👩🏽\u200d🌾": True,  # after a modifier
    "cat\u200d": False,
    "\u200dcat": False,
    "क्\u200d\u200dष": False,
    "ca\u200bt": False,
    "ca\nt": False,
    "ca\u202et": False,
}


@pytest.mark.parametrize("name", PRINTABLE, ids=ascii)
def test_joiners_are_part_of_a_name_where_a_script_has_them(name: str) -> None:
    assert is_printable(name) == PRINTABLE[name]


# --- hashes of files --------------------------------------------------------------------------------------------------


def test_a_cache_of_an_earlier_version_is_read_and_gets_its_hashes(tmp_path: Path) -> None:
    fill(tmp_path, 3)
    names = [f"{index}.png" for index in range(3)]
    settings: dict[str, Any] = {"resize": (8, 8), "crop": None, "content_key": None, "label": "x", "skip_broken": False}
    first = decode_files(tmp_path, names, **settings)
    (facts,) = (Path(os.environ["ICDCTL_HOME"]) / "cache" / "images").glob("x-*.json")
    value = json.loads(facts.read_text())
    assert tuple(value.pop("files")) == first.file_hashes
    from icdctl.data.image_cache import _check

    facts.write_text(json.dumps({**value, "check": _check({}, value["sha256"], None)}))
    decoded: list[int] = []
    again = decode_files(tmp_path, names, **settings, on_images=lambda done, total: decoded.append(done))
    assert (again.file_hashes, decoded) == (first.file_hashes, [])
    assert json.loads(facts.read_text())["files"] == list(first.file_hashes or ())
    value["files"] = [*value.get("files", []), "0" * 32]
    facts.write_text(json.dumps(value))  # a hash that changed on disk
    decode_files(tmp_path, names, **settings, on_images=lambda done, total: decoded.append(done))
    assert decoded == [1, 2, 3]
