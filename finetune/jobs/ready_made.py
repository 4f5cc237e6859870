"""Images of everything else that came with the tiny base, so that a first run need not draw them.

They are what that base draws with the settings in their manifest: whatever asks for others draws its own. So are
images whose bytes are not those of the manifest.
"""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from zipfile import ZIP_STORED, BadZipFile, ZipFile, ZipInfo

from finetune.core.errors import BadInput
from finetune.core.files import replacing
from finetune.core.reading import parse_json

READY_MADE = "neutral_images.zip"  # beside the tiny base's model_index.json
MANIFEST = "manifest.json"
# what zipfile raises for a damaged file, and what a manifest of another form causes
DAMAGE = (
    BadZipFile,
    RuntimeError,
    EOFError,
    zlib.error,
    OSError,
    BadInput,
    KeyError,
    AttributeError,
    TypeError,
    ValueError,
)


def unpack_images(file: Path, folder: Path, settings: dict[str, Any], names: list[str]) -> None:
    """Writes those images of `names` to a folder that are missing there, if they were drawn with these settings."""
    missing = [name for name in names if not (folder / name).is_file()]
    if not missing or not file.is_file():
        return
    for name, content in _images(file, settings, missing):
        with replacing(folder / name) as temporary:
            temporary.write_bytes(content)


def _images(file: Path, settings: dict[str, Any], names: list[str]) -> Iterator[tuple[str, bytes]]:
    """The images that are as the manifest says; none if it has other settings, or the file can't be read."""
    try:
        with ZipFile(file) as opened:
            made = parse_json(opened.read(MANIFEST).decode(), MANIFEST, dict)
            if {name: made.get(name) for name in settings} != settings:
                return
            hashes = {name: about["sha256"] for name, about in made["pictures"].items()}
            for name in names:
                content = opened.read(name) if name in hashes else b""
                if hashlib.sha256(content).hexdigest() == hashes.get(name):
                    yield name, content
    except DAMAGE:
        return  # they are drawn


def pack_images(folder: Path, file: Path, names: list[str]) -> None:
    """Writes a drawn set to a file for `unpack_images`. The same images give the same bytes."""
    with ZipFile(file, "w", ZIP_STORED) as opened:
        for name in [MANIFEST, *names]:
            opened.writestr(ZipInfo(name), (folder / name).read_bytes())
