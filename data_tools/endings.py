"""What the bytes of an image file say before they are decoded: the ending of its name, and whether it is whole."""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import BinaryIO

from PIL import Image

from finetune.data.decoding import BadImage, image_of

ENDINGS = {"JPEG": "jpg", "MPO": "jpg", "DIB": "bmp"}  # an MPO is a phone's JPEG that holds a further picture
LAST_BYTES = {"jpg": b"\xff\xd9", "png": b"IEND\xaeB`\x82", "gif": b";"}
BOXED = ("heif", "avif")  # ISO 14496-12: boxes that begin with their length


def ending_of(image: Image.Image) -> str:
    """The ending of a name, without the dot, that fits an image's format."""
    kind = image.format or "PNG"
    return ENDINGS.get(kind, kind.lower())


def damage_of(file: Path, held: BinaryIO, ending: str) -> str:
    """Why an image can't be decoded to its end, such as "truncated", or empty. `file` names it.

    It is decoded only where its last bytes do not show that it is whole.
    """
    if _ends(held, ending):
        return ""
    held.seek(0)
    try:
        image_of(file, held.read())
    except BadImage as fault:
        return fault.reason
    return ""


def damage_of_bytes(file: Path, content: bytes, ending: str) -> str:
    """The same of bytes."""
    return damage_of(file, io.BytesIO(content), ending)


def _ends(held: BinaryIO, ending: str) -> bool:
    """Whether a file surely has its end. False for formats that do not say."""
    size = held.seek(0, os.SEEK_END)
    if ending in LAST_BYTES:
        last = LAST_BYTES[ending]
        held.seek(max(0, size - len(last)))
        return held.read() == last
    if ending == "webp":
        held.seek(4)
        return int.from_bytes(held.read(4), "little") + 8 == size
    return ending in BOXED and _boxes_end(held, size)


def _boxes_end(held: BinaryIO, size: int) -> bool:
    place = 0
    while place < size:
        held.seek(place)
        head = held.read(16)
        length = int.from_bytes(head[8:16] if head[:4] == b"\0\0\0\1" else head[:4], "big")
        if length < 8:  # 0: to the end of the file, wherever that is
            return False
        place += length
    return place == size
