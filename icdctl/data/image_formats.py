"""Formats of image files: which are read, by which suffixes they are found, and what to say about the others."""

from __future__ import annotations

from functools import cache
from importlib import import_module
from importlib.util import find_spec

from PIL import features

HAS_AVIF = "avif" in features.modules and features.check_module("avif")
"""Whether this Pillow decodes AVIF; its wheels do from 11.3 on."""
HAS_HEIC = find_spec("pillow_heif") is not None
"""Whether HEIC can be decoded; Pillow itself does not."""

_HEIC_SUFFIXES = frozenset({".heic", ".heif", ".hif"})
_AVIF_SUFFIXES = frozenset({".avif"})
SUFFIXES = (
    frozenset({".jpg", ".jpeg", ".jpe", ".jfif", ".jif", ".png", ".apng", ".bmp", ".dib", ".gif", ".webp"})
    | frozenset({".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".pnm"})
    | (_AVIF_SUFFIXES if HAS_AVIF else frozenset())
    | (_HEIC_SUFFIXES if HAS_HEIC else frozenset())
)
"""Lower-case suffixes of the files that count as images."""

_HOW_TO_READ_HEIC = "`pip install pillow-heif` makes icdctl read them"
_HOW_TO_READ_AVIF = "Pillow 11.3 or newer reads them: `pip install --upgrade pillow`"
_CONVERT = "convert them to PNG or JPEG"
NOT_READ = (
    dict.fromkeys(_HEIC_SUFFIXES, _HOW_TO_READ_HEIC)
    | dict.fromkeys(_AVIF_SUFFIXES, _HOW_TO_READ_AVIF)
    | dict.fromkeys((".jp2", ".j2k", ".jxl", ".jxr", ".tga", ".ico", ".pcx", ".psd", ".svg", ".eps", ".exr"), _CONVERT)
    | dict.fromkeys((".hdr", ".dcm", ".raw", ".dng", ".cr2", ".cr3", ".nef", ".arw", ".orf", ".rw2", ".raf"), _CONVERT)
)
"""Suffixes of images that icdctl may be unable to read, and what to do about each; those in `SUFFIXES` are read."""

_HEIC_BRANDS = frozenset({b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1"})
_AVIF_BRANDS = frozenset({b"avif", b"avis"})
_POINTERS = {
    b"version https://git-lfs": "a git-lfs pointer, not the image: `git lfs pull` fetches it",
    b"/annex/objects/": "a git-annex pointer, not the image: `git annex get` fetches it",
}


@cache
def readable_formats() -> tuple[str, ...]:
    """The only formats that Pillow may try. It reads more, but some are unsafe: EPS runs a program."""
    formats = ("JPEG", "PNG", "BMP", "GIF", "WEBP", "TIFF", "PPM", *(("AVIF",) if HAS_AVIF else ()))
    if not HAS_HEIC:
        return formats
    import_module("pillow_heif").register_heif_opener()
    return (*formats, "HEIF")


def pointer(content: bytes) -> str | None:
    """What a file is that stands for an image kept elsewhere; None for any other file."""
    return next((what for start, what in _POINTERS.items() if content.startswith(start)), None)


def unknown_format(content: bytes) -> str:
    """Why none of the formats fits the content of a file, in a few words."""
    brand = content[8:12] if content[4:8] == b"ftyp" else b""
    if brand in _HEIC_BRANDS and not HAS_HEIC:
        return "a HEIC image: `pip install pillow-heif` makes icdctl read it"
    if brand in _AVIF_BRANDS and not HAS_AVIF:
        return "an AVIF image: Pillow 11.3 or newer reads it"
    return "not a JPEG, PNG, BMP, GIF, WebP, TIFF, PPM, AVIF or HEIC image"
