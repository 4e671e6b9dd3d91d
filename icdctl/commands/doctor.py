"""`icdctl doctor`."""

from __future__ import annotations

import os
import shutil
import tempfile
from typing import TypedDict

from icdctl import files
from icdctl.commands import console, options
from icdctl.errors import IcdctlError

_LOW_DISK_BYTES = 2 * 10**9


class _Check(TypedDict):
    status: str
    what: str
    found: str
    hint: str


def doctor(as_json: options.Json = False) -> None:
    """Check this machine: versions, devices, folders and data; the exit code is 1 if icdctl would fail here.

    Example: icdctl doctor
    """
    checks = [*_software(), *_devices(), *_folders(), *_data()]
    broken = [check for check in checks if check["status"] == "fail"]
    if as_json and not broken:
        console.show_json({"checks": checks})
    elif not as_json:
        console.show_table(
            ["", "what", "found"], [[check["status"], check["what"], check["found"]] for check in checks]
        )
    if broken:
        raise IcdctlError(
            "; ".join(f"{check['what']}: {check['found']}" for check in broken), hint=str(broken[0]["hint"])
        )


def _check(status: str, what: str, found: str, hint: str = "") -> _Check:
    return {"status": status, "what": what, "found": found, "hint": hint}


def _software() -> list[_Check]:
    from icdctl import versions
    from icdctl.engine.environment import PACKAGES

    hint = "install what is missing: `pip install icdctl`"
    return [
        _check("ok" if version else "fail", name, version or "not installed", hint)
        for name, version in versions.versions(PACKAGES).items()
    ]


def _devices() -> list[_Check]:
    import torch

    threads = f"{torch.get_num_threads()} threads on {os.cpu_count()} cores, {torch.backends.cpu.get_cpu_capability()}"
    found = [_check("ok", "cpu", threads)]
    if not torch.cuda.is_available():
        built = torch.version.cuda or "no CUDA"
        return [
            *found,
            _check("none", "cuda", f"no device (torch is built for {built}); `--device auto` uses the CPU"),
        ]
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        memory = f"{properties.total_memory / 2**30:.0f} GiB"
        found.append(_check("ok", f"cuda:{index}", f"{properties.name}, {memory}"))
    return found


def _folders() -> list[_Check]:
    from icdctl import cleanup

    home = files.state_folder()
    found = [_check("ok", "project", str(files.project_root()))]
    nearest = next(folder for folder in (home, *home.parents) if folder.exists())
    try:
        with tempfile.NamedTemporaryFile(dir=nearest):
            pass
        free = shutil.disk_usage(nearest).free
        status = "ok" if free > _LOW_DISK_BYTES else "low"
        kept = f"{cleanup.total_bytes() / 1e9:.1f} GB in caches and states of runs (`icdctl clean --list`)"
        return [*found, _check(status, "state", f"{home}, {free / 1e9:.0f} GB free, {kept}")]
    except OSError as error:
        hint = "set `ICDCTL_HOME` to a folder that you may write to"
        return [*found, _check("fail", "state", f"`{home}` can't be written: {error.strerror}", hint)]


def _data() -> list[_Check]:
    from icdctl.data import DATASETS, release

    folder = files.data_folder()
    found = []
    for name, row in DATASETS.items():
        if row.description is None:
            continue
        if row.release is None:
            found.append(_check("ok", name, "embedded"))
            continue
        try:
            state, member = release.look(row.release, folder)
        except IcdctlError as error:
            found.append(_check("unreadable", name, error.message))
            continue
        place = folder / row.release.folder
        if state == "right":
            found.append(_check("ok", name, f"{place}, as published"))
        elif state == "other":
            found.append(_check("other", name, f"`{place / member}` is not the published file (its md5 differs)"))
        else:
            found.append(_check("none", name, f"not in `{folder}`; fetch it with `icdctl fetch-data {name}`"))
    return found
