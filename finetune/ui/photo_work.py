"""Chores with photos: small copies for the browser, and what a crop or a mask would make of a photo."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune.core.errors import BadInput
from finetune.core.events import phase
from finetune.core.files import sha256, write_json

if TYPE_CHECKING:
    from PIL import Image

    from data_tools.photo_set import Entry, PhotoSet
    from data_tools.work import Prepared

SMALL, LARGE = 360, 1600  # pixels of the longer side of a photo's copies
LARGEST_CROP = 2048  # pixels of a side
VEIL = 235, 0.88  # grey level, and its share, of what a mask leaves out
RECORD = "tried.json"
SAME_FORMAT = {".jpg": "jpg", ".jpeg": "jpg", ".webp": "webp", ".png": "png"}


def small_copies(photo: Path, folder: Path) -> int | bool:
    """Writes NAME.small.jpg and NAME.large.jpg into `folder`, without metadata; what the photo's mask leaves out is
    veiled. Returns a number that changes with them, or False where the photo can't be shown."""
    from finetune.data.decoding import BadImage, open_image
    from finetune.data.photos import mask_beside

    targets = {folder / f"{photo.name}.small.jpg": SMALL, folder / f"{photo.name}.large.jpg": LARGE}
    mask = mask_beside(photo)
    newest = max(file.stat().st_mtime for file in (photo, mask) if file is not None)
    if not all(file.is_file() and file.stat().st_mtime >= newest for file in targets):
        try:
            image = open_image(photo).convert("RGB")
            shown = image if mask is None else veiled(image, open_image(mask, "black").convert("L"))
        except (BadImage, OSError):
            return False
        write_copies(shown, targets)
    return int(min(targets).stat().st_mtime * 1000)


def write_copies(image: Image.Image, targets: Mapping[Path, int]) -> None:
    """Writes an image as JPEG files, each with its longer side in pixels."""
    from finetune.core.files import replacing

    image.info = {}
    for file, side in sorted(targets.items(), key=lambda item: -item[1]):
        image.thumbnail((side, side))
        with replacing(file) as temporary:
            image.save(temporary, "JPEG", quality=86)


def veiled(image: Image.Image, mask: Image.Image) -> Image.Image:
    """The photo, with a light veil over what its mask leaves out."""
    from PIL import Image

    level, share = VEIL
    light = Image.blend(image, Image.new("RGB", image.size, (level,) * 3), share)
    return Image.composite(image, light, mask.resize(image.size))


def try_changes(given: Mapping[str, Any]) -> Any:
    """What `finetune data crop` or `mask` would make of some photos of a set. The set stays as it is.

    Each result lies in its folder of `tried`, with a record of what would come and go.
    """
    from data_tools.photo_set import read_set

    photos, found = read_set(Path(given["photos"])), {}
    entries = {entry.name: entry for entry in photos.entries}
    with phase("Trying", len(given["tried"]), "photos") as advance:
        for name, folder in given["tried"].items():
            if name not in entries:
                raise BadInput(f"there is no photo {name!r} here: load the page again")
            found[name] = _tried(photos, entries[name], Path(folder), given)
            advance(1, "")
    return found


def _tried(photos: PhotoSet, entry: Entry, folder: Path, given: Mapping[str, Any]) -> dict[str, Any]:
    from finetune.data.decoding import BadImage

    what = given["what"]
    twin = next((each.name for each in photos.entries if each.path.stem == entry.path.stem and each != entry), "")
    if twin:
        return {"changes": False, "why": f"{twin} has the same name but for its ending: rename one"}
    shutil.rmtree(folder, ignore_errors=True)
    try:
        done = _carried_out(entry, folder, what, _format(photos, entry), given["resolution"])
    except (BadInput, BadImage) as fault:
        return {"changes": False, "why": str(fault)}
    step = done.plan.steps[0]
    if step.action not in ("cropped", "masked"):
        return {"changes": False, "why": step.why or step.action}
    record = _record(photos, entry, what, done.out)
    record["of"] = {file.name: sha256(file) for file in (entry.path, *entry.companions)}
    write_json(folder / RECORD, record)
    small_copies(done.out / record["now"], Path(given["small"]) / what)
    return {"changes": True, "why": step.why, "shown": f"{what}/{record['now']}"}


def _carried_out(entry: Entry, folder: Path, what: str, saved: str, resolution: int) -> Prepared:
    """The photo alone, with what belongs to it, cropped or masked."""
    from data_tools.crop import CropRules, crop
    from data_tools.mask import mask
    from data_tools.work import copied
    from finetune.data.decoding import opened

    source, out = folder / "photo", folder / "result"
    for file in copied(entry):
        (source / file.name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file.source, source / file.name)
    if what == "crop":  # as large as the photo allows: another base may be chosen later
        with opened(entry.path, entry.path.read_bytes()) as image:
            side = min(*image.size, LARGEST_CROP)
        return crop(source, out, CropRules(max(resolution, side), saved=saved))
    return mask(source, out, unsure=True)  # the person sees it, and decides


def _format(photos: PhotoSet, entry: Entry) -> str:
    """PNG, but where a list of captions names the photo: its own format, so that it keeps its name."""
    return SAME_FORMAT.get(entry.path.suffix.lower(), "png") if photos.listed else "png"


def _record(photos: PhotoSet, entry: Entry, what: str, result: Path) -> dict[str, Any]:
    """Which files of the set the result replaces. Captions stay where they are."""
    from data_tools.photo_set import is_mask
    from finetune.data.photos import MASK, is_companion

    files = [file for file in sorted(result.rglob("*")) if file.is_file()]
    image = next(file for file in files if file.stem == entry.path.stem and file.suffix in (".png", ".jpg", ".webp"))
    if what == "mask":
        return {"what": what, "was": entry.name, "now": entry.name, "gone": [], "new": [f"{entry.path.stem}{MASK}"]}
    if photos.listed and entry.path.suffix.lower() not in SAME_FORMAT:
        raise BadInput(f"a list of captions names {entry.name}, and its crop would be a PNG: save it as PNG yourself")
    if photos.listed:
        image = image.rename(image.with_name(entry.name))
    more = [file for file in files if is_mask(file) or is_companion(file, {entry.path.stem})]
    return {
        "what": what, "was": entry.name, "now": image.name,
        "gone": [file.relative_to(photos.folder).as_posix() for file in (entry.path, *entry.companions)],
        "new": [file.relative_to(result).as_posix() for file in dict.fromkeys([image, *more])],
    }  # fmt: skip
