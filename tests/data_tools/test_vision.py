"""Detectors and segmenters where one is given: small random networks of the true classes."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from test_findings_of_a_set import texture
from vision_networks import write_mask2former, write_owlvit, write_own_code, write_segformer, write_yolos

from data_tools.__main__ import main
from data_tools.check import check
from data_tools.crop import CropRules, crop
from data_tools.mask import mask
from data_tools.vision import Detector, Segmenter
from finetune.core.errors import BadInput
from finetune.families.source import resolve_base

DOG = (0.8, 0.5, 0.4, 0.6)  # centre x and y, width, height: it ends at the right edge


@pytest.fixture
def wide(tmp_path: Path) -> Path:
    folder = tmp_path / "wide"
    folder.mkdir()
    texture().resize((240, 120)).save(folder / "a.png")
    return folder


@pytest.fixture(scope="module")
def detector(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_yolos(tmp_path_factory.mktemp("yolos"), DOG)


def test_a_detector_says_what_and_where(detector: Path) -> None:
    found = Detector(str(detector), ["Dog"]).find(texture())
    assert {thing.name for thing in found} == {"dog"}
    assert found[0].score > 0.9
    assert found[0].box == pytest.approx((0.6, 0.2, 1.0, 0.8), abs=1e-3)
    assert Detector(str(detector), ["face"]).find(texture()) == []


def test_a_crop_follows_the_detector_but_a_mask_decides(detector: Path, wide: Path, tmp_path: Path) -> None:
    done = crop(wide, tmp_path / "out", CropRules(64), Detector(str(detector)))
    assert (
        "cut: 50% left; 240x120 to 64x64; the subject, by the detector (dog, 100% certain)" in done.plan.steps[0].why
    )
    assert "ends at the photo's right edge" in done.plan.steps[0].why
    marked = Image.new("L", (240, 120), 0)
    marked.paste(255, (10, 10, 50, 50))
    marked.save(wide / "a.mask.png")
    done = crop(wide, tmp_path / "other", CropRules(64), Detector(str(detector)))
    assert "cut: 50% right; 240x120 to 64x64; the subject, by its mask" in done.plan.steps[0].why
    done = crop(wide, tmp_path / "none", CropRules(64), Detector(str(detector), ["face"]), dry_run=True)
    assert done.counts == {"cropped": 1}
    (wide / "a.mask.png").unlink()
    done = crop(wide, tmp_path / "none", CropRules(64), Detector(str(detector), ["face"]), dry_run=True)
    assert done.plan.steps[0].line == "a.png: not cropped (the detector finds nothing)"


def test_check_says_what_is_cut_at_an_edge(detector: Path, wide: Path) -> None:
    found = check(wide, 64, detector=Detector(str(detector), ["dog"])).files[0]
    assert "the dog is cut at the right edge (100% certain)" in found.problems
    marked = Image.new("L", (240, 120), 0)
    marked.paste(255, (0, 10, 60, 110))
    marked.save(wide / "a.mask.png")
    found = check(wide, 64).files[0]
    assert found.notes == [
        "the subject, by its mask, ends at the left edge",
        "a square crop at the middle keeps 0% of the subject, by its mask: see data crop",
    ]


def test_owl_vit_looks_for_words(tmp_path: Path) -> None:
    folder = write_owlvit(tmp_path / "owl")
    with pytest.raises(BadInput, match="--find"):
        Detector(str(folder))
    found = Detector(str(folder), ["a dog", "a cat"]).find(texture().resize((90, 60)))
    assert found
    assert {thing.name for thing in found} <= {"a dog", "a cat"}
    assert all(0 <= edge <= 1 for thing in found for edge in thing.box)


@pytest.mark.parametrize("names", [{0: "ground", 1: "dog"}, {0: "sky", 1: "dog", 2: "cat"}])
def test_a_segmenter_of_classes(names: dict[int, str], wide: Path, tmp_path: Path) -> None:
    folder = write_segformer(tmp_path / "segformer", names)
    made = Segmenter(str(folder), [] if len(names) == 2 else ["dog"]).mask(texture().resize((90, 60)))
    assert made is not None
    assert (made.shape, made.dtype) == ((60, 90), np.float32)
    assert made.min() > 0.9
    if len(names) == 3:
        with pytest.raises(BadInput, match="--find"):
            Segmenter(str(folder))
        done = mask(wide, tmp_path / "out", Segmenter(str(folder), ["cat"]))
        assert done.plan.steps[0].line == "a.png: no mask (the segmenter finds nothing)"


def test_a_missing_package_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_segformer(tmp_path / "segformer", {0: "ground", 1: "dog"})

    def needs(*_: object, **__: object) -> None:
        raise ImportError("Mask2FormerLoss requires the scipy library")

    monkeypatch.setattr("data_tools.vision.load_weights", needs)
    with pytest.raises(BadInput, match="scipy"):
        Segmenter(str(folder))


def test_a_segmenter_of_things(tmp_path: Path) -> None:
    pytest.importorskip("scipy", reason="transformers' Mask2Former needs it")
    folder = write_mask2former(tmp_path / "mask2former")
    named, best = Segmenter(str(folder), ["dog"]), Segmenter(str(folder))
    one, other = (each.mask(texture().resize((90, 60))) for each in (named, best))
    assert one is not None
    assert other is not None
    assert one.shape == other.shape == (60, 90)
    assert (one >= other).all()
    assert set(np.unique(one)) <= {0, 1}
    assert Segmenter(str(folder), ["face"]).mask(texture()) is None


def test_code_beside_the_weights_runs_only_when_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    mark = tmp_path / "ran"
    folder = write_own_code(tmp_path / "own", mark)
    photos = tmp_path / "photos"
    photos.mkdir()
    image = Image.new("RGB", (60, 40), (20, 200, 20))
    image.paste((220, 10, 10), (0, 0, 30, 40))
    image.save(photos / "a.png")
    arguments = ["mask", str(photos), str(tmp_path / "out"), "--model", str(folder)]
    assert main(arguments) == 2
    assert "--allow-code" in capsys.readouterr().err
    assert not mark.exists()
    assert main([*arguments, "--allow-code"]) == 0
    assert mark.exists()
    made = np.asarray(Image.open(tmp_path / "out" / "a.mask.png"))
    assert made.shape == (40, 60)
    assert (made[:, :27].min(), made[:, 33:].max()) > (200, 0)
    assert made[:, 33:].max() < 50


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["crop", "{photos}", "{out}", "--find", "dog"], "--detector"),
        (["mask", "{photos}", "{out}", "--find", "dog"], "--model"),
        (["mask", "{photos}", "{out}", "--allow-code"], "--model"),
        (["crop", "{photos}", "{out}", "--detector", "/nowhere"], "/nowhere"),
        (["crop", "{photos}", "{out}", "--detector", "{base}"], "config.json"),
        (["crop", "{photos}", "{out}", "--detector", "{yolos}", "--find", "cat"], "'cat'"),
        (["mask", "{photos}", "{out}", "--model", "{yolos}"], "no segmenter"),
        (["check", "{photos}", "--detector", "{clip}"], "no detector"),
    ],
)
def test_networks_that_do_not_fit_are_one_sentence(
    arguments: list[str], word: str, detector: Path, wide: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "clip").mkdir()
    (tmp_path / "clip" / "config.json").write_text(json.dumps({"model_type": "clip"}))
    places = {"photos": wide, "out": tmp_path / "out", "yolos": detector, "clip": tmp_path / "clip"}
    assert main([text.format(**places, base=resolve_base("tiny")) for text in arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert word in error
    assert not (tmp_path / "out").exists()
