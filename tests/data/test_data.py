"""Photos, captions, views and batches."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from finetune.core.batch import Latents
from finetune.core.errors import BadInput
from finetune.core.processes import Processes
from finetune.data.batches import Batches
from finetune.data.captions import Words, caption_photos
from finetune.data.crops import Crop, make_crops
from finetune.data.decoding import open_image
from finetune.data.photos import read_photo, scan
from finetune.data.samplers import Sample, ShuffleSampler


def test_exif_rotation_is_applied(tmp_path: Path) -> None:
    image = Image.new("RGB", (40, 20), "black")
    image.paste((255, 0, 0), (0, 0, 10, 20))
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate 90 degrees clockwise to show it upright
    image.save(tmp_path / "a.jpg", exif=exif, quality=95)
    photo = read_photo(tmp_path / "a.jpg")
    upright = open_image(tmp_path / "a.jpg")
    assert photo.size == upright.size == (20, 40)
    assert upright.getpixel((10, 3))[0] > 200 > 50 > upright.getpixel((10, 30))[0]


def test_transparency_goes_on_white_and_depth_is_scaled(tmp_path: Path) -> None:
    Image.new("RGBA", (8, 8), (255, 0, 0, 0)).save(tmp_path / "clear.png")
    Image.fromarray(np.full((8, 8), 32896, np.uint16)).save(tmp_path / "deep.png")
    assert open_image(tmp_path / "clear.png").getpixel((4, 4)) == (255, 255, 255)
    assert open_image(tmp_path / "deep.png").getpixel((4, 4)) == (128, 128, 128)


def test_all_bad_files_are_named_at_once(photos: Path) -> None:
    (photos / "empty.jpg").write_bytes(b"")
    (photos / "cut.png").write_bytes((photos / "0.png").read_bytes()[:60])
    (photos / "new.heic").write_bytes(b"x")
    with pytest.raises(BadInput) as caught:
        scan(photos)
    assert all(name in str(caught.value) for name in ("empty.jpg", "cut.png", "new.heic", "3 of 6"))


def test_no_folder_and_no_pictures(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="no folder"):
        scan(tmp_path / "none")
    with pytest.raises(BadInput, match="no images"):
        scan(tmp_path)


def captioned(folder: Path, mode: str = "auto", templates: tuple[str, ...] = ("a photo of {token} {noun}",)) -> list:
    return caption_photos(scan(folder), captions=mode, templates=templates, words=Words("zwx", "mug"))


def test_captions_from_files_and_templates(photos: Path) -> None:
    (photos / "0.txt").write_text("{token} {noun}\n on a chair")
    (photos / "metadata.jsonl").write_text('{"file_name": "1.png", "text": "from json"}\n')
    items = captioned(photos)
    assert [(item.captions, item.source) for item in items] == [
        (["zwx mug on a chair"], "file"),
        (["from json"], "file"),
        (["a photo of zwx mug"], "template"),
    ]
    assert {item.source for item in captioned(photos, "templates")} == {"template"}
    with pytest.raises(BadInput, match=r"2\.png"):
        captioned(photos, "files")


def test_broken_caption_files_are_named(photos: Path) -> None:
    (photos / "metadata.jsonl").write_text("not json\n")
    with pytest.raises(BadInput, match="line 1"):
        captioned(photos)
    (photos / "metadata.jsonl").unlink()
    (photos / "captions.csv").write_text("0.png,a, b\n")
    with pytest.raises(BadInput, match="two columns"):
        captioned(photos)


def test_a_centre_crop_and_its_geometry(photos: Path) -> None:
    photo = scan(photos)[0]
    (plain,) = make_crops(photo, 20, "center", 1, False, 0)
    assert plain.resized == (24, 20)
    assert plain.geometry.original == (40, 48)
    assert plain.geometry.crop == (0, 2)
    assert plain.pixels().shape == (3, 20, 20)
    wanted = open_image(photo.path).resize((24, 20), Image.Resampling.LANCZOS).crop((2, 0, 22, 20))
    assert np.array_equal(np.asarray(plain.image()), np.asarray(wanted))


def test_a_flip_mirrors_pixels_and_crop(photos: Path) -> None:
    plain, mirrored = make_crops(scan(photos)[0], 20, "center", 1, True, 0)
    assert torch.equal(plain.pixels().flip(2), mirrored.pixels())
    assert plain.key != mirrored.key


def test_random_crops_are_a_function_of_seed_and_content(photos: Path) -> None:
    photo = scan(photos)[0]
    first, again, other = (make_crops(photo, 16, "random", 6, False, seed) for seed in (0, 0, 1))
    assert first == again != other
    assert all(0 <= left <= view.resized[0] - 16 for view in first for left in [view.corner[0]])


class Held:
    """Latents by view, made from its key: what a cache gives."""

    def conditions(self, view: Crop) -> dict[str, torch.Tensor]:
        return {}

    def latents(self, view: Crop) -> Latents:
        value = torch.full((4, 2, 2), float(int(view.key[:6], 16)))
        return Latents(value, torch.ones(4, 2, 2))


def streams(folder: Path, classes: int = 5) -> list[list[Sample]]:
    photo = scan(folder)
    subject = [Sample(make_crops(p, 16, "center", 1, True, 0), ["a", "b"], 1.0, 0.3, p.path.name) for p in photo]
    other = [
        Sample(make_crops(photo[k % 3], 16, "random", 1, False, k), [f"c{k}"], 0.5, 0.0, f"c{k}")
        for k in range(classes)
    ]
    return [subject, other]


def flat(batches: list) -> list[tuple]:
    return [
        (draw, name, prompt, float(weight), float(mean[0, 0, 0]))
        for batch in batches
        for draw, name, prompt, weight, mean in zip(
            batch.keys, batch.names, batch.prompts, batch.weight, batch.latents.mean, strict=True
        )
    ]


@pytest.mark.parametrize(("accumulate", "world"), [(1, 1), (2, 1), (1, 2), (2, 2), (4, 1)])
def test_any_cut_of_a_step_is_the_same_samples(photos: Path, accumulate: int, world: int) -> None:
    whole = Batches(ShuffleSampler(streams(photos), 3, 4), Held())
    ranks = [
        Batches(ShuffleSampler(streams(photos), 3, 4), Held(), accumulate, Processes(rank, world))
        for rank in range(world)
    ]
    for step in (0, 7):
        cut = flat([ranks[rank].micro(step, index) for index in range(accumulate) for rank in range(world)])
        assert cut == flat([whole.micro(step, 0)])


def test_every_photo_once_an_epoch(photos: Path) -> None:
    batches = Batches(ShuffleSampler(streams(photos), 0, 1), Held())
    names = [batches.micro(step, 0).names for step in range(15)]
    for start in range(0, 15, 3):
        assert sorted(row[0] for row in names[start : start + 3]) == ["0.png", "1.png", "2.png"]
    for start in range(0, 15, 5):
        assert len({row[1] for row in names[start : start + 5]}) == 5


def test_weights_give_the_papers_sum(photos: Path) -> None:
    """arXiv:2208.12242 eq. 2: the subject's error + lambda * the class's; here for one pair, lambda 0.5."""
    batch = Batches(ShuffleSampler(streams(photos), 0, 1), Held()).micro(0, 0)
    errors = torch.tensor([0.8, 0.6])
    assert float((errors * batch.weight).mean()) == pytest.approx(0.8 + 0.5 * 0.6)
    alone = Batches(ShuffleSampler(streams(photos)[:1], 0, 1), Held()).micro(0, 0)
    assert alone.weight.tolist() == [1.0]


def test_caption_dropout_has_its_rate_and_its_stream(photos: Path) -> None:
    batches = Batches(ShuffleSampler(streams(photos), 0, 50), Held())
    prompts = [batch.prompts for batch in (batches.micro(step, 0) for step in range(10))]
    subject = [text for row in prompts for text in row[0::2]]
    assert 0.24 < subject.count("") / len(subject) < 0.36
    assert not any(text == "" for row in prompts for text in row[1::2])


def test_a_batch_that_cannot_be_split_is_refused(photos: Path) -> None:
    with pytest.raises(BadInput, match="multiple of 4"):
        Batches(ShuffleSampler(streams(photos), 0, 2), Held(), 2, Processes(world=2))
