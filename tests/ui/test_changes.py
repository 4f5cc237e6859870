"""A photo is cropped, masked and taken back: the bytes that were sent are never lost."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw

pytest.importorskip("starlette", reason="the extra ui is not installed: pip install 'finetune-diffusion[ui]'")

from finetune.core.errors import BadInput
from finetune.ui.changes import Changes
from finetune.ui.drafts import draft_of
from finetune.ui.photo_work import small_copies, try_changes
from finetune.ui.uploads import Uploads


def off_centre(colour: str = "red") -> Image.Image:
    """A wide photo of a disc near its right edge, on an even background."""
    image = Image.new("RGB", (240, 120), "white")
    ImageDraw.Draw(image).ellipse((160, 30, 220, 90), fill=colour)
    return image


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos" / "photos-00000000"
    folder.mkdir(parents=True)
    off_centre().save(folder / "a.jpg", quality=95)
    (folder / "a.txt").write_text("a red disc\n", encoding="utf-8")
    off_centre("blue").save(folder / "b.png")
    return folder


@pytest.fixture
def changes(tmp_path: Path) -> Changes:
    return Changes(Uploads(tmp_path))


SET = "photos-00000000"


def tried(changes: Changes, what: str, *names: str) -> dict:
    folder = changes.uploads.photos_of(SET)
    given = {
        "photos": str(folder), "small": str(changes.uploads.small_of(SET)), "what": what, "resolution": 64,
        "tried": {name: str(changes.tried(SET, name, what)) for name in names},
    }  # fmt: skip
    return try_changes(given)


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir())}


def test_a_crop_is_shown_kept_and_taken_back(changes: Changes, photos: Path) -> None:
    sent = contents(photos)
    found = tried(changes, "crop", "a.jpg")["a.jpg"]
    assert contents(photos) == sent  # a trial changes nothing
    assert found["changes"]
    assert "left" in found["why"]
    preview = changes.uploads.small_of(SET) / f"{found['shown']}.small.jpg"
    with Image.open(preview) as image:
        assert image.size[0] == image.size[1]
    assert changes.keep(SET, "a.jpg", "crop") == "a.png"
    assert sorted(contents(photos)) == ["a.png", "a.txt", "b.png"]
    with Image.open(photos / "a.png") as image:
        red = np.asarray(image.convert("RGB"))[..., 1] < 128
        assert image.size == (120, 120)
        assert red.any()
        assert not red[:, -1].any()  # the disc is whole: it ends before the edge
    assert changes.of(SET) == {"a.png": ["crop"]}
    (photos / "a.txt").write_text("written since\n", encoding="utf-8")
    assert changes.undo(SET, "a.png") == "a.jpg"
    assert contents(photos) == sent | {"a.txt": b"written since\n"}
    assert changes.of(SET) == {}
    with pytest.raises(BadInput, match="nothing to take back"):
        changes.undo(SET, "a.jpg")


def test_a_mask_and_then_a_crop_are_taken_back_one_by_one(changes: Changes, photos: Path) -> None:
    sent = contents(photos)
    small_copies(photos / "b.png", changes.uploads.small_of(SET))
    assert tried(changes, "mask", "b.png")["b.png"]["changes"]
    changes.keep(SET, "b.png", "mask")
    assert not list(changes.uploads.small_of(SET).glob("b.png.*"))  # they show the photo without its mask
    masked = contents(photos)
    with Image.open(photos / "b.mask.png") as mask:
        values = np.asarray(mask)
        assert values[60, 190] > 200  # the disc
        assert values[10, 10] < 50
    assert draft_of({"noun": "disc"}, photos, {}).more == ("data.masks=auto",)  # so that the mask counts
    assert draft_of({"noun": "disc", "more": ["data.masks=none"]}, photos, {}).more == ("data.masks=none",)
    tried(changes, "crop", "b.png")
    changes.keep(SET, "b.png", "crop")
    with Image.open(photos / "b.mask.png") as mask, Image.open(photos / "b.png") as image:
        assert mask.size == image.size == (120, 120)
    assert changes.of(SET) == {"b.png": ["mask", "crop"]}
    changes.undo(SET, "b.png")
    assert contents(photos) == masked
    changes.undo(SET, "b.png")
    assert contents(photos) == sent


def test_a_set_counts_its_photos_without_reading_them(changes: Changes, photos: Path) -> None:
    from finetune.data import photos as reading
    from finetune.ui.uploads import MASK

    assert MASK == reading.MASK
    (photos / f"b{MASK}").write_bytes(b"x")
    assert changes.uploads.count(SET) == len(reading.image_files(photos)) == 2


def test_a_masked_photo_is_left_out_with_its_mask(changes: Changes, photos: Path) -> None:
    tried(changes, "mask", "a.jpg")
    changes.keep(SET, "a.jpg", "mask")
    changes.uploads.leave_out(SET, "a.jpg", True)
    assert sorted(contents(photos)) == ["b.png"]
    assert changes.uploads.left_out(SET) == ["a.jpg"]
    changes.uploads.leave_out(SET, "a.jpg", False)
    assert sorted(contents(photos)) == ["a.jpg", "a.mask.png", "a.txt", "b.png"]


def test_what_can_not_be_changed_is_said_in_a_sentence(changes: Changes, photos: Path) -> None:
    held = io.BytesIO()
    Image.new("RGB", (80, 80), "teal").save(held, "PNG")
    (photos / "even.png").write_bytes(held.getvalue())
    (photos / "broken.png").write_bytes(held.getvalue()[:40])
    (photos / "b.jpg").write_bytes(b"x")
    found = tried(changes, "crop", "even.png", "broken.png", "b.png")
    assert not any(each["changes"] for each in found.values())
    assert "colours do not tell" in found["even.png"]["why"]
    assert "b.jpg has the same name" in found["b.png"]["why"]
    assert found["broken.png"]["why"]
    for name, what in (("even.png", "crop"), ("none.png", "crop"), ("../b.png", "mask"), ("b.png", "burn")):
        with pytest.raises(BadInput):
            changes.keep(SET, name, what)


def test_a_photo_of_a_list_keeps_its_name(changes: Changes, photos: Path) -> None:
    (photos / "a.txt").unlink()
    (photos / "metadata.jsonl").write_text('{"file_name": "a.jpg", "text": "a disc"}\n', encoding="utf-8")
    tried(changes, "crop", "a.jpg")
    assert changes.keep(SET, "a.jpg", "crop") == "a.jpg"
    with Image.open(photos / "a.jpg") as image:
        assert (image.format, image.size) == ("JPEG", (120, 120))


def test_an_old_trial_is_not_kept_after_another_change(changes: Changes, photos: Path) -> None:
    """As from a second tab: the crop of before would not fit the mask of since."""
    tried(changes, "crop", "b.png")
    tried(changes, "mask", "b.png")
    changes.keep(SET, "b.png", "mask")
    before = contents(photos)
    with pytest.raises(BadInput, match="try it again"):
        changes.keep(SET, "b.png", "crop")
    assert contents(photos) == before


def test_changes_of_several_photos_are_taken_back_in_any_order(changes: Changes, photos: Path) -> None:
    """A change gets a number of its own, also after an earlier one is gone: what it replaced is not written over."""
    off_centre("green").save(photos / "c.png")
    sent = contents(photos)
    tried(changes, "crop", "a.jpg", "b.png", "c.png")
    changes.keep(SET, "a.jpg", "crop")
    changes.keep(SET, "b.png", "crop")
    changes.undo(SET, "a.png")
    changes.keep(SET, "c.png", "crop")
    assert changes.of(SET) == {"b.png": ["crop"], "c.png": ["crop"]}
    tried(changes, "crop", "a.jpg")
    changes.keep(SET, "a.jpg", "crop")
    (photos / "a.jpg").write_bytes(b"sent since")
    with pytest.raises(BadInput, match=r"another a\.jpg was sent since"):
        changes.undo(SET, "a.png")
    (photos / "a.jpg").unlink()
    for name in ("c.png", "b.png", "a.png"):
        changes.undo(SET, name)
    assert contents(photos) == sent


def test_another_file_of_the_new_name_stays(changes: Changes, photos: Path) -> None:
    tried(changes, "crop", "a.jpg")
    (photos / "a.png").write_bytes(b"another")
    before = contents(photos)
    with pytest.raises(BadInput, match=r"a\.png is there already"):
        changes.keep(SET, "a.jpg", "crop")
    assert contents(photos) == before
