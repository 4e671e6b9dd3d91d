"""Weight files: what is written comes back, what is broken or hostile is refused before anything happens."""

from __future__ import annotations

import argparse
import io
import json
import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from icdctl import models
from icdctl.errors import ArtifactError
from icdctl.files import LARGEST_FOREIGN_BYTES

METADATA = {"num_classes": 10, "model": "res8", "preprocessing": {"mean": [0.5, 0.4, 0.3]}}


@pytest.fixture
def model() -> models.Classifier:
    torch.manual_seed(1)
    return models.create("res8", 10)


@pytest.fixture
def marker(tmp_path: Path) -> Path:
    """The file that hostile content would create."""
    return tmp_path / "executed"


class Hostile:
    """Runs a shell command wherever it is unpickled with the full pickle machinery."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, (f"touch {self.marker}",)


def assert_equal_states(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert list(found) == list(expected)
    for key, value in expected.items():
        assert torch.equal(found[key], value), key


def assert_refused(path: Path, *words: str, model: nn.Module | None = None) -> ArtifactError:
    """Loading fails with one message that names the path and holds the words, and leaves the model alone."""
    own = model or models.create("res8", 10)
    before = {key: value.clone() for key, value in own.state_dict().items()}
    with pytest.raises(ArtifactError) as caught:
        models.load_weights(own, path)
    assert str(path) in caught.value.message
    assert "\n" not in caught.value.message
    assert caught.value.hint
    for word in words:
        assert word in caught.value.message
    assert_equal_states(own.state_dict(), before)
    return caught.value


def test_weights_come_back_as_they_were_written(tmp_path: Path, model: models.Classifier) -> None:
    path = tmp_path / "new" / "student.safetensors"
    model(torch.randn(4, 3, 32, 32))
    sha256 = models.save_weights(path, model, METADATA)
    other = models.create("res8", 10)
    weights = models.load_weights(other, path)

    assert_equal_states(other.state_dict(), model.state_dict())
    assert weights.metadata == METADATA
    assert (weights.sha256, weights.format) == (sha256, "safetensors")
    assert int(other.state_dict()["bn1.num_batches_tracked"]) == 1
    assert weights.tensors["bn1.num_batches_tracked"].dtype == torch.int64


def test_equal_content_gives_equal_bytes(tmp_path: Path, model: models.Classifier) -> None:
    paths = [tmp_path / name for name in ("a.safetensors", "b.safetensors", "c.safetensors")]
    models.save_weights(paths[0], model, METADATA)
    models.save_weights(paths[1], model.state_dict(), dict(reversed(METADATA.items())))
    models.save_weights(paths[2], model.to(memory_format=torch.channels_last), METADATA)
    contents = {path.read_bytes() for path in paths}

    assert len(contents) == 1
    content = contents.pop()
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    assert header["__metadata__"] == {"icdctl": json.dumps(METADATA, sort_keys=True)}


def test_tensors_that_share_memory_and_doubles_are_written_as_float32(tmp_path: Path) -> None:
    shared = torch.arange(6, dtype=torch.float64).reshape(2, 3)
    models.save_weights(tmp_path / "w", {"a": shared, "b": shared.t(), "c": shared[:1]}, {})
    tensors = models.read_weights(tmp_path / "w").tensors
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
    assert torch.equal(tensors["b"], shared.t().float())


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("kind", ["bare", "crd", "crd_last", "old_numpy", "mdistiller", "data_parallel", "distiller"])
def test_checkpoints_of_other_programs_are_read(
    tmp_path: Path, model: models.Classifier, kind: str, zipped: bool
) -> None:
    state = model.state_dict()
    teacher = models.create("res14", 10).state_dict()
    distiller = {f"module.student.{key}": value for key, value in state.items()}
    distiller |= {f"module.teacher.{key}": value for key, value in teacher.items()}
    distiller |= {"module.conv_reg.weight": torch.zeros(3)}
    checkpoint: dict[str, Any] = {
        "bare": state,
        "crd": {"epoch": 240, "model": state, "accuracy": torch.tensor([71.5]), "optimizer": {"state": {}}},
        "crd_last": {"opt": argparse.Namespace(lr=0.05, model="resnet8"), "model": state},
        "old_numpy": {"model": state, "best_acc": np.float64(71.5)},
        "mdistiller": {"model": state},
        "data_parallel": {f"module.{key}": value for key, value in state.items()},
        "distiller": {"model": distiller, "optimizer": {}, "epoch": 12, "best_acc": torch.tensor([1.0])},
    }[kind]
    path = tmp_path / "ckpt.bin"
    torch.save(checkpoint, path, _use_new_zipfile_serialization=zipped)
    other = models.create("res8", 10)
    weights = models.load_weights(other, path)

    assert_equal_states(other.state_dict(), state)
    assert (weights.format, weights.metadata) == ("pickle", {})


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions_are_cast_to_the_models(tmp_path: Path, model: models.Classifier, dtype: torch.dtype) -> None:
    state = {key: value.to(dtype) if value.is_floating_point() else value for key, value in model.state_dict().items()}
    safetensors.torch.save_file(state, tmp_path / "half.safetensors")
    other = models.create("res8", 10)
    models.load_weights(other, tmp_path / "half.safetensors")
    assert other.head.weight.dtype == torch.float32
    torch.testing.assert_close(other.head.weight, model.head.weight, rtol=1e-2, atol=1e-3)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    assert_refused(tmp_path / "no.pth", "does not exist")


def test_a_folder_is_no_weight_file(tmp_path: Path) -> None:
    assert_refused(tmp_path, "is a folder")


@pytest.mark.parametrize(
    ("content", "word"),
    [
        (b"", "is empty"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 7\n", "git-lfs pointer"),
        (b"\n <!DOCTYPE html><html><body>Sign in</body></html>", "web page"),
        (b"<html>404</html>", "web page"),
        (b"e", "neither a safetensors file nor"),
        (b"epoch,loss\n1,2\n", "neither a safetensors file nor"),
        (b"PK\x03\x04" + bytes(100), "cut short"),
        (b"\x80", "cut short"),
        (b'\x10\x00\x00\x00\x00\x00\x00\x00{"a":', "not a complete safetensors file"),
        (b'\xff\xff\xff\xff\xff\xff\xff\x7f{"a":{}}', "not a complete safetensors file"),
    ],
)
def test_what_is_no_weight_file_is_said(tmp_path: Path, content: bytes, word: str) -> None:
    path = tmp_path / "w.pth"
    path.write_bytes(content)
    assert_refused(path, word)


@pytest.mark.parametrize("part", [0.3, 0.99])
@pytest.mark.parametrize("form", ["zip", "legacy", "safetensors"])
def test_a_file_that_is_cut_short_is_refused(tmp_path: Path, model: models.Classifier, form: str, part: float) -> None:
    path = tmp_path / "w"
    if form == "safetensors":
        models.save_weights(path, model, {})
    else:
        torch.save(model.state_dict(), path, _use_new_zipfile_serialization=form == "zip")
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * part)])
    assert_refused(path, "safetensors" if form == "safetensors" else "cut short")


def test_bytes_after_the_end_of_safetensors_are_refused(tmp_path: Path, model: models.Classifier) -> None:
    path = tmp_path / "w"
    models.save_weights(path, model, {})
    path.write_bytes(path.read_bytes() + b"x")
    assert_refused(path, "not a complete safetensors file")


@pytest.mark.parametrize("form", ["zip", "legacy", "raw2", "raw3", "raw4", "raw5", "nested"])
def test_hostile_pickles_are_refused_and_never_run(tmp_path: Path, marker: Path, form: str) -> None:
    path = tmp_path / "w.pth"
    hostile: Any = Hostile(marker)
    if form == "nested":
        hostile = {"model": {"a": torch.zeros(2)}, "opt": argparse.Namespace(lr=hostile)}
    if form.startswith("raw"):
        path.write_bytes(pickle.dumps(hostile, protocol=int(form[3:])))
    else:
        torch.save(hostile, path, _use_new_zipfile_serialization=form != "legacy")
    # The restricted reader stops at the first opcode of protocol 4, before it sees the name.
    assert_refused(path, "is refused: it ", "plain tensors" if form in ("raw4", "raw5") else "asks for `posix.system`")
    assert not marker.exists()


def test_the_hostile_pickle_would_run_elsewhere(marker: Path) -> None:
    """The control: without it the test above could pass for the wrong reason."""
    pickle.loads(pickle.dumps(Hostile(marker)))
    assert marker.exists()


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_a_whole_pickled_module_is_refused(tmp_path: Path, model: models.Classifier, zipped: bool) -> None:
    path = tmp_path / "w.pth"
    torch.save(model, path, _use_new_zipfile_serialization=zipped)
    error = assert_refused(path, "is refused: it asks for `icdctl.models.resnet.ResNet`")
    assert "model.state_dict()" in error.hint


@pytest.mark.parametrize(
    ("content", "word"),
    [
        (torch.zeros(3), "no weights, only a Tensor"),
        ([torch.zeros(3)], "no weights, only a list"),
        ({}, "no weights, only a dict"),
        ({"epoch": 3, "w": torch.zeros(3)}, "`epoch` is a int, not a tensor"),
        ({3: torch.zeros(3)}, "not a state_dict: `3`"),
        ({"a\n\x1b[2J": 1}, "`a\\n\\x1b[2J` is a int"),
        ({"w": torch.zeros(3).to_sparse()}, "_rebuild_sparse_tensor`, which is more than plain tensors"),
        ({"w": torch.zeros(3, device="meta")}, "_rebuild_meta_tensor_no_storage`, which is more than plain tensors"),
    ],
    ids=["tensor", "list", "empty", "number", "key", "control", "sparse", "meta"],
)
def test_what_is_no_state_dict_is_refused(tmp_path: Path, content: Any, word: str) -> None:
    path = tmp_path / "w.pth"
    torch.save(content, path)
    assert_refused(path, word)


def repacked(path: Path, compression: int, extra: bytes = b"") -> None:
    """Write a zip checkpoint anew, entry by entry."""
    content = io.BytesIO(path.read_bytes())
    with zipfile.ZipFile(content) as old, zipfile.ZipFile(path, "w", compression) as new:
        for entry in old.infolist():
            new.writestr(entry.filename, old.read(entry) + extra)


def test_compressed_checkpoints_are_refused_before_they_are_unpacked(tmp_path: Path) -> None:
    path = tmp_path / "w.pth"
    torch.save({"w": torch.zeros(1000)}, path)
    repacked(path, zipfile.ZIP_DEFLATED, bytes(10_000_000))
    assert path.stat().st_size < 1_000_000
    assert_refused(path, "is refused: its entries are compressed")


def test_entries_that_claim_more_than_the_file_has_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "w.pth"
    torch.save({"w": torch.zeros(1000)}, path)
    content = bytearray(path.read_bytes())
    directory = content.rfind(b"PK\x01\x02")
    content[directory + 24 : directory + 28] = (1 << 30).to_bytes(4, "little")
    path.write_bytes(content)
    assert_refused(path, "claim more bytes than the file has")


def test_a_view_larger_than_its_memory_is_refused_without_a_copy(tmp_path: Path) -> None:
    path = tmp_path / "w.pth"
    torch.save({"w": torch.zeros(1).expand(10**6, 10**6)}, path)
    assert path.stat().st_size < 5000
    assert_refused(path, "`w` claims 4000000000000 bytes")


def test_a_file_above_the_limit_is_refused_unread(tmp_path: Path) -> None:
    path = tmp_path / "w.pth"
    with path.open("wb") as file:
        file.truncate(LARGEST_FOREIGN_BYTES + 1)
    assert_refused(path, "larger than 2 GiB")


@pytest.mark.parametrize("text", ["{", "[1]"])
def test_metadata_that_is_no_json_object_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "w.safetensors"
    safetensors.torch.save_file({"w": torch.zeros(1)}, path, {"icdctl": text})
    assert_refused(path, "metadata `icdctl`")


def test_foreign_metadata_is_ignored(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    safetensors.torch.save_file({"w": torch.zeros(1)}, path, {"format": "pt"})
    assert models.read_weights(path).metadata == {}


def test_weights_for_other_classes_name_the_data_set(tmp_path: Path) -> None:
    path = tmp_path / "best.safetensors"
    models.save_weights(path, models.create("mv2", 200), {})
    error = assert_refused(path, model=models.create("mv2", 100))
    assert error.message == (
        f"weights in `{path}` do not fit `mv2`: `classifier.0.weight` is [200, 1280], expected [100, 1280] (and 1 more)"
    )
    assert error.hint == "they were trained on 200 classes; pass `--dataset cub200`"


def test_weights_of_the_large_image_variant_do_not_fit_the_small_one(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    models.save_weights(path, models.create("res8", 10, dataset="cub200"), {})
    error = assert_refused(path, "`conv1.weight` is [16, 3, 7, 7], expected [16, 3, 3, 3]")
    assert "`--dataset`" in error.hint


def test_weights_of_another_model_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    models.save_weights(path, models.create("vgg8", 10), {})
    error = assert_refused(path, "do not fit `res8`: `conv1.weight` is missing (and ")
    assert "`--student` or `--teacher`" in error.hint


def test_an_extra_entry_is_refused(tmp_path: Path, model: models.Classifier) -> None:
    path = tmp_path / "w.safetensors"
    models.save_weights(path, {**model.state_dict(), "extra": torch.zeros(1)}, {})
    assert_refused(path, "`extra` is not part of the model")


def test_another_kind_of_number_is_refused(tmp_path: Path, model: models.Classifier) -> None:
    path = tmp_path / "w.safetensors"
    models.save_weights(path, {**model.state_dict(), "bn1.bias": torch.zeros(16, dtype=torch.int64)}, {})
    assert_refused(path, "`bn1.bias` is int64, expected float32")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e300])
def test_numbers_that_are_not_finite_are_refused(tmp_path: Path, model: models.Classifier, value: float) -> None:
    path = tmp_path / "w.pth"
    state = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    state["fc.bias"] = state["fc.bias"].double()
    state["fc.bias"][3] = value
    torch.save(state, path)
    assert_refused(path, "are not finite: `fc.bias` holds NaN or infinity")


def test_a_module_without_a_name_is_called_by_its_class(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    models.save_weights(path, nn.Linear(3, 2), {})
    other = nn.Linear(3, 4)
    with pytest.raises(ArtifactError, match="do not fit `Linear`"):
        models.load_weights(other, path)
    models.load_weights(nn.Linear(3, 2), path)
