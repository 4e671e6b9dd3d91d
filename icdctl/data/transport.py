"""One attempt after another to bring the bytes of a URL into a partial file; a cut one is gone on with.

A partial file is `.NAME.part`; beside it, `.NAME.part.json` says which URL it comes from and what the server called
that version (ETag or Last-Modified), so that a later request goes on with the same bytes or starts anew.
"""

from __future__ import annotations

import errno
import json
import re
import shutil
import time
import urllib.parse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import requests
import urllib3
from urllib3.exceptions import NewConnectionError

from icdctl import files

OnBytes = Callable[[int, int | None], None]
"""(bytes that are here, bytes in all where that is known)."""

_CHUNK_BYTES = 1 << 18
_RETRIED_STATUS = {408, 425, 429, 500, 502, 503, 504}
_MOST_ROUNDS = 200
"""Requests for one file, however little each of them brings."""
_AGENT = "icdctl"


class SourceError(Exception):
    """This source does not give the file; another may."""


class _Again(Exception):
    """It may work the next time."""

    def __init__(self, message: str, *, unreachable: bool = False) -> None:
        super().__init__(message)
        self.unreachable = unreachable
        """There was no connection at all: most likely the host is down, and another one should be asked soon."""


@dataclass(frozen=True)
class Patience:
    """How long a source is waited for."""

    attempts: int = 4
    """Requests in a row that bring nothing new, before the source is given up."""
    first_pause: float = 1.0
    """Seconds after the first of them; each later pause is twice as long."""
    unreachable_attempts: int = 2
    """The same, where no connection comes about."""
    connect_seconds: float = 10.0
    read_seconds: float = 30.0
    """Without a byte."""


USUAL_PATIENCE = Patience()


@dataclass(frozen=True)
class Partial:
    """A file under way."""

    path: Path

    @property
    def note(self) -> Path:
        """What is known of where it comes from."""
        return self.path.with_name(self.path.name + ".json")

    @property
    def size(self) -> int:
        """Bytes that are here."""
        try:
            return self.path.stat().st_size
        except FileNotFoundError:
            return 0

    def validator(self, url: str) -> str | None:
        """What to ask `url` with so that it goes on with these bytes; None where they are not its."""
        try:
            note = json.loads(self.note.read_text(encoding="utf-8"))
            return str(note["validator"]) if note["url"] == url and note["validator"] else None
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def begin(self, url: str, validator: str | None) -> None:
        """Forget what is here, and remember where the next bytes come from."""
        self.delete()
        files.write_json(self.note, {"url": url, "validator": validator})

    def delete(self) -> None:
        """Leave nothing of it."""
        self.path.unlink(missing_ok=True)
        self.note.unlink(missing_ok=True)


def shown(url: str) -> str:
    """A URL as it may be printed: without a user's name, password or query."""
    parts = urllib.parse.urlsplit(url)
    return urllib.parse.urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", parts.fragment))


def retrieve(url: str, partial: Partial, *, most_bytes: int, patience: Patience, on_bytes: OnBytes) -> None:
    """Bring the whole of `url` into `partial`.

    Args:
        url: http, https or file.
        partial: what an earlier attempt left is gone on with where the server allows it.
        most_bytes: a longer file is refused.
        patience: how long to try.
        on_bytes: told of the progress.

    Raises:
        SourceError: this source does not give the file.
        OSError: it can't be written here.
    """
    if url.startswith("file:"):
        _copy(url, partial, most_bytes=most_bytes, on_bytes=on_bytes)
        return
    in_vain = 0
    with requests.Session() as session:
        for _ in range(_MOST_ROUNDS):
            before = partial.size
            try:
                _request(session, url, partial, most_bytes=most_bytes, patience=patience, on_bytes=on_bytes)
                return
            except _Again as error:
                in_vain = 1 if partial.size > before else in_vain + 1
                if in_vain >= (patience.unreachable_attempts if error.unreachable else patience.attempts):
                    raise SourceError(f"{error}, {in_vain} times in a row") from error
                time.sleep(patience.first_pause * 2 ** (in_vain - 1))
    raise SourceError(f"gave up after {_MOST_ROUNDS} cut connections")


