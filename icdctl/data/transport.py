"""Downloads with retries into a partial file; an interrupted download continues where it stopped.

A partial file is `.NAME.part`. Beside it, `.NAME.part.json` holds a hash of its URL and the version that the server
stated (ETag or Last-Modified), so that a later request either continues with the same bytes or starts over.
"""

from __future__ import annotations

import errno
import os
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
"""Called with (bytes received so far, bytes in all or None where that is not known)."""

_CHUNK_BYTES = 1 << 18
_RETRIED_STATUS = {408, 425, 429, 500, 502, 503, 504}
_MOST_ROUNDS = 200
"""Most requests for one file, however few bytes each of them brings."""
_AGENT = "icdctl"


class SourceError(Exception):
    """This source does not give the file; another source may."""


class _Again(Exception):
    """This request failed; another one to the same source may work."""

    def __init__(self, message: str, *, unreachable: bool = False) -> None:
        super().__init__(message)
        self.unreachable = unreachable
        """No connection was made: the host is probably down, so the next source should be tried soon."""


@dataclass(frozen=True)
class Patience:
    """How long to wait for a source."""

    attempts: int = 4
    """Requests in a row that may bring nothing new before the source is given up."""
    first_pause: float = 1.0
    """Seconds to pause after the first such request; each later pause is twice as long."""
    unreachable_attempts: int = 2
    """Like `attempts`, where no connection is made."""
    connect_seconds: float = 10.0
    """Seconds to wait for a connection."""
    read_seconds: float = 30.0
    """Seconds to wait for the next byte."""


USUAL_PATIENCE = Patience()


@dataclass(frozen=True)
class Partial:
    """An unfinished download: a file, and a note on where its bytes come from."""

    path: Path

    @property
    def note(self) -> Path:
        """The path of the note."""
        return self.path.with_name(self.path.name + ".json")

    @property
    def size(self) -> int:
        """Number of bytes received so far."""
        try:
            return self.path.stat().st_size
        except FileNotFoundError:
            return 0

    def validator(self, url: str) -> str | None:
        """The ETag or date with which `url` can continue these bytes; None where they come from elsewhere."""
        try:
            note = files.parse_json(files.read_regular(self.note))
            # Notes of earlier versions hold the URL itself.
            source = note["source"] if "source" in note else _source(str(note["url"]))
            return str(note["validator"]) if source == _source(url) and note["validator"] else None
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def begin(self, url: str, validator: str | None) -> None:
        """Delete what has been received, and note where the next bytes come from."""
        self.delete()
        files.write_json(self.note, {"source": _source(url), "validator": validator})

    def delete(self) -> None:
        """Delete the file and its note."""
        self.path.unlink(missing_ok=True)
        self.note.unlink(missing_ok=True)


def _source(url: str) -> str:
    """What stands for a URL in a file that others may read: its hash, because a URL may hold a password."""
    return files.sha256_bytes(url.encode())


def shown(url: str) -> str:
    """A URL that is safe to print: without user name, password or query."""
    try:
        parts = urllib.parse.urlsplit(url)
    except ValueError:
        return "a malformed URL"
    return urllib.parse.urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", parts.fragment))


def retrieve(url: str, partial: Partial, *, most_bytes: int, patience: Patience, on_bytes: OnBytes) -> None:
    """Download the whole of `url` into `partial`.

    Args:
        url: an http, https or file URL.
        partial: where the bytes go; an earlier, unfinished download continues where the server allows it.
        most_bytes: limit on the file's size; a larger file is refused.
        patience: how long to try.
        on_bytes: called with the progress.

    Raises:
        SourceError: this source does not give the file.
        OSError: the file can't be written.
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
    """Make one request, for the whole file or for the missing part."""
    headers = {"Accept-Encoding": "identity", "User-Agent": _AGENT}
    offset, validator = partial.size, partial.validator(url)
    if offset and validator:
        headers |= {"Range": f"bytes={offset}-", "If-Range": validator}
    timeouts = (patience.connect_seconds, patience.read_seconds)
    try:
        with _opened(session, url, headers, timeouts) as response:
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


def _opened(
    session: requests.Session, url: str, headers: dict[str, str], timeouts: tuple[float, float]
) -> requests.Response:
    """The answer to a request, before its body.

    Raises:
        SourceError: an address is malformed.
        requests.RequestException: the request failed.
    """
    try:
        return session.get(url, headers=headers, stream=True, timeout=timeouts)
    except requests.RequestException:
        raise
    except (TypeError, ValueError, urllib3.exceptions.HTTPError) as error:
        # The libraries check neither a proxy's address nor the one that a server redirects to.
        raise SourceError("its address is malformed, or that of the proxy (`http_proxy`, `https_proxy`)") from error


def _receive(
    response: requests.Response, url: str, partial: Partial, *, asked_from: int, most_bytes: int, on_bytes: OnBytes
) -> None:
    status = response.status_code
    if status == 416:  # the file is shorter than what has been received, so that is wrong
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
    total = start + int(announced) if re.fullmatch(r"[0-9]{1,18}", announced) else None
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
    match = re.match(r"bytes ([0-9]{1,18})-", response.headers.get("Content-Range", ""))
    return int(match[1]) if match else None


def _validator(response: requests.Response) -> str | None:
    """The value for an If-Range header: a strong ETag, or else the date."""
    etag = response.headers.get("ETag", "")
    return etag if etag.startswith('"') else response.headers.get("Last-Modified")


def _copy(url: str, partial: Partial, *, most_bytes: int, on_bytes: OnBytes) -> None:
    """Copy from a local or mounted folder."""
    path = Path(urllib.parse.unquote(urllib.parse.urlsplit(url).path))
    try:
        source = files.open_regular(path)
        total = os.fstat(source.fileno()).st_size
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
    """Fail before a download that does not fit on the disk.

    Raises:
        OSError: fewer than `num_bytes` bytes are free.
    """
    free = shutil.disk_usage(folder).free
    if free < num_bytes:
        raise OSError(errno.ENOSPC, f"no space left on device: {num_bytes:,} more bytes are needed, {free:,} are free")
