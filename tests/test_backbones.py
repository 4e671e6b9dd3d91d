"""Backbones of torchvision, timm and packages by name: found, trained, stored, and built again by their name alone."""

from __future__ import annotations

import http.server
import io
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import CommandLine
from huggingface_hub import constants as hub
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torchvision.models import Weights, WeightsEnum
from torchvision.models import _api as zoo
from torchvision.transforms import Normalize

import icdctl as library
from icdctl import files, models
from icdctl.config.expand import expand
from icdctl.errors import ArtifactError, UsageError
from icdctl.models import backbone_names, backbones, pretrained
from icdctl.models.external import Adapted, check_patches
from icdctl.registry import trained

SIZE = (64, 64)
SMALL_TIMM = 'timm:resnet10t({"channels": [8, 8, 16, 16]})'


def built(name: str, *, size: tuple[int, int] = SIZE, num_classes: int = 3) -> Adapted:
    model = models.create(models.resolve(name), num_classes, image_size=size)
    assert isinstance(model, Adapted)
    return model.eval()


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("photos")
    random = np.random.default_rng(0)
    for number, name in enumerate(("ant", "bee", "cat")):
        for part, count in (("train", 8), ("val", 4)):
            (folder / part / name).mkdir(parents=True)
            for image in range(count):
                pixels = random.integers(0, 120, (64, 64, 3))
                pixels[:, :, number] += 100
                Image.fromarray(pixels.astype(np.uint8)).save(folder / part / name / f"{image}.png")
    return f"imagefolder:{folder}"


def small(photos: str, **changes: Any) -> dict[str, Any]:
    return {"dataset": photos, "image_size": 64, "epochs": 1, "batch_size": 12, "device": "cpu", **changes}


def flags(photos: str) -> list[str | Path]:
    """The settings of `small` as words of a command line."""
    return [part for key, value in small(photos).items() for part in (f"--{key.replace('_', '-')}", str(value))]


