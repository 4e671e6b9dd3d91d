"""Servers on 127.0.0.1 that behave as the hosts of data sets and teachers do, and archives to serve."""

from __future__ import annotations

import hashlib
import io
import pickle
import tarfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from icdctl.data import cub200
from icdctl.data.archive import Limits
from icdctl.data.download import Patience, RemoteFile
from icdctl.data.release import Release

QUICK = Patience(attempts=3, first_pause=0.01, connect_seconds=2.0, read_seconds=0.4)


@dataclass
class Behaviour:
    """How the server treats one path."""

    content: bytes = b""
    ranges: bool = True
    length: bool = True
    cut_at: float | None = None
    """Share of the content after which the connection is cut; the first `cuts` times."""
    cuts: int = 1
    statuses: list[int] = field(default_factory=list)
    """Answers to the first requests, before it works."""
    redirect: str | None = None
    stall: bool = False
    slow: float = 0.0
    """Seconds between pieces."""
    etag: str | None = '"one"'


@dataclass
class Origin:
    """A running server."""

    url: str
    paths: dict[str, Behaviour]
    requests: list[tuple[str, str | None]] = field(default_factory=list)
    """(path, Range header) of every request."""
    stopping: threading.Event = field(default_factory=threading.Event)

    def serve(self, path: str, content: bytes, **behaviour: Any) -> str:
        """Serve `content` under `path`; returns the URL."""
        self.paths[path] = Behaviour(content, **behaviour)
        return f"{self.url}{path}"


@contextmanager
def running_origin() -> Iterator[Origin]:
    """A threading server on a free port, stopped when the block ends."""
    origin = Origin("", {})

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, format: str, *args: object) -> None:
            pass

        def do_GET(self) -> None:
            _answer(self, origin)
            self.close_connection = True

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    origin.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield origin
    finally:
        origin.stopping.set()
        server.shutdown()
        server.server_close()
        thread.join()


def _answer(handler: BaseHTTPRequestHandler, origin: Origin) -> None:
    asked = handler.headers.get("Range")
    origin.requests.append((handler.path, asked))
    behaviour = origin.paths.get(handler.path, Behaviour(statuses=[404]))
    if behaviour.stall:
        origin.stopping.wait(5)
        return
    if behaviour.redirect is not None:
        _head(handler, 302, {"Location": behaviour.redirect, "Content-Length": "0"})
        return
    if behaviour.statuses:
        status = behaviour.statuses[0] if behaviour.statuses == [404] else behaviour.statuses.pop(0)
        _head(handler, status, {"Content-Length": "0"})
        return
    start = 0
    same = handler.headers.get("If-Range") in (None, behaviour.etag)
    if asked and behaviour.ranges and same:
        start = int(asked.removeprefix("bytes=").removesuffix("-"))
    _send(handler, behaviour, start)


def _send(handler: BaseHTTPRequestHandler, behaviour: Behaviour, start: int) -> None:
    body = behaviour.content[start:]
    headers = {"ETag": behaviour.etag} if behaviour.etag else {}
    if start:
        headers["Content-Range"] = f"bytes {start}-{len(behaviour.content) - 1}/{len(behaviour.content)}"
    if behaviour.length:
        headers["Content-Length"] = str(len(body))
    if behaviour.cut_at is not None and behaviour.cuts > 0:
        behaviour.cuts -= 1
        body = body[: max(int(len(behaviour.content) * behaviour.cut_at) - start, 0)]
    _head(handler, 206 if start else 200, headers)
    pause = threading.Event()
    try:
        for first in range(0, len(body), 65536):
            handler.wfile.write(body[first : first + 65536])
            if behaviour.slow:
                pause.wait(behaviour.slow)
    except OSError:
        pass  # the client has left


def _head(handler: BaseHTTPRequestHandler, status: int, headers: dict[str, str]) -> None:
    handler.send_response(status)
    for name, value in {**headers, "Connection": "close"}.items():
        handler.send_header(name, value)
    handler.end_headers()


def close_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever asks for another machine gets no answer."""
    for name in ("http_proxy", "https_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    monkeypatch.setenv("no_proxy", "127.0.0.1")


def remote(content: bytes, *urls: str, name: str = "file.bin", **changes: Any) -> RemoteFile:
    """The description of `content`, pinned in every way."""
    facts: dict[str, Any] = {
        "num_bytes": len(content),
        "sha256": hashlib.sha256(content).hexdigest(),
        "md5": hashlib.md5(content).hexdigest(),
    }
    return RemoteFile(name, urls, **(facts | changes))


def tar_of(members: dict[str, bytes], *, extra: Callable[[tarfile.TarFile], None] | None = None) -> bytes:
    """A .tar.gz of files, and what `extra` adds."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz", compresslevel=1) as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
        if extra is not None:
            extra(tar)
    return buffer.getvalue()


