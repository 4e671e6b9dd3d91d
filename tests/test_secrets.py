"""Passwords and tokens are not printed, logged or stored."""

from __future__ import annotations

import http.server
import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from conftest import CommandLine

from icdctl.commands import console
from icdctl.data import download
from icdctl.data.download import RemoteFile
from icdctl.data.transport import Partial, Patience, shown
from icdctl.engine import environment
from icdctl.errors import ArtifactError, IcdctlError, UsageError, arguments_without_secrets, without_secrets


@pytest.mark.parametrize(
    ("text", "safe"),
    [
        ("http://me:SECRET@host/x is down", "http://***@host/x is down"),
        ("`https://SECRET@host:8080/x?y=1`", "`https://***@host:8080/x?y=1`"),
        ("ftp://me:SEC/RET@host/", "ftp://***@host/"),
        ("ftp://me:SEC@RET@host/", "ftp://***@host/"),
        ("http://u:SECRET@", "http://***@"),
        ("git+ssh://git:SECRET@host/a.git", "git+ssh://***@host/a.git"),
        ("https://host/x?token=SECRET&page=2", "https://host/x?token=***&page=2"),
        ("https://b.s3/x?X-Amz-Signature=SECRET#top", "https://b.s3/x?X-Amz-Signature=***#top"),
        ("https://host/x?key=SECRET", "https://host/x?key=***"),
        ("AWS_SECRET_ACCESS_KEY=SECRET dvc push", "AWS_SECRET_ACCESS_KEY=*** dvc push"),
        ("Authorization: Bearer SECRET", "Authorization: Bearer ***"),
        ("ghp_SECRETSECRETSECRETSECRET", "***"),
        # These hold no secret.
        ("https://host:8080/path@v2?epoch=3", "https://host:8080/path@v2?epoch=3"),
        ("cifar100/res8-kd@v2 in `a@b`", "cifar100/res8-kd@v2 in `a@b`"),
        ("--set temperature=4 key=4", "--set temperature=4 key=4"),
        ("file:///mnt/share/x", "file:///mnt/share/x"),
    ],
)
def test_secrets_in_text_are_hidden(text: str, safe: str) -> None:
    assert without_secrets(text) == safe
    error = IcdctlError(text, hint=text)
    assert (str(error), error.message, error.hint, error.messages) == (safe, safe, safe, (safe,))


def test_secrets_of_a_command_line_are_hidden() -> None:
    words = ["icdctl", "fetch-data", "--mirror", "http://me:SECRET@host", "--token", "SECRET", "--password=SECRET"]
    assert arguments_without_secrets(words) == [
        *["icdctl", "fetch-data", "--mirror", "http://***@host", "--token", "***", "--password=***"]
    ]
    assert arguments_without_secrets([]) == []


def test_a_run_keeps_its_command_line_without_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["icdctl", "train", "--data-dir", "s3://me:SECRET@bucket"])
    kept = environment.describe_environment(torch.device("cpu"), "fp32")
    assert kept["command_line"] == ["icdctl", "train", "--data-dir", "s3://***@bucket"]


def test_a_message_is_printed_without_secrets(capsys: pytest.CaptureFixture[str]) -> None:
    console.talk("trying http://me:SECRET@host/x")
    assert capsys.readouterr().err == "trying http://***@host/x\n"


@pytest.mark.parametrize(
    "mirror",
    ["ftp://me:SECRET@host/", "http://[::1/", "http://me:SECRET@", "http://host:99999/", "http://a b/", "http://"],
)
def test_a_mirror_that_is_none_is_refused_without_its_password(
    icdctl: CommandLine, monkeypatch: pytest.MonkeyPatch, mirror: str
) -> None:
    with pytest.raises(UsageError, match="is not a mirror"):
        download.mirrors_in_order(mirror)
    monkeypatch.setenv("ICDCTL_MIRROR", mirror)
    code, out, err = icdctl("fetch-teachers", "res56", "--json")
    assert (code, json.loads(out)["error"]["code"]) == (2, 2)
    assert "SECRET" not in out + err


FILE = RemoteFile("x.bin", (), num_bytes=100_000)
IMPATIENT = Patience(attempts=1, first_pause=0.0, unreachable_attempts=1, connect_seconds=5, read_seconds=5)


class _Cut(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", "100000")
        self.send_header("ETag", '"one"')
        self.end_headers()
        self.wfile.write(b"x" * 5000)

    def log_message(self, *arguments: object) -> None:
        pass


class _LongNumber(_Cut):
    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", "9" * 5000)
        self.end_headers()


@pytest.fixture
def address(request: pytest.FixtureRequest) -> Iterator[str]:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), request.param)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("address", [_Cut], indirect=True)
def test_an_unfinished_download_does_not_keep_the_password(
    address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    url = f"http://me:SECRET@{address}/m"
    with pytest.raises(ArtifactError) as caught:
        download.fetch(FILE, tmp_path / "x.bin", mirrors=(url,), patience=IMPATIENT)
    assert "SECRET" not in caught.value.message + caught.value.hint
    partial = Partial(tmp_path / ".x.bin.part")
    assert partial.size == 5000
    assert b"SECRET" not in partial.note.read_bytes()
    # The same URL continues the download, another one does not.
    assert partial.validator(f"{url}/x.bin") == '"one"'
    assert partial.validator(f"http://{address}/m/x.bin") is None
    partial.note.write_text(json.dumps({"url": f"{url}/x.bin", "validator": '"one"'}))  # of an earlier version
    assert partial.validator(f"{url}/x.bin") == '"one"'


@pytest.mark.parametrize("address", [_LongNumber], indirect=True)
def test_an_announced_length_of_5000_digits_is_no_traceback(
    address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with pytest.raises(ArtifactError, match="could not be fetched"):
        download.fetch(FILE, tmp_path / "x.bin", mirrors=(f"http://{address}",), patience=IMPATIENT)


@pytest.mark.parametrize("proxy", ["http://u:SECRET@", "http://[::1", "http://:::", "nothing://x"])
def test_a_malformed_proxy_is_an_error_of_the_source(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, proxy: str
) -> None:
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)
    monkeypatch.setenv("http_proxy", proxy)
    with pytest.raises(ArtifactError, match="could not be fetched") as caught:
        download.fetch(FILE, tmp_path / "x.bin", mirrors=("http://example.invalid/m",), patience=IMPATIENT)
    assert "SECRET" not in caught.value.message


def test_a_malformed_url_is_shown_without_its_content() -> None:
    assert shown("http://me:SECRET@[::1/x") == "a malformed URL"


@pytest.mark.parametrize(
    "text", ["x", "a-", "token", "api_", "://", "://a:b/", "&key=", "authorization: ", "ghp_", "--token!"]
)
def test_hiding_secrets_takes_no_longer_than_the_text(text: str) -> None:
    long = text * (200_000 // len(text))
    started = time.process_time()
    without_secrets(long)
    arguments_without_secrets([long, long])
    assert time.process_time() - started < 3


def test_a_line_of_a_message_is_cut_where_nobody_reads_on() -> None:
    error = ArtifactError("first\n" + "x" * 100_000, hint="again")
    assert error.message == "first\n" + "x" * 4000 + "... (96,000 more characters)"