@pytest.fixture(scope="module")
def teacher(photos: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("taught") / "run"
    library.train(model=SMALL_TIMM, **small(photos), out=str(out))
    return out


def test_a_name_has_one_spelling() -> None:
    typed = ' timm:resnet18( {"b": 1, "a": [0.5, "x"]} )'
    assert models.resolve(typed) == 'timm:resnet18({"a": [0.5, "x"], "b": 1})'
    assert models.resolve("torchvision:resnet18()") == "torchvision:resnet18"
    assert models.short_label("torchvision:resnet18") == "torchvision_resnet18"
    assert models.short_label('timm:resnet18({"drop_rate": 0.1})') == "timm_resnet18_drop_rate_0.1"
    assert len(models.short_label(f'timm:resnet18({{"a": "{"x" * 300}"}})')) < 64
    assert models.short_label("res8") == "res8"


@pytest.mark.parametrize(
    "name", ["res8", "registry:a", "imagefolder:b", "best.pth:state_dict_ema", "a/b:c", "c:", ":d"]
)
def test_other_names_are_none_of_a_backbone(name: str) -> None:
    assert not models.is_backbone(name)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("timm:resnet18([1])", "are not a JSON object"),
        ("timm:resnet18({a: 1})", "are not JSON"),
        ('timm:resnet18({"a": 1, "a": 2})', "are not JSON"),
        ('timm:resnet18({"checkpoint_path": "/x.pth"})', "`checkpoint_path` is not an argument"),
        ('torchvision:resnet18({"weights": "DEFAULT"})', "`weights` is not an argument"),
    ],
)
def test_arguments_that_are_refused(name: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        models.resolve(name)


@pytest.mark.parametrize(
    ("name", "message", "hint"),
    [
        ("torchvision:mobilenet_v3_smal", "has no classifier `mobilenet_v3_smal`", "`torchvision:mobilenet_v3_small`"),
        ("torchvision:raft_large", "has no classifier", ""),
        ("timm:resnet10", "has no classifier `resnet10`", "`timm:resnet10t`"),
        ("timm:resnet18.nobody", "has no classifier", "timm:resnet18"),
        ("absent_package:build", "that is not allowed to run", "`ICDCTL_MODULES=absent_package`"),
    ],
)
def test_a_name_that_no_library_has_is_refused_with_what_is_near(name: str, message: str, hint: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        models.check_available(models.resolve(name))
    assert hint in str(caught.value.hint)


def test_the_error_without_timm_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    assert models.resolve("timm:resnet18") == "timm:resnet18"
    with pytest.raises(UsageError, match="needs the package timm") as caught:
        models.check_available("timm:resnet18")
    assert caught.value.hint == "`pip install 'icdctl[timm]'`"


def test_commas_of_arguments_separate_no_models() -> None:
    several = expand({"student": 'res8,timm:resnet18({"a": 1, "b": [2, 3]}),mv2'}, seeds=None)
    assert [each["student"] for each in several] == ["res8", 'timm:resnet18({"a": 1, "b": [2, 3]})', "mv2"]


@pytest.mark.parametrize(
    ("name", "feature_map", "stages"),
    [
        ("torchvision:resnet18", (512, 2, 2), [(64, 32), (64, 16), (128, 8), (256, 4), (512, 2)]),
        ("torchvision:mobilenet_v2", (1280, 2, 2), [(16, 32), (24, 16), (32, 8), (96, 4), (1280, 2)]),
        ("torchvision:densenet121", (1024, 2, 2), [(64, 32), (256, 16), (512, 8), (1024, 4), (1024, 2)]),
        ('torchvision:mobilenet_v3_small({"linear_head": true})', (576, 2, 2), None),
        ('timm:mobilenetv4_conv_small({"linear_head": true})', (960, 2, 2), None),
        (SMALL_TIMM, (16, 2, 2), [(64, 32), (8, 16), (8, 8), (16, 4), (16, 2)]),
    ],
)
def test_maps_and_stages_are_found_by_their_size(
    name: str, feature_map: tuple[int, ...], stages: list[tuple[int, int]] | None
) -> None:
    model = built(name)
    with torch.no_grad():
        outputs = model.outputs(torch.randn(2, 3, *SIZE))
        assert tuple(outputs.feature_map.shape[1:]) == feature_map
        assert torch.allclose(model.head(outputs.feature_map.mean(dim=(2, 3))), outputs.logits, atol=1e-4)
    assert [each.shape[2] for each in outputs.stages] == [32, 16, 8, 4, 2]
    if stages is not None:
        assert [(each.shape[1], each.shape[2]) for each in outputs.stages] == stages
    assert outputs.logits.shape == (2, 3)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_a_linear_head_leaves_no_layer_that_does_not_run() -> None:
    model = built('timm:mobilenetv4_conv_small({"linear_head": true})').train()
    model(torch.randn(2, 3, *SIZE)).sum().backward()
    assert [name for name, each in model.named_parameters() if each.grad is None] == []


@pytest.mark.parametrize(
    ("name", "size", "message", "hint"),
    [
        ("torchvision:mobilenet_v3_small", SIZE, "no feature map whose average", '{"linear_head": true}'),
        ('timm:vit_tiny_patch16_224({"img_size": 64, "depth": 1})', SIZE, "no feature map whose average", "`kd`"),
        (SMALL_TIMM, (32, 32), "is a single pixel", "`--image-size 64`"),
    ],
)
def test_patches_are_refused_where_head_and_average_do_not_commute(
    name: str, size: tuple[int, int], message: str, hint: str
) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        check_patches(built(name, size=size))
    assert hint in str(caught.value.hint)
    assert ("linear_head" in str(caught.value.hint)) == (hint == '{"linear_head": true}')


@pytest.mark.parametrize(
    ("name", "size", "message"),
    [
        ("timm:vit_tiny_patch16_224", SIZE, r"fails on images of 64 x 64"),
        ("torchvision:inception_v3", (32, 32), r"fails on images of 32 x 32"),
        ("torchvision:squeezenet1_1", SIZE, r"no `nn\.Linear` of `torchvision:squeezenet1_1` gives its logits"),
        ('timm:resnet10t({"no_such": 1})', SIZE, r"can't be built: TypeError"),
        ('timm:vit_tiny_patch16_224({"img_size": 64, "linear_head": true, "depth": 1})', SIZE, "no maps"),
    ],
)
def test_what_does_not_fit_is_a_message(name: str, size: tuple[int, int], message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        built(name, size=size)
    assert caught.value.hint


def fresh(*arguments: str | Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """A command in a process that knows nothing but the files."""
    command = [sys.executable, "-m", "icdctl", *map(str, arguments)]
    return subprocess.run(command, env={**os.environ, **variables}, capture_output=True, text=True, check=False)


def test_a_student_of_another_library_is_built_again_by_its_name(
    teacher: Path, photos: str, tmp_path: Path, icdctl: CommandLine
) -> None:
    student, out = SMALL_TIMM, tmp_path / "run"
    given = flags(photos)
    given += ["--teacher", teacher, "--student", student, "--set", "ema_decay=0.5"]
    code, _, err = icdctl("distill", "--method", "cd_sdd_dkd", *given, "--out", out)
    assert code == 0, err
    assert json.loads((out / "config.json").read_text())["student"] == student
    with safe_open(out / "student.safetensors", "pt") as stored:
        said = json.loads(stored.metadata()["icdctl"])
    version = backbone_names.parse(student).version
    assert (said["model"], said["library"]) == (student, {"timm": version})
    assert json.loads((out / "environment.json").read_text())["versions"]["timm"] == version
    assert icdctl("distill", "--method", "cd_sdd_dkd", *given, "--out", out, "--resume")[0] == 0
    code, shown, _ = icdctl("eval", out, "--json")
    assert code == 0
    metrics = json.loads((out / "metrics.json").read_text())
    assert json.loads(shown)["top1"] == metrics["final_top1"]
    exported = fresh("export", out)
    assert exported.returncode == 0, exported.stderr
    assert icdctl("verify", out / "onnx")[0] == 0
    assert icdctl("registry", "add", out)[0] == 0
    (name,) = (line.split()[0] for line in icdctl("registry", "list")[1].splitlines() if "cd_sdd_dkd" in line)
    image = next(Path(photos.removeprefix("imagefolder:")).rglob("*.png"))
    code, shown, _ = icdctl("predict", f"registry:{name}", image)
    assert (code, image.name in shown) == (0, True)
    code, shown, _ = icdctl("validate", out)
    assert (code, "weights  sound" in shown) == (0, True), shown


def test_feature_methods_read_the_stages(teacher: Path, photos: str, tmp_path: Path) -> None:
    given = small(photos, method="fitnet", teacher=str(teacher), student="torchvision:shufflenet_v2_x0_5")
    result = library.distill(**given, out=str(tmp_path / "run"))
    assert result.metrics["final_top1"] >= 0


def test_a_transformer_learns_from_logits_and_is_refused_patches(teacher: Path, photos: str, tmp_path: Path) -> None:
    student = 'timm:vit_tiny_patch16_224({"img_size": 64, "depth": 1, "embed_dim": 48})'
    given = small(photos, teacher=str(teacher), student=student)
    library.distill(method="kd", **given, out=str(tmp_path / "kd"))
    with pytest.raises(UsageError, match="no feature map whose average its head reads"):
        library.distill(method="sdd_kd", **given, out=str(tmp_path / "sdd"))


def test_a_registered_teacher_is_found_by_the_name_of_its_model(
    photos: str, tmp_path: Path, icdctl: CommandLine
) -> None:
    given = flags(photos)
    code, _, err = icdctl("train", "--model", SMALL_TIMM, *given, "--as-teacher", "--out", tmp_path / "t")
    assert code == 0, err
    code, shown, err = icdctl(
        "distill", "--method", "sdd_kd", "--teacher", SMALL_TIMM, "--student", SMALL_TIMM, *given, "--dry-run"
    )
    assert code == 0, err
    planned = json.loads(shown)
    assert planned["teacher"] == planned["student"] == SMALL_TIMM
    assert Path(planned["out"]).name.startswith("timm_resnet10t_channels_8_8_16_16-timm_resnet10t_channels_8_8_16_16")
    code, _, err = icdctl("distill", "--method", "kd", "--teacher", "timm:resnet18", "--student", "res8", *given)
    assert (code, "train one with `icdctl train --model timm:resnet18" in err) == (1, True)


def rewritten(run: Path, out: Path, tensors: dict[str, Tensor] | None = None, **changes: object) -> Path:
    """The weights of a run with other metadata or tensors."""
    with safe_open(run / "student.safetensors", "pt") as stored:
        said = json.loads(stored.metadata()["icdctl"])
    held = load_file(run / "student.safetensors") if tensors is None else tensors
    models.save_weights(out / "other.safetensors", held, {**said, **changes})
    return out / "other.safetensors"


def test_another_version_of_the_library_is_named_where_it_builds_another_network(teacher: Path, tmp_path: Path) -> None:
    same = rewritten(teacher, tmp_path, library={"timm": "0.1"})
    assert trained.resolve(str(same)).load().name == SMALL_TIMM
    tensors = load_file(teacher / "student.safetensors")
    tensors["layer1.0.conv1.weight"] = tensors["layer1.0.conv1.weight"][:4]
    other = rewritten(teacher, tmp_path, tensors, library={"timm": "0.1"})
    with pytest.raises(ArtifactError, match=r"timm \S+ builds another `timm:resnet10t.*` than timm 0\.1") as caught:
        library.export(other, tmp_path / "onnx")
    assert caught.value.hint == "`pip install timm==0.1`"


def test_a_callable_in_a_file_is_not_called_unless_it_is_allowed(
    teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    touched = tmp_path / "touched"
    hostile = rewritten(teacher, tmp_path, model=f'pathlib:Path.touch({{"self": "{touched}"}})')
    with pytest.raises(UsageError, match="not allowed to run"):
        library.export(hostile, tmp_path / "onnx")
    assert not touched.exists()
    monkeypatch.setenv(backbones.MODULES_VARIABLE, "pathlib")
    with pytest.raises(UsageError, match=r"can't be built|expected an nn\.Module"):
        library.export(hostile, tmp_path / "onnx")


OWN_CODE = """
import os
from os import system

from torch import nn

class Net(nn.Module):
    def __init__(self, width=4):
        super().__init__()
        self.body = nn.Conv2d(3, width, 3, stride=8, padding=1)
        self.fc = nn.Linear(width, 1000)

    def forward(self, images):
        return self.fc(self.body(images).relu().mean(dim=(2, 3)))

def broken():
    raise ValueError("no such net")

number = 5
"""


OF_OTHERS = [(name, "is not defined in `own_nets`") for name in ("system", "os.system", "nn.Linear")]


def test_a_callable_of_a_package_builds_a_model(
    photos: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, icdctl: CommandLine
) -> None:
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "own_nets.py").write_text(OWN_CODE)
    given = flags(photos)
    code, _, err = icdctl("train", "--model", "own_nets:Net", *given, "--out", tmp_path / "run")
    assert (code, "can't be imported" in err, "PYTHONPATH=FOLDER" in err) == (2, True, True)
    monkeypatch.syspath_prepend(tmp_path / "code")
    for name, message in (
        ("broken", "no such net"),
        ("number", "that can be called"),
        ("Nets", "`own_nets:Net`"),
        *OF_OTHERS,
    ):
        code, _, err = icdctl("train", "--model", f"own_nets:{name}", *given, "--out", tmp_path / "run")
        assert (code, message in err) == (2, True), err
    code, _, err = icdctl("train", "--model", 'own_nets:Net({"width": 6})', *given, "--out", tmp_path / "run")
    assert code == 0, err
    assert load_file(tmp_path / "run" / "student.safetensors")["fc.weight"].shape == (3, 6)
    where = str(tmp_path / "code")
    path = os.pathsep.join([where, os.environ.get("PYTHONPATH", "")])
    refused = fresh("eval", tmp_path / "run", PYTHONPATH=path)
    assert (refused.returncode, "`ICDCTL_MODULES=own_nets`" in refused.stderr) == (2, True), refused.stderr
    code, shown, _ = icdctl("validate", rewritten(tmp_path / "run", tmp_path, model="not_allowed:Net"))
    assert (code, "skipped" in shown) == (0, True), shown
    monkeypatch.setenv(backbones.MODULES_VARIABLE, "own_nets")
    assert icdctl("eval", tmp_path / "run")[0] == 0


def test_a_run_is_not_continued_with_another_network_of_the_same_name(
    photos: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "changing_nets.py").write_text(OWN_CODE)
    monkeypatch.syspath_prepend(tmp_path)
    given = small(photos, model="changing_nets:Net", epochs=2, out=str(tmp_path / "run"))
    library.train(**given, time_limit="0.001s")
    (tmp_path / "changing_nets.py").write_text(OWN_CODE.replace("width=4", "width=12"))
    monkeypatch.delitem(sys.modules, "changing_nets")
    with pytest.raises(ArtifactError, match="builds another `changing_nets:Net` than"):
        library.train(**given, resume=True)
    (tmp_path / "changing_nets.py").write_text(OWN_CODE)
    monkeypatch.delitem(sys.modules, "changing_nets")
    library.train(**given, resume=True)
    assert (tmp_path / "run" / "metrics.json").is_file()


class TinyNet(nn.Module):
    """A net of torchvision's form, small enough for a test."""

    def __init__(self, num_classes: int = 5) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(3, 6, 3, stride=4, padding=1), nn.BatchNorm2d(6), nn.ReLU())
        self.fc = nn.Linear(6, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.fc(self.features(images).mean(dim=(2, 3)))
        return logits


@pytest.fixture
def origin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[TinyNet, Path, list[str]]]:
    """A model of torchvision whose weights a server on this machine has: the weights, its cache, what was asked for."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    trained = TinyNet()
    with io.BytesIO() as stream:
        torch.save(trained.state_dict(), stream)
        content = stream.getvalue()
    asked: list[str] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, format: str, *arguments: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    file = f"tiny_net-{files.sha256_bytes(content)[:8]}.pth"

    class TinyNet_Weights(WeightsEnum):  # type: ignore[misc]  # torchvision has no types
        FIRST = Weights(
            url=f"http://127.0.0.1:{server.server_port}/{file}",
            transforms=Normalize,
            meta={"categories": list("abcde")},
        )
        DEFAULT = FIRST

    def tiny_net(*, weights: TinyNet_Weights | None = None, progress: bool = True, num_classes: int = 5) -> TinyNet:
        made = TinyNet(num_classes)
        if weights is not None:
            made.load_state_dict(weights.get_state_dict(progress=progress, check_hash=True))
        return made

    tiny_net.__module__ = "torchvision.models.tiny_net"
    tiny_net.__annotations__["weights"] = TinyNet_Weights | None
    zoo.register_model("tiny_net")(tiny_net)
    try:
        yield trained, tmp_path / "torch" / "hub" / "checkpoints" / file, asked
    finally:
        zoo.BUILTIN_MODELS.pop("tiny_net")
        server.shutdown()
        server.server_close()


def test_trained_weights_of_the_library_are_downloaded_once_and_pinned(
    origin: tuple[TinyNet, Path, list[str]], photos: str, tmp_path: Path, icdctl: CommandLine
) -> None:
    trained, cached, asked = origin
    given = flags(photos)
    given += ["--model", "torchvision:tiny_net", "--pretrained", "--recipe", "finetune", "--lr", "1e-9"]
    code, shown, err = icdctl("train", *given, "--dry-run")
    assert (code, json.loads(shown)["pretrained_sha256"], asked) == (0, None, []), err
    out = tmp_path / "run"
    code, _, err = icdctl("train", *given, "--out", out)
    assert code == 0, err
    learnt = load_file(out / "student.safetensors")
    assert torch.allclose(learnt["features.0.weight"], trained.state_dict()["features.0.weight"], atol=1e-6)
    assert learnt["fc.weight"].shape == (3, 6)
    stated = json.loads((out / "config.json").read_text())
    assert stated["pretrained_sha256"] == models.hash_weights(trained)
    assert len(asked) == 1
    # With a head of one layer the names of the weights are others.
    linear = built('torchvision:tiny_net({"linear_head": true})')
    assert pretrained.load_pretrained(linear) == stated["pretrained_sha256"]
    assert torch.equal(linear.state_dict()["inner.inner.features.0.weight"], trained.state_dict()["features.0.weight"])
    # From the cache, and from a configuration that states the hash.
    assert icdctl("train", "--config", out / "config.json", "--out", tmp_path / "again")[0] == 0
    assert len(asked) == 1
    assert icdctl("train", *given, "--out", out, "--resume")[0] == 0
    cached.write_bytes(cached.read_bytes()[:-1])
    code, _, err = icdctl("train", *given, "--out", tmp_path / "broken")
    assert (code, "its name states" in err, "delete" in err) == (1, True, True)


def test_other_trained_weights_than_those_of_the_run_are_refused(
    origin: tuple[TinyNet, Path, list[str]], photos: str, tmp_path: Path, icdctl: CommandLine
) -> None:
    given = small(photos, model="torchvision:tiny_net", pretrained=True, out=str(tmp_path / "run"))
    library.train(**given)
    path = tmp_path / "run" / "config.json"
    stated = json.loads(path.read_text())
    path.write_text(json.dumps({**stated, "pretrained_sha256": "0" * 64}))
    code, _, err = icdctl("train", "--config", path, "--out", tmp_path / "again")
    assert (code, "the trained weights of `torchvision:tiny_net` have sha256" in err) == (1, True)
    with pytest.raises(UsageError, match="pretrained_sha256 000000000000 ->"):
        library.train(**given, resume=True)


def test_trained_weights_of_timm_come_from_its_cache_without_a_network(
    photos: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # timm's library for downloads reads its variables (`HF_HOME`, `HF_HUB_OFFLINE`) when it is first imported.
    monkeypatch.setattr(hub, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(hub, "HF_HUB_OFFLINE", True)
    name = "timm:test_resnet.r160_in1k"
    given = small(photos, model=name, pretrained=True, lr=1e-9, epochs=1)
    with pytest.raises(ArtifactError, match="can't be downloaded by timm"):
        library.train(**given, out=str(tmp_path / "missing"))
    taught = built(name, num_classes=1000).inner
    cache, commit = tmp_path / "hub" / "models--timm--test_resnet.r160_in1k", "0" * 40
    (cache / "refs").mkdir(parents=True)
    (cache / "refs" / "main").write_text(commit)
    (cache / "snapshots" / commit).mkdir(parents=True)
    save_file(taught.state_dict(), cache / "snapshots" / commit / "model.safetensors")
    library.train(**given, out=str(tmp_path / "run"))
    learnt = load_file(tmp_path / "run" / "student.safetensors")
    assert torch.allclose(learnt["conv1.0.weight"], taught.state_dict()["conv1.0.weight"], atol=1e-6)
    stated = json.loads((tmp_path / "run" / "config.json").read_text())
    assert stated["pretrained_sha256"] == models.hash_weights(taught)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "res8", "pretrained": True}, "is no model of torchvision or timm"),
        ({"model": "torchvision:resnet18", "pretrained": True, "init_weights": "x.pth"}, "both given"),
        ({"model": "timm:resnet10t.none"}, "has no classifier"),
    ],
)
def test_settings_that_do_not_go_together(changes: dict[str, Any], message: str, photos: str) -> None:
    with pytest.raises(UsageError, match=message):
        library.train(**small(photos, **changes))


def test_a_model_without_trained_weights_is_named() -> None:
    with pytest.raises(UsageError, match="timm has no trained weights for `mobilenetv2_035`"):
        pretrained.pretrained_sha256("timm:mobilenetv2_035")


def test_the_list_of_models_says_how_to_name_those_of_other_libraries(icdctl: CommandLine) -> None:
    code, _, err = icdctl("list", "models")
    assert (code, "`torchvision:NAME`, `timm:NAME` and `package.module:callable`" in err) == (0, True)
