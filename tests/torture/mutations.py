"""Ways to damage a file: its bytes, its structure, what it is. All are drawn from one seeded generator."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import os
import random
import shutil
import signal
import struct
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import onnx
import yaml

Random = random.Random

_ODD_SCALARS: tuple[Any, ...] = (
    None,
    True,
    False,
    0,
    1,
    -1,
    0.5,
    -0.0,
    1e308,
    float("nan"),
    float("inf"),
    -float("inf"),
    2**31,
    2**63,
    -(2**63) - 1,
    10**400,
    10**40,
    "",
    "0",
    "nan",
    "null",
    "../../../outside",
    "/",
    ".",
    "~nobody-here/x",
    "a\nb",
    "a\x00b",
    "\x1b[31m",
    "\ud800",
    "\u202e",
    "é" * 300,
    "x" * 100_000,
    "<script>alert(1)</script>",
    "=1+1",
    [],
    {},
    [[]],
    [None],
    {"": None},
    [1, "a", None],
)
"""What is put in the place of a value."""
_PIECES: tuple[bytes, ...] = (
    b"\x00",
    b"\xff",
    b"\xef\xbb\xbf",
    b"\xff\xfe",
    b"\xed\xa0\x80",
    b"\r\n",
    b'"',
    b"{",
    b"[" * 20_000,
    b"{" * 5000,
    b"9" * 5000,
    b"1e999999999",
    b"\\ud800",
    b"&a *a",
    b"!!python/object/apply:os.system ['touch ran']",
    b"\x80\x04\x95\xff\xff\xff\xff\xff\xff\xff\xff",
)
_WHOLE: tuple[bytes, ...] = (
    b"",
    b"\n",
    b"null",
    b"[]",
    b"{}",
    b"0",
    b'""',
    b"[" * 200_000,
    b'{"a":' * 100_000,
    b"\x00" * 4096,
    b"\xff" * 64,
    b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
    b"<!DOCTYPE html><html>no</html>",
    b"PK\x03\x04" + b"\x00" * 60,
    b"a: &a [x,x,x,x,x,x,x,x,x]\nb: &b [*a,*a,*a,*a,*a,*a,*a,*a,*a]\nc: &c [*b,*b,*b,*b,*b,*b,*b,*b,*b]\n"
    b"d: &d [*c,*c,*c,*c,*c,*c,*c,*c,*c]\ne: &e [*d,*d,*d,*d,*d,*d,*d,*d,*d]\nf: [*e,*e,*e,*e,*e,*e,*e,*e,*e]\n",
)


def mutate_bytes(content: bytes, rng: Random) -> bytes:
    """Flip bits, cut, double, delete, move or insert a part, change the encoding, or replace the whole."""
    made = bytearray(content)
    for _ in range(rng.choice((1, 1, 1, 2, 5))):
        made = rng.choice(_BYTE_WAYS)(made, rng)
    return bytes(made)


def _span(made: bytearray, rng: Random) -> tuple[int, int]:
    start = rng.randrange(len(made) + 1)
    return start, min(len(made), start + rng.choice((1, 2, 4, 8, 64, 1024)))


def _flip(made: bytearray, rng: Random) -> bytearray:
    # Headers are at the beginning and the end, and are a small part of large files.
    size = len(made)
    for _ in range(rng.choice((1, 1, 8)) if size else 0):
        where = rng.choice((rng.randrange(size), rng.randrange(min(size, 512)), -1 - rng.randrange(min(size, 512))))
        made[where] ^= 1 << rng.randrange(8)
    return made


def _cut(made: bytearray, rng: Random) -> bytearray:
    return made[: rng.randrange(len(made) + 1)]


def _double(made: bytearray, rng: Random) -> bytearray:
    start, end = _span(made, rng)
    return made[:end] + made[start:]


def _delete(made: bytearray, rng: Random) -> bytearray:
    start, end = _span(made, rng)
    return made[:start] + made[end:]


def _insert(made: bytearray, rng: Random) -> bytearray:
    start = rng.randrange(len(made) + 1)
    return made[:start] + rng.choice((*_PIECES, rng.randbytes(8))) + made[start:]


def _overwrite(made: bytearray, rng: Random) -> bytearray:
    start, end = _span(made, rng)
    return made[:start] + rng.choice((b"\x00", b"\xff", b"\x7f", b"9")) * (end - start) + made[end:]


def _recode(made: bytearray, rng: Random) -> bytearray:
    text = bytes(made).decode("latin-1")
    return bytearray(text.encode(rng.choice(("utf-16", "utf-32-be", "utf-8"))))


def _replace(made: bytearray, rng: Random) -> bytearray:
    return bytearray(rng.choice(_WHOLE))


_BYTE_WAYS: tuple[Callable[[bytearray, Random], bytearray], ...] = (
    *((_flip,) * 4),
    *((_cut,) * 2),
    _double,
    _delete,
    *((_insert,) * 2),
    _overwrite,
    _recode,
    _replace,
)


# --- structure -------------------------------------------------------------------------------------------------------


def mutate_value(value: Any, rng: Random) -> Any:
    """Change one place of a tree of mappings and lists: another value, another type, a key more or less, deeper."""
    places = list(_places(value))
    if not places:
        return rng.choice(_ODD_SCALARS)
    holder, key = rng.choice(places)
    way = rng.randrange(8)
    if way <= 3:
        holder[key] = rng.choice(_ODD_SCALARS)
    elif way == 4:
        del holder[key]
    elif way == 5:
        other, other_key = rng.choice(places)
        holder[key] = json.loads(json.dumps(other[other_key], default=str))
    elif way == 6:
        if isinstance(holder, dict):
            holder[rng.choice(("", "extra", "é\n", "a" * 5000, "__class__", "epochs "))] = rng.choice(_ODD_SCALARS)
        else:
            holder.extend([holder[key]] * rng.choice((1, 50)))
    else:
        for _ in range(rng.choice((1, 3, 60))):
            holder[key] = rng.choice(([holder[key]], {"a": holder[key]}))
    return value


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    keys = list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    for key in keys:
        yield value, key
        yield from _places(value[key])


def mutate_json(content: bytes, rng: Random) -> bytes:
    """A JSON file whose value is changed in one place or two."""
    value = json.loads(content)
    for _ in range(rng.choice((1, 1, 2))):
        value = mutate_value(value, rng)
    return json.dumps(value, indent=2).encode("utf-8", "surrogatepass")


def mutate_yaml(content: bytes, rng: Random) -> bytes:
    """A YAML file whose value is changed in one place or two."""
    value = yaml.safe_load(content)
    for _ in range(rng.choice((1, 1, 2))):
        value = mutate_value(value, rng)
    try:
        return str(yaml.safe_dump(value)).encode("utf-8", "surrogatepass")
    except (yaml.YAMLError, ValueError):  # it can't write such a value; JSON is YAML
        return json.dumps(value).encode("utf-8", "surrogatepass")


def mutate_csv(content: bytes, rng: Random) -> bytes:
    """A table with another value in one field, or a field, a line or a column more or less."""
    rows = list(csv.reader(io.StringIO(content.decode("utf-8"))))
    row = rng.choice(rows)
    way = rng.randrange(4)
    if way == 0:
        row[rng.randrange(len(row))] = str(rng.choice((*_ODD_SCALARS, "9" * 5000, "1_0", "٣")))
    elif way == 1:
        del row[rng.randrange(len(row))]
    elif way == 2:
        row.extend(["1"] * rng.choice((1, 3000)))
    else:
        rows.insert(rng.randrange(len(rows)), list(row))
    made = io.StringIO()
    csv.writer(made).writerows(rows)
    return made.getvalue().encode("utf-8", "surrogatepass")


def mutate_safetensors(content: bytes, rng: Random) -> bytes:
    """Weights whose header is changed, with the right length before it."""
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    where = header["__metadata__"] if rng.random() < 0.4 and "__metadata__" in header else header
    inner = where.get("icdctl") if where is not header else None
    if isinstance(inner, str) and rng.random() < 0.8:
        where["icdctl"] = mutate_json(inner.encode(), rng).decode("utf-8", "replace")
    else:
        mutate_value(where, rng)
    made = json.dumps(header).encode("utf-8", "surrogatepass")
    return struct.pack("<Q", len(made)) + made + content[8 + length :]


def mutate_zip(content: bytes, rng: Random) -> bytes:
    """A torch checkpoint, which is a zip file, with one member changed, gone, doubled or renamed."""
    made = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as before, zipfile.ZipFile(made, "w") as after:
        names = before.namelist()
        chosen = rng.choice((next((name for name in names if name.endswith("data.pkl")), names[0]), rng.choice(names)))
        way = rng.choice(("change", "change", "change", "drop", "rename", "deflate"))
        for name in names:
            member = before.read(name)
            if name == chosen and way == "drop":
                continue
            if name == chosen and way == "change":
                member = mutate_bytes(member, rng)
            if name == chosen and way == "rename":
                name = rng.choice(("../outside", "/outside", "archive/data.pkl/x", name + ".2", "é" * 100))
            packing = zipfile.ZIP_DEFLATED if name == chosen and way == "deflate" else zipfile.ZIP_STORED
            after.writestr(name, member, packing)
    return made.getvalue()


def mutate_onnx(content: bytes, rng: Random) -> bytes:
    """A graph with one node, attribute, size, name or opset changed."""
    model = onnx.load_from_string(content)
    graph = model.graph
    node = rng.choice(graph.node)
    way = rng.randrange(8)
    if way == 0:
        node.op_type = rng.choice(("Loop", "If", "Nope", "Expand", "Tile", "Conv", "Identity", ""))
    elif way == 1 and node.attribute:
        attribute = rng.choice(node.attribute)
        odd = rng.choice((0, -1, 2**31, 2**62, -(2**63)))
        attribute.i = odd
        if attribute.ints:
            attribute.ints[rng.randrange(len(attribute.ints))] = odd
    elif way == 2 and node.input:
        node.input[rng.randrange(len(node.input))] = rng.choice((node.output[0], "absent", ""))
    elif way == 3:
        tensor = rng.choice(graph.initializer)
        if tensor.dims:
            tensor.dims[rng.randrange(len(tensor.dims))] = rng.choice((0, -1, 1, 2**40, 2**62))
    elif way == 4:
        rng.choice(graph.initializer).data_type = rng.randrange(30)
    elif way == 5:
        value = rng.choice((*graph.input, *graph.output))
        value.type.tensor_type.shape.dim[0].dim_value = rng.choice((0, -1, 2**40))
    elif way == 6:
        model.opset_import[0].version = rng.choice((0, 1, 99, -1))
    else:
        graph.node.extend([node] * rng.choice((1, 200)))
    return bytes(model.SerializeToString())


STRUCTURES: dict[str, Callable[[bytes, Random], bytes]] = {
    "json": mutate_json,
    "yaml": mutate_yaml,
    "csv": mutate_csv,
    "safetensors": mutate_safetensors,
    "zip": mutate_zip,
    "onnx": mutate_onnx,
}
"""Format -> what changes the structure of such a file."""


# --- what stands in a file's place -----------------------------------------------------------------------------------


def _fifo(path: Path) -> None:
    os.mkfifo(path)


def _folder(path: Path) -> None:
    path.mkdir()


def _endless(path: Path) -> None:
    path.symlink_to("/dev/zero")


def _random_endless(path: Path) -> None:
    path.symlink_to("/dev/urandom")


def _dangling(path: Path) -> None:
    path.symlink_to("nowhere")


def _circle(path: Path) -> None:
    path.symlink_to(path.name)


def _sparse(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(3 * 1024**3)


def _absent(path: Path) -> None:
    assert not path.exists()


THINGS: dict[str, Callable[[Path], None]] = {
    "a pipe": _fifo,
    "a folder": _folder,
    "a link to /dev/zero": _endless,
    "a link to /dev/urandom": _random_endless,
    "a dangling link": _dangling,
    "a link to itself": _circle,
    "3 GiB of zeros": _sparse,
    "nothing": _absent,
}
"""What stands in a file's place -> how it is put there."""


def put_in_place(path: Path, thing: str) -> None:
    """Put one of `THINGS` where a file or folder was."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()
    THINGS[thing](path)


@contextlib.contextmanager
def changing(path: Path, contents: tuple[bytes, bytes], *, cut: bool) -> Iterator[None]:
    """While the block runs, a process of its own writes one content and then the other into a file, in place.

    Args:
        path: the file.
        contents: what is written.
        cut: the file becomes shorter before it is written; otherwise it keeps its length.
    """
    if not cut:
        contents = (contents[0], (contents[1] + contents[0])[: len(contents[0])])
    pid = os.fork()
    if pid == 0:
        try:
            while True:
                for content in contents:
                    with path.open("r+b") as file:
                        if cut:
                            file.truncate(len(content) // 2)
                        file.write(content)
                    time.sleep(0.001)
        finally:
            os._exit(0)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
