"""The list of an export folder's files with their hashes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from icdctl import files
from icdctl.errors import ArtifactError

MODEL_FILE = "model.onnx"
FACTS_FILE = "model.json"
VERIFY_FILE = "verify.json"
CARD_FILE = "README.md"
MANIFEST_FILE = "manifest.json"
_SCHEMA = "icdctl-export/1"
_HINT = "export the model again with `icdctl export`"


def write(folder: Path) -> None:
    """List every file in `folder`."""
    listed = {
        path.name: {"sha256": files.sha256_file(path), "bytes": path.stat().st_size}
        for path in sorted(folder.iterdir())
    }
    files.write_json(folder / MANIFEST_FILE, {"schema": _SCHEMA, "files": listed})


def is_export(folder: Path) -> bool:
    """Whether icdctl made this folder: its manifest says so, whatever has become of the other files."""
    try:
        return (folder / MANIFEST_FILE).is_file() and bool(_listed(folder))
    except ArtifactError:
        return False


def compare(folder: Path) -> dict[str, list[str]]:
    """Names of the files that are "changed", "missing" or "extra".

    Raises:
        ArtifactError: there is no manifest, or it is not one.
    """
    listed = _listed(folder)
    present = {path.name for path in folder.iterdir()} - {MANIFEST_FILE}
    changed = [name for name in sorted(listed) if name in present and not _unchanged(folder / name, listed[name])]
    return {"changed": changed, "missing": sorted(set(listed) - present), "extra": sorted(present - set(listed))}


def _unchanged(path: Path, entry: Any) -> bool:
    try:
        return bool(path.is_file() and files.sha256_file(path) == entry["sha256"])
    except OSError as error:
        raise ArtifactError(
            f"`{path}` can't be read: {error.strerror or error}", hint="check its permissions"
        ) from error


def _listed(folder: Path) -> dict[str, Any]:
    path = folder / MANIFEST_FILE
    value = files.read_json(path, what="export folder's manifest", hint=_HINT)
    broken = ArtifactError(f"`{path}` is not the manifest of an export folder", hint=_HINT)
    if not isinstance(value, dict) or value.get("schema") != _SCHEMA or not isinstance(value.get("files"), dict):
        raise broken
    listed: dict[str, Any] = value["files"]
    for name, entry in listed.items():
        if Path(name).name != name or not isinstance(entry, dict) or "sha256" not in entry:
            raise broken
    if MODEL_FILE not in listed:
        raise broken
    return listed
