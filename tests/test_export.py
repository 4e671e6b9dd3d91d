"""The graph computes what the weights compute, the folder says so, and everything else is refused.

No mocks of the exporter or the runtime: the mutation tests hand a damaged graph to a real verification.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import golden_support as golden
import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import numpy_helper
from PIL import Image
from torch import Tensor, nn

from icdctl import data, models
from icdctl.config.dataset_request import dataset_request
from icdctl.data import DatasetInfo, Preprocessing
from icdctl.errors import ArtifactError, UsageError
from icdctl.exporting import (
    Export,
    InputKind,
    OnnxClassifier,
    export_onnx,
    graph,
    manifest,
    read_onnx,
    verify_file,
    verify_folder,
)
from icdctl.registry import trained
from icdctl.registry.trained import TrainedModel

ROOT = Path(__file__).resolve().parent.parent
CLASS_NAMES = ("apple", "aquarium fish", 'a "quoted" one', "Bär", "bed", "bee", "6", "7", "8", "nine")
PREPROCESSING = data.describe(dataset_request("cifar100")).preprocessing
FAST = ["wrn16_1", "vgg8", "mv2", "shuv1", "shuv2"]
EVERY_FILE = {"README.md", "manifest.json", "model.json", "model.onnx", "verify.json"}

Mutation = Callable[[Any], None]


def make_target(
    folder: Path, name: str, *, dataset: str = "cifar100", preprocessing: Preprocessing = PREPROCESSING, seed: int = 3
) -> TrainedModel:
    """A weights file whose batch norms are far from the identity, so that an error in folding them shows."""
    model = models.create(name, len(CLASS_NAMES), dataset=dataset)
    golden.fill(model, fill_seed=seed, gain=1.4)
    path = folder / f"{name}-{seed}.safetensors"
    known = DatasetInfo(dataset, CLASS_NAMES, preprocessing, source="", licence="")
    models.save_weights(path, model, known.weights_metadata(name))
    return trained.resolve(str(path))


def random_images(count: int, size: tuple[int, int] = (32, 32)) -> Tensor:
    generator = torch.Generator().manual_seed(7)
    return torch.randint(0, 256, (count, *size, 3), dtype=torch.uint8, generator=generator)


def torch_logits(trained_model: TrainedModel, images: Tensor) -> Tensor:
    with torch.no_grad():
        logits: Tensor = trained_model.load()(trained_model.preprocessing.normalise(images))
    return logits


@pytest.fixture(scope="module")
def trained_model(tmp_path_factory: pytest.TempPathFactory) -> TrainedModel:
    return make_target(tmp_path_factory.mktemp("weights"), "res8")


@pytest.fixture(scope="module")
def exported(trained_model: TrainedModel, tmp_path_factory: pytest.TempPathFactory) -> Export:
    """One real export that many tests read; none writes to it."""
    out = tmp_path_factory.mktemp("exports") / "res8"
    images = random_images(20)
    labels = torch_logits(trained_model, images).argmax(dim=1)
    labels[:5] = (labels[:5] + 1) % len(CLASS_NAMES)
    facts = {
        "teacher": "res32x4",
        "metrics": {"final_top1": 70.5},
        "weights": Path("/home/somebody/runs/student.safetensors"),
        "variant": {"gamma": 8},
    }
    return export_onnx(trained_model, out, images=images, labels=labels, facts=facts)


def test_the_file_asks_for_no_newer_runtime_than_its_opset(exported: Export) -> None:
    proto = onnx.load(exported.model_file)
    assert (proto.opset_import[0].version, proto.ir_version) == (18, 8), "ONNX Runtime 1.14 knows opset 18 and IR 8"


@pytest.fixture
def copied(exported: Export, tmp_path: Path) -> Path:
    """The same folder, to be tampered with."""
    return Path(shutil.copytree(exported.folder, tmp_path / "copy"))


@pytest.fixture
def ready_graph(exported: Export, monkeypatch: pytest.MonkeyPatch) -> bytes:
    """Exports of res8 take the graph that was made once."""
    content = exported.model_file.read_bytes()
    monkeypatch.setattr(graph, "graph_bytes", lambda *_, **__: content)
    return content


# What is exported


def check_export(trained_model: TrainedModel, out: Path, **options: Any) -> None:
    done = export_onnx(trained_model, out, **options)
    assert done.report.passed
    statuses = {check.name: check.status for check in done.report.checks}
    assert statuses == {
        "format": "pass",
        "self_contained": "pass",
        "declared": "pass",
        "values": "pass",
        "batches": "pass",
        "agreement": "skipped",
        "finite": "pass",
    }
    assert {path.name for path in out.iterdir()} == EVERY_FILE
    size = trained_model.preprocessing.size
    classifier = OnnxClassifier(done.model_file)
    images = random_images(7, size)
    expected = torch_logits(trained_model, images)
    for rows in (1, 7):
        difference = (classifier.logits(images[:rows]) - expected[:rows]).abs().max()
        assert difference <= 2 * (done.report.tolerance or 0)
    operators = {node.op_type for node in onnx.load(done.model_file).graph.node}
    assert not operators & {"Shape", "Range", "Gather", "ScatterND"}, "index arithmetic in the graph"
    if not trained_model.model.startswith("wrn"):  # normalises before its convolutions
        assert "BatchNormalization" not in operators


@pytest.mark.parametrize("name", FAST)
def test_an_export_of_every_family_is_verified_and_silent(
    name: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    check_export(make_target(tmp_path, name), tmp_path / "out")

    assert capfd.readouterr() == ("", "")


@pytest.mark.slow
@pytest.mark.parametrize("input_kind", ["uint8", "float"])
@pytest.mark.parametrize("name", models.MODELS)
def test_every_model_is_verified(name: str, input_kind: InputKind, tmp_path: Path) -> None:
    check_export(make_target(tmp_path, name), tmp_path / "out", input_kind=input_kind)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["res8x4", "vgg8", "mv2", "shuv1"])
def test_the_variants_for_large_images_are_verified(name: str, tmp_path: Path) -> None:
    large = Preprocessing((224, 224), (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    check_export(make_target(tmp_path, name, dataset="cub200", preprocessing=large), tmp_path / "out")


@pytest.mark.slow
@pytest.mark.parametrize("opset", graph.OPSETS)
def test_every_opset_is_verified(opset: int, trained_model: TrainedModel, tmp_path: Path) -> None:
    check_export(trained_model, tmp_path / "out", opset=opset)
    assert read_onnx(tmp_path / "out" / "model.onnx").opset == opset
    least = {18: 8, 19: 9, 20: 9, 21: 10, 22: 10, 23: 11}[opset]
    assert onnx.load(tmp_path / "out" / "model.onnx").ir_version == least, "older runtimes that know the opset read it"


def test_both_kinds_of_input_give_the_same_logits(
    exported: Export, trained_model: TrainedModel, tmp_path: Path
) -> None:
    done = export_onnx(trained_model, tmp_path / "float", input_kind="float")

    images = random_images(16)
    pixels, normalised = OnnxClassifier(exported.model_file), OnnxClassifier(done.model_file)
    torch.testing.assert_close(pixels.logits(images), normalised.logits(images), rtol=0, atol=2e-5)
    (declared,) = onnxruntime.InferenceSession(done.model_file).get_inputs()
    assert (declared.name, declared.type, declared.shape) == ("image", "tensor(float)", ["batch", 3, 32, 32])
    run_snippet(done.folder, trained_model)


def test_the_interface_is_what_the_contract_says(exported: Export) -> None:
    session = onnxruntime.InferenceSession(exported.model_file)
    (declared,), outputs = session.get_inputs(), session.get_outputs()
    metadata = session.get_modelmeta().custom_metadata_map

    assert (declared.name, declared.type, declared.shape) == ("image", "tensor(uint8)", ["batch", 32, 32, 3])
    assert (outputs[0].name, outputs[0].shape) == ("logits", ["batch", 10])
    assert json.loads(metadata["names"]) == {str(number): name for number, name in enumerate(CLASS_NAMES)}
    assert metadata["icdctl.weights_sha256"] == exported.description.weights_sha256
    assert json.loads(metadata["icdctl.variant"]) == {"gamma": 8}
    assert json.loads(metadata["icdctl.preprocess"])["mean"] == list(PREPROCESSING.mean)
    assert read_onnx(exported.model_file).description == exported.description


def test_the_folder_tells_the_whole_story(exported: Export, trained_model: TrainedModel) -> None:
    facts = json.loads((exported.folder / "model.json").read_text())
    verification = json.loads((exported.folder / "verify.json").read_text())
    card = (exported.folder / "README.md").read_text()

    assert {path.name for path in exported.folder.iterdir()} == EVERY_FILE
    assert facts["weights_sha256"] == trained_model.sha256
    assert facts["files"]["model.onnx"] == exported.num_bytes
    assert facts["accuracy"] == {"top1": 75.0, "images": 20}
    assert facts["facts"]["weights"] == "student.safetensors"
    assert verification["passed"] is True
    assert verification["agreement"] == 100.0
    for expected in (
        "res32x4",
        "70.5",
        "75.00 % top-1 on 20 images",
        trained_model.sha256,
        "`image`",
        "[batch, 32, 32, 3]",
    ):
        assert expected in card
    assert json.loads(json.dumps(exported.as_json()))["verification"]["passed"] is True


def test_nothing_of_this_machine_is_in_the_folder(exported: Export, trained_model: TrainedModel) -> None:
    for path in exported.folder.iterdir():
        content = path.read_bytes()
        for trace in (str(ROOT), str(trained_model.path.parent), str(Path.home()) + "/", "somebody", ".py", sys.prefix):
            assert trace.encode() not in content, f"{trace} in {path.name}"


def test_equal_weights_give_equal_bytes_in_every_process(
    exported: Export, trained_model: TrainedModel, tmp_path: Path
) -> None:
    program = (
        "import sys; from pathlib import Path; from icdctl.exporting import export_onnx\n"
        "from icdctl.registry import trained\n"
        "done = export_onnx(trained.resolve(sys.argv[1]), Path(sys.argv[2]), facts={'variant': {'gamma': 8}})\n"
        "print(done.sha256)"
    )
    runs = []
    for seed in ("1", "2"):
        folder = tmp_path / seed
        folder.mkdir()
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONHASHSEED": seed, "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-c", program, str(trained_model.path), "out"]
        runs.append(subprocess.Popen(command, cwd=folder, env=environment, stdout=subprocess.PIPE, text=True))
    hashes = [run.communicate(timeout=300)[0].split() for run in runs]  # nothing else may be on stdout

    assert hashes == [[exported.sha256]] * 2


def run_snippet(folder: Path, trained_model: TrainedModel) -> None:
    code = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), flags=re.DOTALL)
    assert len(code) == 1
    pixels = random_images(1)
    Image.fromarray(pixels[0].numpy()).save(folder / "image.png")
    check = "\nimport sys\nassert not {'torch', 'icdctl', 'onnx'} & set(sys.modules)\n"
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-c", code[0] + check],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == CLASS_NAMES[int(torch_logits(trained_model, pixels).argmax())]


def test_the_snippet_of_the_card_runs_without_torch(copied: Path, trained_model: TrainedModel) -> None:
    run_snippet(copied, trained_model)


# Running it


def test_a_classifier_says_what_it_takes_and_how_long(exported: Export) -> None:
    classifier = OnnxClassifier(exported.model_file)

    assert classifier.class_names == CLASS_NAMES
    assert classifier.preprocessing == PREPROCESSING
    assert classifier.input_kind == "uint8"
    assert classifier.logits(random_images(3)).shape == (3, 10)
    assert 0 < classifier.latency_ms(repeats=3) < 1000


@pytest.mark.parametrize("images", [random_images(2, (28, 28)), random_images(2).float(), random_images(2)[0]])
def test_images_of_another_kind_are_refused(images: Tensor, exported: Export) -> None:
    with pytest.raises(UsageError, match=r"takes images \[B, 32, 32, 3\] uint8"):
        OnnxClassifier(exported.model_file).logits(images)


# Mutations: each must fail verification and leave nothing


def weights_of(proto: Any, name: str) -> np.ndarray[Any, Any]:
    (found,) = (tensor for tensor in proto.graph.initializer if tensor.name == name)
    return np.array(numpy_helper.to_array(found))


def set_weights(proto: Any, name: str, value: np.ndarray[Any, Any]) -> None:
    for tensor in proto.graph.initializer:
        if tensor.name == name:
            tensor.CopyFrom(numpy_helper.from_array(value.astype(np.float32), name))


def scale_largest_weight(factor: float) -> Mutation:
    def mutate(proto: Any) -> None:
        convolutions = [node.input[1] for node in proto.graph.node if node.op_type == "Conv"]
        name = convolutions[len(convolutions) // 2]
        value = weights_of(proto, name)
        value.flat[np.abs(value).argmax()] *= factor
        set_weights(proto, name, value)

    return mutate


def swap_channels(proto: Any) -> None:
    for name, axis in (("scale", 1), ("offset", 1), ("model.conv1.weight", 1)):
        set_weights(proto, name, np.flip(weights_of(proto, name), axis))


def other_normalisation(proto: Any) -> None:
    mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    set_weights(proto, "scale", (1 / (255 * std)).reshape(1, 3, 1, 1))
    set_weights(proto, "offset", (-mean / std).reshape(1, 3, 1, 1))


def rounded_mean(proto: Any) -> None:
    mean, std = np.array(PREPROCESSING.mean).round(2), np.array(PREPROCESSING.std)
    set_weights(proto, "offset", (-mean / std).reshape(1, 3, 1, 1))


def no_division_by_255(proto: Any) -> None:
    set_weights(proto, "scale", weights_of(proto, "scale") * 255)


def nan_bias(proto: Any) -> None:
    name = next(node.input[2] for node in proto.graph.node if node.op_type == "Gemm")
    set_weights(proto, name, np.full_like(weights_of(proto, name), np.nan))


def constant_batch(proto: Any) -> None:
    proto.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 2


def other_output_name(proto: Any) -> None:
    old = proto.graph.output[0].name
    proto.graph.output[0].name = "scores"
    for node in proto.graph.node:
        for number, name in enumerate(node.output):
            if name == old:
                node.output[number] = "scores"


def other_weights_hash(proto: Any) -> None:
    for entry in proto.metadata_props:
        if entry.key == "icdctl.weights_sha256":
            entry.value = "0" * 64


GRAPH_MUTATIONS: dict[str, tuple[Mutation, str]] = {
    "largest weight + 0.1 %": (scale_largest_weight(1.001), "values"),
    "largest weight + 1 %": (scale_largest_weight(1.01), "values"),
    "BGR": (swap_channels, "values"),
    "mean and std of another data set": (other_normalisation, "values"),
    "mean rounded": (rounded_mean, "values"),
    "no division by 255": (no_division_by_255, "values"),
    "NaN": (nan_bias, "finite"),
    "constant batch": (constant_batch, "declared"),
    "another output name": (other_output_name, "declared"),
    "hash of other weights": (other_weights_hash, "declared"),
}


def mutated(content: bytes, mutate: Mutation) -> bytes:
    proto = onnx.load_model_from_string(content)
    mutate(proto)
    changed = proto.SerializeToString(deterministic=True)
    assert changed != content
    return bytes(changed)


def assert_refused_and_nothing_left(trained_model: TrainedModel, folder: Path, reason: str) -> None:
    folder.mkdir(exist_ok=True)
    with pytest.raises(ArtifactError, match="nothing was written") as caught:
        export_onnx(trained_model, folder / "out")
    assert reason in caught.value.message
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize("name", GRAPH_MUTATIONS)
def test_a_damaged_graph_is_refused(
    name: str, trained_model: TrainedModel, ready_graph: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mutate, reason = GRAPH_MUTATIONS[name]
    monkeypatch.setattr(graph, "graph_bytes", lambda *_, **__: mutated(ready_graph, mutate))

    assert_refused_and_nothing_left(trained_model, tmp_path / "exports", f"{reason}: ")


def train_mode(module: nn.Module) -> None:
    """Dropout is live in it; batch norms are folded before."""
    network = module.get_submodule("model")
    network.fc = nn.Sequential(nn.Dropout(0.5), network.get_submodule("fc"))
    module.train()


def test_a_module_exported_in_train_mode_is_refused(
    trained_model: TrainedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    intact = graph._traced

    def traced(module: nn.Module, example: Tensor, **options: Any) -> Any:
        train_mode(module)
        return intact(module, example, **options)

    monkeypatch.setattr(graph, "_traced", traced)

    assert_refused_and_nothing_left(trained_model, tmp_path / "exports", "values: ")


def test_batch_norms_folded_with_another_epsilon_are_refused(
    trained_model: TrainedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def folded(model: nn.Module) -> nn.Module:
        for part in model.modules():
            if isinstance(part, nn.BatchNorm2d):
                part.eps = 1e-3
        return models.fold_batch_norms(model)

    monkeypatch.setattr(graph, "fold_batch_norms", folded)

    assert_refused_and_nothing_left(trained_model, tmp_path / "exports", "values: ")


def test_a_failed_export_leaves_the_older_one(
    trained_model: TrainedModel, copied: Path, ready_graph: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(graph, "graph_bytes", lambda *_, **__: mutated(ready_graph, no_division_by_255))

    with pytest.raises(ArtifactError, match="nothing was written"):
        export_onnx(trained_model, copied, replace=True)
    assert verify_folder(copied).passed
    assert list(copied.parent.iterdir()) == [copied]


# Where it is written


def test_an_existing_folder_is_refused_and_replaced_on_demand(
    trained_model: TrainedModel, copied: Path, ready_graph: bytes
) -> None:
    card = (copied / "README.md").read_text()
    with pytest.raises(ArtifactError, match="exists already"):
        export_onnx(trained_model, copied)
    assert (copied / "README.md").read_text() == card

    export_onnx(trained_model, copied, replace=True, facts={"teacher": "another"})
    assert "another" in (copied / "README.md").read_text()
    assert verify_folder(copied).passed
    assert list(copied.parent.iterdir()) == [copied]


def test_a_folder_that_is_no_export_is_never_replaced(trained_model: TrainedModel, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")

    with pytest.raises(ArtifactError, match="not an export folder"):
        export_onnx(trained_model, tmp_path, replace=True)
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


def test_the_older_export_comes_back_where_the_rename_fails(
    trained_model: TrainedModel, copied: Path, ready_graph: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    rename = Path.replace

    def replace(self: Path, other: Path) -> Path:
        if other == copied and ".old." not in self.name:
            raise OSError(28, "No space left on device")
        return rename(self, other)

    monkeypatch.setattr(Path, "replace", replace)

    with pytest.raises(ArtifactError, match="No space left on device"):
        export_onnx(trained_model, copied, replace=True)
    assert verify_folder(copied).passed
    assert list(copied.parent.iterdir()) == [copied]


def test_a_place_that_cannot_be_written_is_named_before_the_work(
    trained_model: TrainedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("not a folder")
    monkeypatch.delattr(graph, "graph_bytes")

    with pytest.raises(ArtifactError, match="can't be written"):
        export_onnx(trained_model, tmp_path / "file" / "out")


def test_wrong_options_are_named(trained_model: TrainedModel, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(UsageError, match="opset 17"):
        export_onnx(trained_model, out, opset=17)
    with pytest.raises(UsageError, match="3 labels for 2 images"):
        export_onnx(trained_model, out, images=random_images(2), labels=torch.zeros(3))
    with pytest.raises(UsageError, match=r"\[2, 28, 28, 3\] uint8"):
        export_onnx(trained_model, out, images=random_images(2, (28, 28)))
    assert not out.exists()


# Looking again


def test_a_folder_is_verified_with_and_without_its_weights(exported: Export, trained_model: TrainedModel) -> None:
    alone = verify_folder(exported.folder)
    against = verify_folder(exported.folder, trained_model, images=random_images(20))
    bare = verify_file(exported.model_file)

    assert (alone.passed, against.passed, bare.passed) == (True, True, True)
    assert alone.max_error is not None
    assert alone.max_error <= (alone.tolerance or 0)
    assert against.agreement == 100.0
    assert {check.name: check.status for check in bare.checks}["values"] == "skipped"
    assert bare.max_error is None


def test_a_graph_is_not_verified_against_other_weights(exported: Export, tmp_path: Path) -> None:
    report = verify_file(exported.model_file, make_target(tmp_path, "res8", seed=4), images=random_images(20))

    assert [check.name for check in report.failures] == ["declared", "values", "agreement"]
    assert report.agreement is not None
    assert report.agreement < 100
    assert json.dumps(report.as_json(), allow_nan=False)


def change_a_byte(folder: Path) -> None:
    content = bytearray((folder / "model.onnx").read_bytes())
    content[len(content) // 2] ^= 1
    (folder / "model.onnx").write_bytes(content)


def change_a_size(folder: Path) -> None:
    held = json.loads((folder / "manifest.json").read_text())
    held["files"]["verify.json"]["bytes"] += 1
    (folder / "manifest.json").write_text(json.dumps(held))


@pytest.mark.parametrize(
    ("tamper", "problem"),
    [
        (change_a_byte, "changed: model.onnx"),
        (change_a_size, "changed: verify.json"),
        (lambda folder: (folder / "README.md").unlink(), "missing: README.md"),
        (lambda folder: (folder / "model.int8.onnx").write_bytes(b"x"), "extra: model.int8.onnx"),
    ],
    ids=["changed", "size", "missing", "extra"],
)
def test_a_tampered_folder_is_found_by_its_hashes(tamper: Callable[[Path], Any], problem: str, copied: Path) -> None:
    tamper(copied)

    (check,) = verify_folder(copied).checks
    assert (check.name, check.status, check.detail) == ("hashes", "fail", problem)


def test_a_consistent_forgery_fails_by_the_recorded_values(copied: Path) -> None:
    model_file = copied / "model.onnx"
    model_file.write_bytes(mutated(model_file.read_bytes(), scale_largest_weight(1.01)))
    (copied / "manifest.json").unlink()
    manifest.write(copied)

    report = verify_folder(copied)
    assert [check.name for check in report.failures] == ["values"]


@pytest.mark.parametrize(
    "text", ["", "[]", '{"schema": "icdctl-export/1", "files": {"../model.onnx": {"sha256": ""}}}', None]
)
def test_a_folder_without_a_manifest_is_refused(text: str | None, tmp_path: Path) -> None:
    if text is not None:
        (tmp_path / "manifest.json").write_text(text)

    with pytest.raises(ArtifactError, match="manifest"):
        verify_folder(tmp_path)


# Hostile files


def external_data(proto: Any) -> None:
    tensor = proto.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.data_location = onnx.TensorProto.EXTERNAL
    entry = tensor.external_data.add()
    entry.key, entry.value = "location", "/etc/passwd"


def custom_domain(proto: Any) -> None:
    proto.graph.node[-1].domain = "evil.operators"
    proto.opset_import.add().domain = "evil.operators"


def local_function(proto: Any) -> None:
    proto.functions.add().name = "Relu"


def old_opset(proto: Any) -> None:
    proto.opset_import[0].version = 13


def foreign(proto: Any) -> None:
    del proto.metadata_props[:]


def contradicting_names(proto: Any) -> None:
    for entry in proto.metadata_props:
        if entry.key == "names":
            entry.value = '{"0": "only one"}'


def broken_graph(proto: Any) -> None:
    proto.graph.node[0].input[0] = "nowhere"


HOSTILE: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "empty": (lambda _: b"", "is empty"),
    "truncated": (lambda content: content[: len(content) // 2], "cut short"),
    "no protobuf": (lambda _: b"\xff" * 1000, "not an ONNX file"),
    "a pickle": (lambda _: b"\x80\x02c__builtin__\neval\n", "not an ONNX file"),
    "no graph": (lambda _: onnx.ModelProto(ir_version=10).SerializeToString(), "holds no graph"),
    "web page": (lambda _: b"<!DOCTYPE html><html>404</html>", "is a web page"),
    "git-lfs pointer": (lambda _: b"version https://git-lfs.github.com/spec/v1\n", "git-lfs pointer"),
    "external data": (lambda content: mutated(content, external_data), "are stored in another file"),
    "custom domain": (lambda content: mutated(content, custom_domain), "evil.operators"),
    "local function": (lambda content: mutated(content, local_function), "custom operators"),
    "old opset": (lambda content: mutated(content, old_opset), "its opset is 13"),
    "broken graph": (lambda content: mutated(content, broken_graph), "not a valid ONNX graph"),
    "another program's": (lambda content: mutated(content, foreign), "not made by `icdctl export`"),
    "contradicting metadata": (lambda content: mutated(content, contradicting_names), "1 names for 10 classes"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_file_is_refused_before_a_session_is_made(
    name: str, exported: Export, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make, message = HOSTILE[name]
    path = tmp_path / "model.onnx"
    path.write_bytes(make(exported.model_file.read_bytes()))
    monkeypatch.delattr(onnxruntime, "InferenceSession")

    for look in (verify_file, OnnxClassifier):
        with pytest.raises(ArtifactError) as caught:
            look(path)
        assert message in caught.value.message
        assert caught.value.hint


def test_a_file_that_is_not_there_or_a_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="does not exist"):
        OnnxClassifier(tmp_path / "model.onnx")
    with pytest.raises(ArtifactError, match="is a folder"):
        OnnxClassifier(tmp_path)
