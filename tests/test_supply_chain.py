"""The package as others get it: the same bytes for the same sources, a wheel that runs alone, its bill of materials."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import tarfile
import venv
import zipfile
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import onnxruntime
import pytest
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator

import icdctl
from icdctl.exporting import session

ROOT = Path(__file__).parents[1]
PACKAGE = Path(icdctl.__file__).parent


def run(*command: str | Path, cwd: Path, **changes: str) -> subprocess.CompletedProcess[str]:
    """A command without what would make this checkout's package or settings visible to it."""
    hidden = ("PYTHONPATH", "ICDCTL_HOME", "SOURCE_DATE_EPOCH", "HTTPS_PROXY", "https_proxy")
    surroundings = {key: value for key, value in os.environ.items() if key not in hidden}
    arguments = [str(part) for part in command]
    return subprocess.run(
        arguments, cwd=cwd, env={**surroundings, **changes}, capture_output=True, text=True, check=False
    )


def build(sources: Path, out: Path) -> dict[str, bytes]:
    """The wheel and the source archive of some sources: kind -> content."""
    done = run(sys.executable, "-m", "hatchling", "build", "-d", out, cwd=sources, SOURCE_DATE_EPOCH="1700000000")
    assert done.returncode == 0, done.stderr
    return {path.suffix: path.read_bytes() for path in out.iterdir()}


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the wheel and the source archive of this checkout."""
    out = tmp_path_factory.mktemp("dist")
    build(ROOT, out)
    return out


def one(folder: Path, pattern: str) -> Path:
    (found,) = folder.glob(pattern)
    return found


def test_the_same_sources_give_the_same_bytes(built: Path, tmp_path: Path) -> None:
    with tarfile.open(one(built, "*.tar.gz")) as archive:
        archive.extractall(tmp_path / "elsewhere", filter="data")
    (sources,) = (tmp_path / "elsewhere").iterdir()
    for number, path in enumerate(sorted(sources.rglob("*"))):
        os.utime(path, (10**9 + number,) * 2)
        if path.is_file():
            path.chmod(path.stat().st_mode & 0o700)
    again = build(sources, tmp_path / "again")
    assert again == {path.suffix: path.read_bytes() for path in built.iterdir()}
    assert again.keys() == {".whl", ".gz"}


def test_the_wheel_holds_every_file_of_the_package_and_nothing_else(built: Path) -> None:
    inside = {name for name in zipfile.ZipFile(one(built, "*.whl")).namelist() if ".dist-info/" not in name}
    files = (path.relative_to(PACKAGE.parent) for path in PACKAGE.rglob("*") if path.is_file())
    assert inside == {path.as_posix() for path in files if "__pycache__" not in path.parts}


def test_the_wheel_runs_in_a_fresh_environment(built: Path, tmp_path: Path) -> None:
    venv.create(tmp_path / "fresh", with_pip=False, symlinks=True)
    (library,) = (tmp_path / "fresh").glob("lib/python*/site-packages")
    fresh = tmp_path / "fresh" / "bin"
    given = ("install", "--quiet", "--no-deps", "--no-index", "--no-compile", one(built, "*.whl"))
    installed = run(sys.executable, "-m", "pip", "--python", fresh / "python", *given, cwd=tmp_path)
    assert installed.returncode == 0, installed.stderr
    # What the package requires is that of this environment. Lines of a .pth file do not lead to further .pth files, so
    # that an editable installation of icdctl in it is not seen.
    required = dict.fromkeys(path for path in sys.path if Path(path).name == "site-packages")
    (library / "required.pth").write_text("\n".join(required))

    place = run(fresh / "python", "-c", "import icdctl; print(icdctl.__file__)", cwd=tmp_path)
    assert place.stdout == f"{library / 'icdctl' / '__init__.py'}\n"
    version = run(fresh / "icdctl", "--version", cwd=tmp_path)
    assert version.stdout.split() == ["icdctl", icdctl.__version__]
    small = ("--dataset", "digits100", "--train-images", "200", "--test-images", "100", "--epochs", "1")
    trained = run(fresh / "icdctl", "train", "--model", "res8", *small, "--device", "cpu", "--out", "run", cwd=tmp_path)
    assert trained.returncode == 0, trained.stderr
    assert {path.name for path in (tmp_path / "run").iterdir()} >= {"metrics.json", "student.safetensors"}


# --- bill of materials ---


def test_the_bill_of_materials_names_what_is_required_and_fits_the_schema(tmp_path: Path) -> None:
    out = tmp_path / "bill.json"
    done = run(sys.executable, "-W", "error", ROOT / ".ci/sbom.py", out, cwd=tmp_path, SOURCE_DATE_EPOCH="1700000000")
    assert done.returncode == 0, done.stderr
    text = out.read_text(encoding="utf-8")
    assert JsonStrictValidator(SchemaVersion.V1_6).validate_str(text) is None
    bill = json.loads(text)
    assert (bill["specVersion"], bill["metadata"]["component"]["name"]) == ("1.6", "icdctl")
    assert bill["metadata"]["timestamp"].startswith("2023-11-14T22:13:20")
    listed = {row["name"]: row for row in bill["components"]}
    assert {"torch", "onnxruntime", "safetensors", "numpy", "typer", "aiohttp"} <= listed.keys()
    assert listed.keys() & {"pytest", "ruff", "mypy", "hatchling", "icdctl"} == set()
    assert all(row["version"] and row["purl"].startswith("pkg:pypi/") for row in listed.values())
    edges = {row["ref"].split("@")[0]: row.get("dependsOn", []) for row in bill["dependencies"]}
    assert any(ref.startswith("pkg:pypi/torch@") for ref in edges["pkg:pypi/icdctl"])
    again = run(sys.executable, ROOT / ".ci/sbom.py", out, cwd=tmp_path, SOURCE_DATE_EPOCH="1700000000")
    assert (again.returncode, out.read_text(encoding="utf-8")) == (0, text)


# --- known vulnerabilities ---


@pytest.fixture(scope="module")
def audit() -> ModuleType:
    spec = importlib.util.spec_from_file_location("audit", ROOT / ".ci/audit.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


SOUND: Mapping[str, Any] = {"name": "numpy", "version": "2.1", "vulns": []}
BROKEN: Mapping[str, Any] = {
    "name": "pillow",
    "version": "11.0",
    "vulns": [{"id": "PYSEC-1", "fix_versions": ["11.1"], "aliases": [], "description": ""}],
}
UNKNOWN: Mapping[str, Any] = {"name": "torch", "skip_reason": "Dependency not found"}


@pytest.mark.parametrize(
    ("rows", "code", "said"),
    [
        ([SOUND], 0, "1 packages were audited, 0 known vulnerabilities"),
        ([SOUND, BROKEN], 1, "pillow 11.0: PYSEC-1, fixed in 11.1"),
        ([SOUND, UNKNOWN], 0, "1 packages were not audited, because the service does not know them: torch"),
        ([UNKNOWN], 2, "knows none of 1 packages; nothing was audited"),
        ([], 2, "nothing was audited"),
    ],
)
def test_an_audit_says_what_was_found_and_what_was_not_asked(
    audit: ModuleType, capsys: pytest.CaptureFixture[str], rows: list[Mapping[str, Any]], code: int, said: str
) -> None:
    assert audit.show(rows) == code
    out, err = capsys.readouterr()
    assert said in out + err


def test_an_audit_without_a_network_says_that_nothing_was_audited(tmp_path: Path) -> None:
    (tmp_path / "one.txt").write_text("numpy==2.1.0\n")
    closed = {"HTTPS_PROXY": "http://127.0.0.1:9", "https_proxy": "http://127.0.0.1:9", "HOME": str(tmp_path)}
    done = run(sys.executable, ROOT / ".ci/audit.py", "one.txt", cwd=tmp_path, **closed)
    assert (done.returncode, done.stdout) == (2, "")
    assert "could not be reached; nothing was audited" in done.stderr
    assert "hint:" in done.stderr


# --- telemetry ---


def test_the_runtimes_telemetry_is_off_before_a_session_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    monkeypatch.setattr(onnxruntime, "disable_telemetry_events", lambda: calls.append("off"))

    def made(*_: object, **__: object) -> None:
        calls.append("session")
        raise RuntimeError("no session is needed")

    monkeypatch.setattr(onnxruntime, "InferenceSession", made)
    file = type("File", (), {"content": b"", "path": Path("model.onnx")})()
    with pytest.raises(icdctl.IcdctlError, match="no session is needed"):
        session._session(file, 1)
    assert calls == ["off", "session"]


def test_sessions_are_made_in_one_place() -> None:
    makers = [path for path in PACKAGE.rglob("*.py") if "onnxruntime.InferenceSession(" in path.read_text("utf-8")]
    assert makers == [PACKAGE / "exporting" / "session.py"]
