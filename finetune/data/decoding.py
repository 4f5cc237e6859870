"""Decodes image files. Every image file is opened here, so that all traps are handled in one place."""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from finetune.core.errors import BadInput
from finetune.data.colours import flat_rgb, has_alpha

# Pillow's formats for these files, detected by content. Others stay off: for EPS, Pillow starts Ghostscript
FORMATS = ("JPEG", "MPO", "PNG", "WEBP", "BMP", "DIB", "GIF", "TIFF", "AVIF", "HEIF")
BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs", b"mif1", b"msf1")  # ISO 23008-12
MAX_FILE = 500_000_000  # bytes
MAX_DECODED = 450_000_000  # bytes in memory: 112 million pixels, enough for a phone with 108 megapixels
PIXEL = 4  # bytes per pixel: Pillow stores RGB in four bytes, even for files with one bit per pixel
SMALLER = "make it smaller"


class BadImage(BadInput):
    """A file that can't be used as a photo. `reason` says why in a few words."""

    def __init__(self, file: Path, reason: str) -> None:
        super().__init__(f"{shown(file)} can't be used ({reason}): fix or remove it", path=file)
        self.file, self.reason = file, reason


def shown(name: Path | str) -> str:
    """Returns a file's name as printable text, even if its bytes are not UTF-8."""
    return str(name).encode("utf-8", "backslashreplace").decode()


def open_image(file: Path, ground: str = "white", formats: Sequence[str] = FORMATS) -> Image.Image:
    """Returns a file as an upright 8-bit RGB image in sRGB.

    The EXIF rotation is applied, colours of another ICC profile are converted to sRGB, transparency is put on the
    colour `ground`, 16-bit and float values are scaled, and only the first frame of an animation is read. `formats`
    are the allowed Pillow formats, detected by content.

    Raises:
        BadImage: it can't be read or decoded.
    """
    return image_of(file, image_bytes(file), ground, formats)


def image_of(file: Path, content: bytes, ground: str = "white", formats: Sequence[str] = FORMATS) -> Image.Image:
    """The same for the bytes of an image. `file` names it in messages.

    Raises:
        BadImage: it can't be decoded.
    """
    return flat_rgb(upright(file, content, formats), ground)


def alpha_channel(file: Path, content: bytes | None = None) -> Image.Image | None:
    """Returns the opacity of a file, of these bytes, as an upright 8-bit grey image; None if it has no transparency.

    Raises:
        BadImage: it can't be read or decoded.
    """
    turned = upright(file, image_bytes(file) if content is None else content)
    return turned.convert("RGBA").getchannel("A") if has_alpha(turned) else None


def open_values(file: Path) -> np.ndarray:
    """Returns a file's grey values [height, width], float32, upright, with as many levels as the file has.

    Raises:
        BadImage: it can't be read or decoded.
    """
    return values_of(file, image_bytes(file))


def values_of(file: Path, content: bytes) -> np.ndarray:
    """The same for the bytes of an image. `file` names it in messages."""
    turned = upright(file, content)
    grey = turned if turned.mode.startswith(("I", "F")) else image_of(file, content).convert("L")
    return np.asarray(grey, dtype=np.float32)


def image_bytes(file: Path) -> bytes:
    """Returns the content of a file. Raises: BadImage: it is no file, too large or empty, or can't be read."""
    try:
        size = file.stat().st_size
        if not file.is_file():  # reading a pipe or a device might never end
            raise BadImage(file, "not a regular file")
        if size > MAX_FILE:
            raise BadImage(file, f"{size / 1e6:,.0f} MB, more than {MAX_FILE / 1e6:,.0f}: make it smaller")
        content = file.read_bytes()
    except OSError as error:
        raise BadImage(file, error.strerror or type(error).__name__) from error
    if not content:
        raise BadImage(file, "empty file")
    return content


@contextmanager
def opened(file: Path, content: bytes, formats: Sequence[str] = FORMATS) -> Iterator[Image.Image]:
    """Gives Pillow's image of a file's bytes, before it is decoded. All untrusted image data is opened here.

    Raises:
        BadImage: its content is not one of the `formats`, it would take too much memory, or it is damaged.
    """
    Image.init()
    heif = "HEIF" in formats and content[4:8] == b"ftyp" and content[8:12] in BRANDS
    readable = not heif or _register_heif()
    known = [name for name in formats if name in Image.OPEN]
    try:
        with warnings.catch_warnings():
            # our own limit, below, is stricter than Pillow's
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(content), formats=known) as image:
                decoded = image.width * image.height * PIXEL
                if decoded > MAX_DECODED:
                    raise BadImage(
                        file, f"{decoded / 1e6:,.0f} MB in memory, more than {MAX_DECODED / 1e6:,.0f}: {SMALLER}"
                    )
                yield image
    except UnidentifiedImageError as error:
        if not readable:
            raise BadImage(file, "HEIC, which needs a package: `pip install pillow-heif`") from error
        raise BadImage(file, "not an image, or its beginning is damaged") from error
    except Image.DecompressionBombError as error:
        raise BadImage(file, f"more than {2 * (Image.MAX_IMAGE_PIXELS or 0):,} pixels: {SMALLER}") from error
    except BadImage:
        raise
    except (OSError, SyntaxError, ValueError, RuntimeError, EOFError) as error:
        raise BadImage(file, _damage(error)) from error


def _register_heif() -> bool:
    """Gives Pillow its reader of HEIC; False where pillow-heif is not installed. Only when such a file comes: it loads
    libraries in C++."""
    try:
        from pillow_heif import register_heif_opener
    except ImportError:
        return False
    if "HEIF" not in Image.OPEN:
        register_heif_opener()
    return True


def _damage(error: Exception) -> str:
    """Pillow's message about a damaged file. Only its text identifies a file that ends early."""
    said = " ".join(str(error).split()) or type(error).__name__
    return "truncated" if "truncated" in said.lower() else f"damaged: {said}"


def upright(file: Path, content: bytes, formats: Sequence[str] = FORMATS) -> Image.Image:
    """Returns the decoded image, turned upright, in the mode of the file.

    Raises:
        BadImage: it can't be decoded.
    """
    with opened(file, content, formats) as image:
        image.load()
        return ImageOps.exif_transpose(image)
