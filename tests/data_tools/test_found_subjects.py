"""Saliency, masks and crops without weights: against brute force, and on photos whose subject is known."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw
from test_findings_of_a_set import texture

from data_tools.crop import CropRules, choose, crop
from data_tools.mask import MaskMade, full_mask, guided, mask
from data_tools.photo_set import read_set
from data_tools.segment import JOIN, OWN, Mixture, _joined, learn, segment, walk
from data_tools.subject import find_subject
from finetune.core.errors import BadInput
from finetune.data.blobs import connected, main_part, otsu, share_in_square
from finetune.data.masks import find_masks
from finetune.data.photos import scan
from finetune.data.saliency import lab_of, salient_box

COLOURS = [((200, 40, 40), (70, 120, 70)), ((240, 220, 60), (60, 70, 110)), ((40, 40, 60), (190, 180, 170))]
AT = (150, 60, 260, 200)  # of a photo of 360 x 240 pixels


def scene(number: int = 0, at: tuple[int, int, int, int] = AT) -> Image.Image:
    """An oval on a ground that is brighter at the top, both with grain."""
    front, back = COLOURS[number]
    shade = np.linspace(1.2, 0.8, 240)[:, None, None]
    image = Image.fromarray((np.full((240, 360, 3), back) * shade).clip(0, 255).astype(np.uint8))
    ImageDraw.Draw(image).ellipse(at, fill=front)
    grain = np.random.default_rng(number).normal(0, 8, (240, 360, 1))
    return Image.fromarray((np.asarray(image) + grain).clip(0, 255).astype(np.uint8))


def oval(at: tuple[int, int, int, int] = AT) -> Image.Image:
    image = Image.new("L", (360, 240), 0)
    ImageDraw.Draw(image).ellipse(at, fill=255)
    return image


def noise(seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (240, 360, 3), dtype=np.uint8))


def overlap(one: Image.Image, other: Image.Image) -> float:
    """Intersection over union."""
    first, second = np.asarray(one) > 127, np.asarray(other) > 127
    return float((first & second).sum() / (first | second).sum())


@pytest.mark.parametrize("number", range(3))
def test_a_plain_subject_is_masked_to_its_edge(number: int) -> None:
    image = scene(number)
    found = segment(image)
    assert found.clear
    made = full_mask(image, MaskMade(found.mask, (0, 0, *image.size)))
    assert made.size == image.size
    assert overlap(made, oval()) > 0.95
    box = salient_box(image)
    assert box is not None
    assert np.abs(np.array(box) * (360, 240, 360, 240) - AT).max() < 12


def test_what_has_no_subject_is_not_clear() -> None:
    assert not segment(noise()).clear
    assert salient_box(noise()) is None
    assert not segment(Image.new("RGB", (90, 60), "teal")).clear
    assert salient_box(Image.new("RGB", (90, 60), "teal")) is None


def test_a_subject_with_bars_around_its_photo(tmp_path: Path) -> None:
    image = Image.new("RGB", (360, 320))
    image.paste(scene(), (0, 40))
    image.save(tmp_path / "a.png")
    found = find_subject(read_set(tmp_path).entries[0], image, None)
    assert found.why_not == ""
    assert np.abs(np.array(found.box) * (360, 320, 360, 320) - (150, 100, 260, 240)).max() < 8


def test_lab_is_that_of_the_cie() -> None:
    image = Image.new("RGB", (3, 1))
    image.putdata([(255, 255, 255), (255, 0, 0), (0, 0, 255)])
    known = [(100, 0, 0), (53.24, 80.09, 67.20), (32.30, 79.19, -107.86)]  # Lindbloom's calculator, D65
    assert np.abs(lab_of(image)[0] - known).max() < 0.3


def test_connected_parts_as_a_search_finds_them() -> None:
    for seed in range(6):
        inside = np.random.default_rng(seed).random((9, 11)) < 0.55
        labels = connected(inside)
        assert (labels > 0).tolist() == inside.tolist()
        seen: dict[int, set[tuple[int, int]]] = {}
        for place in zip(*np.nonzero(inside), strict=True):
            part, ahead = set(), [tuple(map(int, place))]
            while ahead:
                y, x = ahead.pop()
                if not (0 <= y < 9 and 0 <= x < 11) or (y, x) in part or not inside[y, x]:
                    continue
                part.add((y, x))
                ahead += [(y + 1, x), (y - 1, x), (y, x + 1), (y, x - 1)]
            assert seen.setdefault(int(labels[place]), part) == part


def test_the_main_part_has_no_holes_and_drops_specks() -> None:
    ring = np.zeros((20, 20), dtype=bool)
    ring[3:15, 3:15] = True
    ring[6:9, 6:9] = False
    ring[18, 18] = True
    found = main_part(ring, ring.astype(float))
    assert found[3:15, 3:15].all()
    assert found.sum() == 144


def test_otsu_parts_where_the_classes_vary_least() -> None:
    draw = np.random.default_rng(0)
    values = np.concatenate([draw.normal(0.2, 0.05, 300), draw.normal(0.7, 0.1, 100)]).clip(0, 1)
    limits = np.linspace(0.01, 0.99, 500)
    within = [(values[values < at].var() * (values < at).sum() + values[values >= at].var() * (values >= at).sum())
              for at in limits if 0 < (values < at).sum() < 400]  # fmt: skip
    assert abs(otsu(values) - limits[int(np.argmin(within))]) < 0.05


def test_the_walk_solves_its_linear_system() -> None:
    draw = np.random.default_rng(1)
    lab, prior = draw.normal(0, 5, (5, 6, 3)).astype(np.float32), draw.random((5, 6)).astype(np.float32)
    matrix = np.eye(30) * OWN
    for one in range(30):
        for other in range(one):
            if abs(one // 6 - other // 6) + abs(one % 6 - other % 6) == 1:
                joined = float(_joined(lab.reshape(30, 3)[one] - lab.reshape(30, 3)[other]))
                matrix[[one, other], [other, one]] -= joined
                matrix[[one, other], [one, other]] += joined
    expected = np.linalg.solve(matrix, OWN * prior.ravel()).reshape(5, 6)
    assert np.abs(walk(lab, prior) - expected).max() < 2e-3
    assert JOIN > 0


def test_a_mixture_learns_what_it_is_given() -> None:
    draw = np.random.default_rng(2)
    groups = [draw.normal(centre, 3, (400, 3)) for centre in ((20, 0, 0), (70, 40, 10))]
    colours = np.concatenate(groups)
    found: Mixture = learn(colours, np.ones(800), None)
    nearest = [np.abs(found.centres - group.mean(0)).sum(1).argmin() for group in groups]
    assert nearest[0] != nearest[1]
    assert abs(found.weights.sum() - 1) < 1e-6
    other = Mixture(np.ones(1), np.array([[45.0, 20.0, 5.0]]), np.eye(3)[None] * 900)
    assert found.log_density(colours).mean() > other.log_density(colours).mean()
    one = Mixture(np.ones(1), np.array([[1.0, 2.0, 3.0]]), np.diag([4.0, 9.0, 1.0])[None])
    assert one.log_density(np.array([[3.0, 2.0, 3.0]]))[0] == pytest.approx(-np.log(6) - 0.5)


def test_the_guided_filter_is_its_definition() -> None:
    draw = np.random.default_rng(3)
    luma, values = draw.random((24, 30)).astype(np.float32), draw.random((24, 30)).astype(np.float32)
    gain, offset = guided(luma, luma)
    assert np.abs(gain * luma + offset - luma).max() < 0.05  # a mask that is the photo stays
    y, x, sums = 12, 15, np.zeros(2)
    for down in range(-4, 5):
        for right in range(-4, 5):
            rows, columns = slice(y + down - 4, y + down + 5), slice(x + right - 4, x + right + 5)
            guide, wanted = luma[rows, columns].astype(float), values[rows, columns].astype(float)
            slope = ((guide * wanted).mean() - guide.mean() * wanted.mean()) / (guide.var() + 1e-3)
            sums += slope, wanted.mean() - slope * guide.mean()
    gain, offset = guided(luma, values)
    assert (gain[y, x], offset[y, x]) == pytest.approx(tuple(sums / 81), rel=1e-3)


@pytest.mark.parametrize("margin", [None, 0.0, 0.3])
def test_a_crop_holds_its_subject_and_lies_as_well_as_it_can(margin: float | None) -> None:
    draw = np.random.default_rng(4)
    sizes = [(32, 32), (24, 40), (40, 24)]
    outcomes = set()
    for _ in range(300):
        width, height = (int(side) for side in draw.integers(40, 120, 2))
        left, right = sorted(draw.random(2))
        top, bottom = sorted(draw.random(2))
        box = (left * width, top * height, right * width, bottom * height)
        chosen = choose((width, height), (left, top, right, bottom), sizes, margin)
        holds = [(right - left) * width <= w * s and (bottom - top) * height <= h * s
                 for w, h in sizes for s in [min(width / w, height / h)]]  # fmt: skip
        assert (chosen is not None) == any(holds)
        outcomes.add(chosen is None)
        if chosen is None:
            continue
        window, (w, h) = chosen
        assert 0 <= window[0] <= max(0, box[0] + 1)
        assert 0 <= window[1] <= max(0, box[1] + 1)
        assert width >= window[2] >= box[2] - 1
        assert height >= window[3] >= box[3] - 1
        assert abs((window[2] - window[0]) * h - (window[3] - window[1]) * w) <= max(w, h)
        for low, high, start, end, length in ((box[0], box[2], window[0], window[2], width),
                                              (box[1], box[3], window[1], window[3], height)):  # fmt: skip
            side = end - start
            best = min(abs(place + side / 2 - (low + high) / 2) for place in range(length - side + 1))
            assert abs(start + side / 2 - (low + high) / 2) <= best + 1e-6
    assert outcomes == {True, False}


def test_what_the_square_at_the_middle_keeps() -> None:
    assert share_in_square((0.4, 0.1, 0.6, 0.9), (200, 100)) == 1
    assert share_in_square((0.0, 0.0, 0.5, 1.0), (200, 100)) == pytest.approx(0.5)
    assert share_in_square((0.0, 0.2, 1.0, 0.7), (100, 200)) == pytest.approx(0.9)
    assert share_in_square((0.24, 0.0, 0.5, 1.0), (200, 100)) == 1  # boxes are rough


@pytest.fixture
def pile(tmp_path: Path) -> Path:
    """A subject at the right, one by its mask, one too wide for a square, and noise."""
    folder = tmp_path / "pile"
    folder.mkdir()
    scene(at=(230, 60, 340, 200)).save(folder / "right.png")
    (folder / "right.txt").write_text("sks oval")
    noise(1).save(folder / "marked.png")
    oval((0, 100, 80, 180)).save(folder / "marked.mask.png")
    scene(at=(20, 80, 340, 160)).save(folder / "wide.png")
    noise(2).save(folder / "noise.png")
    return folder


def test_crops_are_around_the_subject_and_the_rest_is_named(pile: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = crop(pile, out, CropRules(96))
    lines = {step.source.name: step for step in done.plan.steps}
    assert {name: step.action for name, step in lines.items()} == {
        "right.png": "cropped", "marked.png": "cropped", "wide.png": "not cropped", "noise.png": "not cropped",
    }  # fmt: skip
    assert "cut: 33% left; 360x240 to 96x96" in lines["right.png"].why
    assert "at most 75% of the subject" in lines["wide.png"].why
    assert (out / "wide.png").read_bytes() == (pile / "wide.png").read_bytes()
    assert (out / "right.txt").read_text() == "sks oval"
    expected = scene(at=(230, 60, 340, 200)).resize((96, 96), Image.Resampling.LANCZOS, box=(120, 0, 360, 240))
    assert np.array_equal(np.asarray(Image.open(out / "right.png")), np.asarray(expected))
    left = noise(1).resize((96, 96), Image.Resampling.LANCZOS, box=(0, 0, 240, 240))
    assert np.array_equal(np.asarray(Image.open(out / "marked.png")), np.asarray(left))
    marked = oval((0, 100, 80, 180)).crop((0, 0, 240, 240)).resize((96, 96), Image.Resampling.BILINEAR)
    assert overlap(Image.open(out / "marked.mask.png"), marked) > 0.95


def test_a_margin_goes_near_and_nothing_is_enlarged(pile: Path, tmp_path: Path) -> None:
    for name in ("noise.png", "marked.png", "marked.mask.png"):
        (pile / name).unlink()
    near = crop(pile, tmp_path / "near", CropRules(96, margin=0.1))
    why = next(step.why for step in near.plan.steps if step.source.name == "right.png")
    assert "360x240 to 96x96" in why
    assert np.asarray(Image.open(tmp_path / "near" / "right.png"))[48, 48, 0] > 150
    large = crop(pile, tmp_path / "large", CropRules(512))
    why = next(step.why for step in large.plan.steps if step.source.name == "right.png")
    assert "360x240 to 240x240; smaller than 512x512" in why
    assert Image.open(tmp_path / "large" / "right.png").size == (240, 240)
    (pile / "right.png").unlink()
    wide = crop(pile, tmp_path / "wide", CropRules(96, shape="buckets"))
    assert next(step.action for step in wide.plan.steps if step.source.name == "wide.png") == "cropped"


def test_bad_rules_of_a_crop_are_one_sentence(pile: Path, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="margin"):
        crop(pile, tmp_path / "out", CropRules(96, margin=-1))
    with pytest.raises(BadInput, match="'gif' is unknown"):
        crop(pile, tmp_path / "out", CropRules(96, saved="gif"))


def test_masks_are_what_training_reads(pile: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    clear = scene(1).convert("RGBA")
    clear.putalpha(oval())
    clear.save(pile / "clear.png")
    done = mask(pile, out)
    actions = {step.source.stem: step.action for step in done.plan.steps}
    assert actions == {"clear": "copied", "marked": "copied", "noise": "no mask", "right": "masked", "wide": "masked"}
    found = find_masks(out, scan(out), "auto")
    assert sorted(path.stem for path in found) == ["clear", "marked", "right", "wide"]
    assert overlap(found[out / "right.png"].open(), oval((230, 60, 340, 200))) > 0.95
    assert (out / "right.png").read_bytes() == (pile / "right.png").read_bytes()
    texture().save(pile / "right.jpg")
    with pytest.raises(BadInput, match="'right'"):
        mask(pile, tmp_path / "other")
