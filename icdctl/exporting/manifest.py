"""The list of an export folder's files with their hashes."""

from __future__ import annotations

from pathlib import Path

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
    """Write the manifest of `folder`: each of its files with hash and size."""
    listed = {
        path.name: {"sha256": files.sha256_file(path), "bytes": path.stat().st_size}
        for path in sorted(folder.iterdir())
    }
    files.write_json(folder / MANIFEST_FILE, {"schema": _SCHEMA, "files": listed})


def is_export(folder: Path) -> bool:
    """True if icdctl made this folder, judged by its manifest alone; the other files may have changed."""
    try:
        return (folder / MANIFEST_FILE).is_file() and bool(_listed(folder))
    except ArtifactError:
        return False


def compare(folder: Path) -> dict[str, list[str]]:
    """The names of files that differ from the manifest, under the keys "changed", "missing" and "extra".

    Raises:
        ArtifactError: the manifest is missing or broken.
    """
    listed = _listed(folder)
    present = {path.name for path in folder.iterdir()} - {MANIFEST_FILE}
    changed = [name for name in sorted(listed) if name in present and not _unchanged(folder / name, listed[name])]
    return {"changed": changed, "missing": sorted(set(listed) - present), "extra": sorted(present - set(listed))}


def _unchanged(path: Path, listed: tuple[str, object]) -> bool:
    sha256, num_bytes = listed
    try:
        is_size = path.is_file() and num_bytes in (None, path.stat().st_size)
        return is_size and files.sha256_file(path) == sha256
    except OSError as error:
        raise ArtifactError(
            f"`{path}` can't be read: {error.strerror or error}", hint="check its permissions"
        ) from error


def _listed(folder: Path) -> dict[str, tuple[str, object]]:
    """Name of each listed file -> its sha256, and its size in bytes."""
    path = folder / MANIFEST_FILE
    value = files.read_json(path, what="export folder's manifest", hint=_HINT)
    broken = ArtifactError(f"`{path}` is not the manifest of an export folder", hint=_HINT)
    if not isinstance(value, dict) or value.get("schema") != _SCHEMA or not isinstance(value.get("files"), dict):
        raise broken
    listed: dict[str, tuple[str, object]] = {}
    for name, entry in value["files"].items():
        if Path(name).name != name or not isinstance(entry, dict) or not isinstance(entry.get("sha256"), str):
            raise broken
        listed[name] = entry["sha256"], entry.get("bytes")
    if MODEL_FILE not in listed:
        raise broken
    return listed