def _request(
    session: requests.Session,
    url: str,
    partial: Partial,
    *,
    most_bytes: int,
    patience: Patience,
    on_bytes: OnBytes,
) -> None:
    """One request, for all of it or for what is missing."""
    headers = {"Accept-Encoding": "identity", "User-Agent": _AGENT}
    offset, validator = partial.size, partial.validator(url)
    if offset and validator:
        headers |= {"Range": f"bytes={offset}-", "If-Range": validator}
    timeouts = (patience.connect_seconds, patience.read_seconds)
    try:
        with session.get(url, headers=headers, stream=True, timeout=timeouts) as response:
            _receive(response, url, partial, asked_from=offset, most_bytes=most_bytes, on_bytes=on_bytes)
    except requests.ConnectTimeout as error:
        raise _Again("no connection in time", unreachable=True) from error
    except requests.Timeout as error:
        raise _Again("no answer in time") from error
    except requests.exceptions.SSLError as error:
        raise SourceError("its certificate is not accepted") from error
    except requests.ConnectionError as error:
        reason = getattr(error.args[0] if error.args else None, "reason", None)
        if isinstance(getattr(reason, "original_error", reason), NewConnectionError):
            raise SourceError("there is no connection to it") from error
        raise _Again("the connection broke") from error
    except requests.RequestException as error:  # a malformed URL, endless redirects, a broken proxy setting
        raise SourceError(str(error) or type(error).__name__) from error


def _receive(
    response: requests.Response, url: str, partial: Partial, *, asked_from: int, most_bytes: int, on_bytes: OnBytes
) -> None:
    status = response.status_code
    if status == 416:  # there is nothing from there on: what is here is no part of it
        partial.delete()
        raise _Again("it does not know the rest of an earlier download")
    if status in _RETRIED_STATUS:
        raise _Again(f"it answers {status} {response.reason}".rstrip())
    if status not in (200, 206):
        raise SourceError(f"it answers {status} {response.reason}".rstrip())
    if status == 206 and _range_start(response) != asked_from:
        partial.delete()
        raise _Again("it sends another range than the one asked for")
    if status == 200:
        partial.begin(url, _validator(response))
    start = asked_from if status == 206 else 0
    announced = response.headers.get("Content-Length", "")
    total = start + int(announced) if announced.isdigit() else None
    if total is not None:
        _check_total(total, most_bytes)
    here = start
    on_bytes(here, total)
    with partial.path.open("ab") as file:
        try:
            for chunk in response.raw.stream(_CHUNK_BYTES, decode_content=False):
                file.write(chunk)
                here += len(chunk)
                _check_total(here, most_bytes)
                on_bytes(here, total)
        except urllib3.exceptions.ReadTimeoutError as error:
            raise _Again("it stalls") from error
        except urllib3.exceptions.HTTPError as error:
            raise _Again("the connection was cut") from error
    if total is not None and here < total:
        raise _Again("the connection was cut")


def _check_total(total: int, most_bytes: int) -> None:
    if total > most_bytes:
        raise SourceError(f"it sends {total:,} bytes or more, expected {most_bytes:,} at most")


def _range_start(response: requests.Response) -> int | None:
    match = re.match(r"bytes (\d+)-", response.headers.get("Content-Range", ""))
    return int(match[1]) if match else None


def _validator(response: requests.Response) -> str | None:
    """What If-Range takes: a strong ETag, or else the date."""
    etag = response.headers.get("ETag", "")
    return etag if etag.startswith('"') else response.headers.get("Last-Modified")


def _copy(url: str, partial: Partial, *, most_bytes: int, on_bytes: OnBytes) -> None:
    """From a folder of this machine or a mounted one."""
    path = Path(urllib.parse.unquote(urllib.parse.urlsplit(url).path))
    try:
        total = path.stat().st_size
        source = path.open("rb")
    except OSError as error:
        raise SourceError(error.strerror or str(error)) from error
    with source:
        _check_total(total, most_bytes)
        partial.begin(url, None)
        with partial.path.open("wb") as file:
            here = 0
            while chunk := source.read(_CHUNK_BYTES):
                file.write(chunk)
                here += len(chunk)
                on_bytes(here, total)


def check_room(num_bytes: int, folder: Path) -> None:
    """Fail before a download that can't fit.

    Raises:
        OSError: there is less room than that.
    """
    free = shutil.disk_usage(folder).free
    if free < num_bytes:
        raise OSError(errno.ENOSPC, f"no space left on device: {num_bytes:,} more bytes are needed, {free:,} are free")
