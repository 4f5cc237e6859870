"""A folder -> photos. The one place where image files are opened, so that each trap is met once."""

from __future__ import annotations

import hashlib
import io
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from finetune.core.errors import BadInput

SUFFIXES = {".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif"}
# Pillow's readers of those, by content whatever the name says: it has more, such as EPS, which it gives to Ghostscript
FORMATS = ("JPEG", "MPO", "PNG", "WEBP", "BMP", "DIB", "GIF", "TIFF", "AVIF", "HEIF")
APPLE = {".heic", ".heif", ".hif"}  # pillow-heif reads those
BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs", b"mif1", b"msf1")  # ISO 23008-12
LAST = {".avif", ".jfif", ".jpe"} | APPLE  # of several companions of one photo, one with another suffix is taken
SUFFIXES_SHOWN = ", ".join(sorted(SUFFIXES | APPLE))
MASK = ".mask.png"  # NAME.mask.png says which part of the photo NAME is the subject
COMPANIONS = ("depth", "before")  # NAME.depth.png lies beside the photo NAME and is no photo itself
MIN_SIDE = 16  # pixels: less holds nothing to learn from
MAX_ASPECT = 20  # resized to a shorter side of 512, a longer strip would not fit into memory

MAX_FILE = 500_000_000  # bytes
MAX_DECODED = (
    450_000_000  # bytes in memory at PIXEL each: 112 million pixels, a little more than a 108-megapixel phone's
)
PIXEL = 4  # bytes of a pixel in RGB, as Pillow holds it; one bit in a file becomes that too
SMALLER = "make it smaller"


class BadImage(BadInput):
    """A file that can't be used as a photo; `reason` says why in a few words."""

    def __init__(self, file: Path, reason: str) -> None:
        super().__init__(f"{shown(file)} can't be used ({reason}): mend or remove it", path=file)
        self.file, self.reason = file, reason


@dataclass(frozen=True)
class Photo:
    """An image file: `size` is (width, height) after the EXIF rotation, `digest` the SHA-256 of its bytes."""

    path: Path
    size: tuple[int, int]
    digest: str


@dataclass(frozen=True)
class Scan:
    """The images of a folder: those that can be used, and why the others can't."""

    photos: list[Photo]
    bad: list[BadImage]

    @property
    def names(self) -> str:
        """The bad files, each with its reason."""
        return ", ".join(f"{shown(fault.file.name)} ({fault.reason})" for fault in self.bad)

    @property
    def sentence(self) -> str:
        """How many files are bad, and which."""
        return f"{len(self.bad)} of {len(self.photos) + len(self.bad)} files can't be used: {self.names}"


def image_files(folder: Path) -> list[Path]:
    """Every image file in a folder, sorted by name; hidden files and masks are left out."""
    if not folder.is_dir():
        raise BadInput(f"there is no folder {folder}: give the folder that holds the photos", path=folder)
    entries = (file for file in folder.iterdir() if not file.name.startswith("."))
    files = sorted(file for file in entries if file.is_file() or file.is_symlink())  # a dead link is a bad photo
    images = [file for file in files if file.suffix.lower() in SUFFIXES | APPLE]
    images = [file for file in images if not file.name.lower().endswith(MASK)]
    stems = {file.stem for file in images}
    return [file for file in images if not is_companion(file, stems)]


def is_companion(file: Path, stems: set[str]) -> bool:
    """Whether an image belongs to a photo of one of these names, such as NAME.depth.png to NAME."""
    name, _, kind = file.stem.rpartition(".")
    return kind in COMPANIONS and name in stems


def companion(photo: Path, kind: str) -> Path | None:
    """NAME.`kind`.png, or with another suffix, beside a photo."""
    suffixes = sorted(SUFFIXES | APPLE, key=lambda suffix: (suffix in LAST, suffix))
    files = (photo.with_name(f"{photo.stem}.{kind}{suffix}") for suffix in suffixes)
    return next((file for file in files if file.is_file()), None)


def scan(folder: Path) -> list[Photo]:
    """The photos of a folder, where every file must be good.

    Raises:
        BadInput: no folder, no images, or bad files: all of them are named at once.
    """
    found = scan_lenient(folder)
    if found.bad:
        raise BadInput(f"in {folder} {found.sentence}; mend or remove them", path=folder)
    return found.photos


def scan_lenient(folder: Path) -> Scan:
    """Opens and decodes every image of a folder once.

    Raises:
        BadInput: no folder, or no good image in it.
    """
    files = image_files(folder)
    if not files:
        raise BadInput(f"{folder} holds no pictures ({SUFFIXES_SHOWN}): {_where_photos_are(folder)}", path=folder)
    found = Scan([], [])
    for file in files:
        try:
            found.photos.append(read_photo(file))
        except BadImage as fault:
            found.bad.append(fault)
    if not found.photos:
        raise BadInput(f"{folder} holds no pictures that can be used: {found.names}; mend them", path=folder)
    return found