def cifar_members(*, train: int = 200, test: int = 100, top: str = "cifar-100-python") -> dict[str, bytes]:
    """The three files of CIFAR-100's python version, of generated images."""
    members = {f"{top}/meta": pickle.dumps({b"fine_label_names": [b"apple"] * 100}, protocol=2)}
    for seed, (split, count) in enumerate((("test", test), ("train", train))):
        random = np.random.RandomState(seed)
        content: dict[bytes, Any] = {
            b"data": random.randint(0, 256, (count, 3072)).astype(np.uint8),
            b"fine_labels": [index % 100 for index in range(count)],
            b"filenames": [b"image.png"] * count,
        }
        members[f"{top}/{split}"] = pickle.dumps(content, protocol=2)
    return members


def release_of(members: dict[str, bytes], archive: bytes, *urls: str, **limits: int) -> Release:
    """The description of an archive in CIFAR-100's format, as exact as the real one's."""
    return Release(
        archive=remote(archive, *urls, name="cifar-100-python.tar.gz"),
        folder="cifar-100-python",
        member_md5={name.partition("/")[2]: hashlib.md5(content).hexdigest() for name, content in members.items()},
        limits=Limits(**({"members": 16, "unpacked_bytes": 4_000_000} | limits)),
    )


def jpeg(*, seed: int, grey: bool = False) -> bytes:
    """A small photograph of coloured blobs, of a size of its own."""
    random = np.random.RandomState(seed)
    coarse = Image.fromarray(random.randint(0, 256, (4, 5, 3)).astype(np.uint8))
    image = coarse.resize((50 + seed % 23, 40 + seed % 17), Image.Resampling.BICUBIC)
    buffer = io.BytesIO()
    (image.convert("L") if grey else image).save(buffer, "JPEG", quality=85)
    return buffer.getvalue()


CUB_TRAIN, CUB_TEST = 240, 40
"""Images in the stand-in for CUB-200-2011."""


def cub_members() -> dict[str, bytes]:
    """The folder of CUB-200-2011, of generated images: one of each class for training, a second one of the first 40,
    and one of every fifth class for testing. Every seventh image is grey, as a few of the real ones are."""
    known = {Path(name).parts[1]: Path(name).name for name in cub200.RELEASE.member_md5}
    top = cub200.FOLDER
    members: dict[str, bytes] = {}
    rows: list[tuple[str, int, int]] = []
    for label, species in enumerate(cub200.CLASS_NAMES, start=1):
        folder = f"{label:03d}.{species}"
        names = [known.get(folder, f"{species}_0001_{label}.jpg"), f"{species}_0002_{label}.jpg"]
        names = names[: 2 if label <= 40 else 1] + [f"{species}_test.jpg"] * (label % 5 == 0)
        for name in names:
            members[f"{top}/images/{folder}/{name}"] = jpeg(seed=len(rows), grey=len(rows) % 7 == 0)
            rows.append((f"{folder}/{name}", label, 0 if name.endswith("_test.jpg") else 1))
    numbered = list(enumerate(rows, start=1))
    lists = {
        "images.txt": [f"{number} {path}" for number, (path, _, _) in numbered],
        "image_class_labels.txt": [f"{number} {label}" for number, (_, label, _) in numbered],
        "train_test_split.txt": [f"{number} {side}" for number, (_, _, side) in numbered],
        "classes.txt": [f"{label} {label:03d}.{name}" for label, name in enumerate(cub200.CLASS_NAMES, start=1)],
    }
    members |= {f"{top}/{name}": "\n".join([*lines, ""]).encode() for name, lines in lists.items()}
    return members


def cub_archive(members: dict[str, bytes]) -> bytes:
    """What a Mac's tar makes of it: `./` before the names, its own files and `attributes.txt` beside the folder."""
    beside = {"./._CUB_200_2011": b"Mac OS X", "./attributes.txt": b"1 has_bill_shape::curved_(up_or_down)\n"}

    def add_root(tar: tarfile.TarFile) -> None:
        root = tarfile.TarInfo("./")
        root.type = tarfile.DIRTYPE
        tar.addfile(root)

    return tar_of({**beside, **{f"./{name}": content for name, content in members.items()}}, extra=add_root)


def cub_release_of(members: dict[str, bytes], archive: bytes, *urls: str, **limits: int) -> Release:
    """The description of an archive in CUB-200-2011's format, as exact as the real one's."""
    real = cub200.RELEASE
    return Release(
        archive=remote(archive, *urls, name=real.archive.name),
        folder=real.folder,
        member_md5={name: hashlib.md5(members[f"{real.folder}/{name}"]).hexdigest() for name in real.member_md5},
        limits=Limits(**({"members": 600, "unpacked_bytes": 4_000_000} | limits)),
        also_needed=real.also_needed,
        beside=real.beside,
    )