def _where_photos_are(folder: Path) -> str:
    within = [shown(entry.name) for entry in sorted(folder.iterdir()) if entry.is_dir() and image_files(entry)]
    found = f", such as one of its sub-folders ({', '.join(within)})" if within else ""
    return f"give the folder with the photos{found}"


def shown(name: Path | str) -> str:
    """A file's name as text that can be printed, whatever its bytes are."""
    return str(name).encode("utf-8", "backslashreplace").decode()


def read_photo(file: Path) -> Photo:
    """One file, read and decoded once.

    Raises:
        BadImage: it can't be used as a photo.
    """
    if shown(file) != str(file):
        raise BadImage(file, "its name is not UTF-8: rename it")
    content = _content(file)
    width, height = _decode(file, content).size
    if min(width, height) < MIN_SIDE:
        raise BadImage(file, f"{width}x{height} pixels are too small to learn from")
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise BadImage(file, f"{width}x{height} is more than {MAX_ASPECT} times as long as wide: crop it")
    return Photo(file, (width, height), hashlib.sha256(content).hexdigest())


def open_image(file: Path, ground: str = "white", formats: Sequence[str] = FORMATS) -> Image.Image:
    """A file as an upright RGB image: EXIF rotation applied, transparency on `ground`, 16-bit and float scaled.

    Of an animation the first frame. `formats`: what it may be, by its content.

    Raises:
        BadImage: it can't be read or decoded.
    """
    upright = _decode(file, _content(file), formats)
    if upright.mode.startswith(("I", "F")):
        return _scale_deep(upright)
    if _has_alpha(upright):
        layered = upright.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", layered.size, ground), layered).convert("RGB")
    return upright.convert("RGB")


def alpha_channel(file: Path) -> Image.Image | None:
    """A file's opacity, upright, 8 bits; None where it has none.

    Raises:
        BadImage: it can't be read or decoded.
    """
    upright = _decode(file, _content(file))
    return upright.convert("RGBA").getchannel("A") if _has_alpha(upright) else None


def open_values(file: Path) -> np.ndarray:
    """A file's grey values [height, width] as float32, upright, of as many levels as the file has.

    Raises:
        BadImage: it can't be read or decoded.
    """
    upright = _decode(file, _content(file))
    grey = upright if upright.mode.startswith(("I", "F")) else open_image(file).convert("L")
    return np.asarray(grey, dtype=np.float32)


def _has_alpha(image: Image.Image) -> bool:
    keyed = "transparency" in image.info and not image.mode.startswith(("I", "F"))  # Pillow can't convert those
    return image.mode in ("RGBA", "LA", "PA") or keyed


def _content(file: Path) -> bytes:
    try:
        size = file.stat().st_size
        if not file.is_file():  # a pipe or a device would be read for ever
            raise BadImage(file, "no plain file")
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
    """Pillow's picture of a file's bytes, before it is decoded: the one place that opens what others made.

    Raises:
        BadImage: it is of none of the `formats` by its content, would take too much memory, or is damaged.
    """
    Image.init()
    heif = "HEIF" in formats and content[4:8] == b"ftyp" and content[8:12] in BRANDS
    readable = not heif or _register_heif()
    known = [name for name in formats if name in Image.OPEN]
    try:
        with warnings.catch_warnings():
            # Pillow counts pixels, and refuses later than we do
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
        raise BadImage(file, "not a picture, or its beginning is damaged") from error
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
    """What Pillow says of a damaged file. It has no error of its own for one that ends early: only its text tells."""
    said = " ".join(str(error).split()) or type(error).__name__
    return "truncated" if "truncated" in said.lower() else f"damaged: {said}"


def _decode(file: Path, content: bytes, formats: Sequence[str] = FORMATS) -> Image.Image:
    """The whole picture, decoded and turned upright, in the mode of the file."""
    with opened(file, content, formats) as image:
        image.load()
        return ImageOps.exif_transpose(image)


def _scale_deep(image: Image.Image) -> Image.Image:
    """16-bit integers by their range, floats by their own: Pillow's convert would clip both.

    Mode "I" does not tell how deep the file was, so there the values decide.
    """
    values = np.asarray(image, dtype=np.float64)
    if image.mode.startswith("F"):
        low, high = float(values.min()), float(values.max())
        values = (values - low) / (high - low) * 255 if high > low else values * 0
    else:
        values = values / (257 if image.mode.startswith("I;16") or values.max() > 255 else 1)
    return Image.fromarray(values.round().clip(0, 255).astype(np.uint8)).convert("RGB")
