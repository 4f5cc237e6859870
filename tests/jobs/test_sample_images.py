"""`finetune sample` where the base reads images: against diffusers, what is recorded, what is refused."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from conftest import write_companions, write_photos
from PIL import Image, ImageOps

from finetune.cli.main import run as finetune
from finetune.config.load import parse_recipe
from finetune.core.errors import BadInput
from finetune.families.schedulers import make_scheduler
from finetune.jobs import train as job
from finetune.jobs.prepare import prepare

CASES = {"inpaint": ("sd1", "inpaint"), "depth": ("sd2", "depth"), "edit": ("sd1", "edit")}
NEEDED = {"inpaint": ("image", "mask"), "depth": ("depth",), "edit": ("image",)}
STEPS = ("--steps", "3", "--count", "1", "--seed", "4")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("given")
    made = np.random.default_rng(4)
    mask = Image.new("L", (32, 32))
    mask.paste(255, (8, 4, 28, 20))
    steps = np.add.outer(np.arange(32), 3 * np.arange(32)).astype(np.uint8)
    images = {
        "image": Image.fromarray(made.integers(0, 256, (32, 32, 3), dtype=np.uint8)),
        "mask": mask,
        "depth": Image.fromarray(steps),
    }
    for name, image in images.items():
        image.save(folder / f"{name}.png")
    return {name: folder / f"{name}.png" for name in images}


@pytest.fixture(scope="module")
def runs(
    wide_bases: dict, tiny_bases: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Path]:
    """Kind -> a short run on a small base that reads it; trained when it is first asked for."""
    root = tmp_path_factory.mktemp("runs")
    photos = write_companions(write_photos(root / "photos"))

    def run(kind: str) -> Path:
        if not (root / kind).exists():
            recipe = {
                "base": str(tiny_bases["sd1"] if kind == "plain" else wide_bases[CASES[kind]]),
                "data": {"photos": str(photos), "class_noun": "mug", "token": "zwx"},
                "method": {"kind": "lora", "rank": 2},
                "optim": {"kind": "adamw", "lr": 0.05},
                "run": {"steps": 2},
                "sample": {"count": 1, "steps": 1, "guidance": 3.0, "prompts": ["a photo of {token} {noun}"]},
                "export": {"dtype": "fp32"},
            }
            job.train(parse_recipe(recipe), root / kind)
        return root / kind

    return run


def options(names: tuple[str, ...], files: dict[str, Path]) -> list[str]:
    return [word for name in names for word in (f"--{name}", str(files[name]))]


def levels(image: Image.Image) -> np.ndarray:
    return np.asarray(image.convert("RGB"), dtype=int)


def theirs(kind: str, base: Path, lora: Path, files: dict[str, Path]) -> Image.Image:
    """What diffusers draws with the exported file."""
    left_out = {"depth_estimator": None, "feature_extractor": None} if kind == "depth" else {}
    names = {"inpaint": "Inpaint", "depth": "Depth2Img", "edit": "InstructPix2Pix"}
    pipeline = getattr(diffusers, f"StableDiffusion{names[kind]}Pipeline").from_pretrained(base, **left_out)
    pipeline.scheduler = make_scheduler(pipeline.scheduler, "dpm++")
    pipeline.set_progress_bar_config(disable=True)
    pipeline.load_lora_weights(lora.parent, weight_name=lora.name)
    image = Image.open(files["image"])
    depth = torch.from_numpy(np.asarray(Image.open(files["depth"]), dtype=np.float32))[None]
    more = {
        "inpaint": {"image": image, "mask_image": Image.open(files["mask"]), "width": 32, "height": 32},
        "depth": {"image": image, "depth_map": depth},
        "edit": {"image": image, "image_guidance_scale": 1.3},
    }[kind]
    return pipeline(
        "a zwx mug", negative_prompt="", num_inference_steps=3, guidance_scale=3.0,
        generator=torch.Generator().manual_seed(4), **more,
    ).images[0]  # fmt: skip


@pytest.mark.parametrize("kind", CASES)
@pytest.mark.slow
def test_the_command_draws_what_diffusers_draws_with_the_export(
    kind: str, runs: Callable[[str], Path], wide_bases: dict, files: dict[str, Path], tmp_path: Path
) -> None:
    """From the run and from its file; the guidance is the run's own."""
    run = runs(kind)
    given = options(NEEDED[kind], files)
    given += {"edit": ["--image-guidance", "1.3"], "depth": options(("image",), files)}.get(kind, [])
    words = ["sample", str(run), "-p", "a {token} {noun}", *STEPS, *given, "--out", str(tmp_path / "a")]
    assert finetune(words) == (0, "")
    file, base = run / "exports" / "run.safetensors", wide_bases[CASES[kind]]
    words = ["sample", str(file), "--base", str(base), "-p", "a zwx mug", *STEPS, *given, "--guidance", "3", "--out"]
    assert finetune([*words, str(tmp_path / "b")]) == (0, "")
    wanted = levels(theirs(kind, base, file, files))
    for drawn in (tmp_path / "a", tmp_path / "b"):
        assert np.abs(levels(Image.open(drawn / "00-4.png")) - wanted).max() <= 1


@pytest.mark.parametrize("kind", CASES)
@pytest.mark.slow
def test_images_say_what_they_were_drawn_from(
    kind: str, runs: Callable[[str], Path], files: dict[str, Path], tmp_path: Path
) -> None:
    """The file's SHA-256 and no folder; the grid begins with what was read."""
    words = ["sample", str(runs(kind)), "-p", "a mug", *STEPS, "--out", str(tmp_path), *options(NEEDED[kind], files)]
    assert finetune(words) == (0, "")
    said = Image.open(tmp_path / "00-4.png").info["parameters"]
    for name in ("image", "mask", "depth"):
        hashed = f"{name.capitalize()} SHA-256: {hashlib.sha256(files[name].read_bytes()).hexdigest()}"
        assert (hashed in said) == (name in NEEDED[kind])
    assert ("Image CFG scale: 1.5" in said) == (kind == "edit")
    assert str(files["image"].parent) not in said
    page = Image.open(tmp_path / "grid.png")
    read = NEEDED[kind]
    assert page.size == (32 * (len(read) + 1), 48)
    cells = [levels(page.crop((32 * n, 16, 32 * n + 32, 48))) for n in range(len(read) + 1)]
    for cell, name in zip(cells, read, strict=False):
        wanted = levels(Image.open(files[name]))
        if name == "depth":  # stretched over all levels
            wanted = np.rint((wanted - wanted.min()) / (wanted.max() - wanted.min()) * 255)
        assert np.abs(cell - wanted).max() <= 1
    assert np.array_equal(cells[-1], levels(Image.open(tmp_path / "00-4.png")))


@pytest.mark.parametrize("kind", CASES)
def test_a_page_shows_what_its_images_were_drawn_from(kind: str, runs: Callable[[str], Path]) -> None:
    run = runs(kind)
    record = json.loads((run / "run.json").read_text())
    assert tuple(record["reads"]) == NEEDED[kind]
    page = (run / "report.html").read_text()
    for name, alt in (("image", "the image"), ("mask", "the mask: white"), ("depth", "the depth map: near")):
        read = name in NEEDED[kind]
        assert (f'<img alt="{alt}' in page) == read
        assert (f"--{name} {name}.png" in page) == read
        assert (run / "samples" / "after" / f"input-{name}.png").is_file() == read
    assert page.index("All of them are drawn from") < page.index("<h3>before</h3>") < page.index("<h3>after</h3>")
    with Image.open(run / "samples" / "after" / "00-0.png") as image:
        assert "SHA-256: " in image.info["parameters"]
        assert str(run.parent) not in image.info["parameters"]


def test_a_page_of_a_plain_base_has_no_such_line(tiny_bases: dict[str, Path], photos: Path, tmp_path: Path) -> None:
    recipe = {
        "base": str(tiny_bases["sd1"]), "data": {"photos": str(photos), "class_noun": "mug"},
        "method": {"kind": "lora", "rank": 2}, "optim": {"kind": "adamw"}, "run": {"steps": 1},
        "sample": {"count": 1, "steps": 1, "prompts": ["a {noun}"]},
    }  # fmt: skip
    run = job.train(parse_recipe(recipe), tmp_path / "run")
    page = (run / "report.html").read_text()
    assert "All of them are drawn from" not in page
    assert "--image" not in page
    assert [file.name for file in (run / "samples" / "after").iterdir()] == ["00-0.png"]


def named(base: Path, photos: Path, sample: dict[str, str], steps: int = 2) -> dict[str, Any]:
    """A recipe whose images are drawn from files that it names."""
    return {
        "base": str(base),
        "data": {"photos": str(photos), "class_noun": "mug", "token": "zwx"},
        "method": {"kind": "lora", "rank": 2},
        "optim": {"kind": "adamw"},
        "run": {"steps": steps, "checkpoint_every": 1},
        "sample": {"count": 1, "steps": 1, "prompts": ["a {noun}"], **sample},
    }


@pytest.mark.slow
def test_a_run_draws_from_the_files_that_its_recipe_names(
    wide_bases: dict, files: dict[str, Path], photos: Path, tmp_path: Path
) -> None:
    """They are shown and recorded; moved ones are the same, others are refused."""
    own = {name: shutil.copy(files[name], tmp_path / f"{name}.png") for name in ("image", "mask")}
    recipe = named(wide_bases["sd1", "inpaint"], photos, {name: str(path) for name, path in own.items()})
    run = job.train(parse_recipe(recipe), tmp_path / "run")
    for name, path in own.items():
        shown = Image.open(run / "samples" / "after" / f"input-{name}.png")
        assert np.array_equal(levels(shown), levels(Image.open(path)))
        said = Image.open(run / "samples" / "after" / "00-0.png").info["parameters"]
        assert f"{name.capitalize()} SHA-256: {hashlib.sha256(path.read_bytes()).hexdigest()}" in said
    record = json.loads((run / "run.json").read_text())
    assert record["plan"]["images drawn from"] == ["image: image.png", "mask: mask.png"]
    assert "image.png" not in (run / "report.html").read_text().partition("Next steps")[0]
    moved = {name: str(path.rename(tmp_path / f"moved-{name}.png")) for name, path in own.items()}
    longer = named(wide_bases["sd1", "inpaint"], photos, moved, steps=3)
    job.train(parse_recipe(longer), run)
    ImageOps.mirror(Image.open(moved["image"])).save(moved["image"])
    with pytest.raises(BadInput, match=r"other inputs \(sample\.image changed\)"):
        job.train(parse_recipe(named(wide_bases["sd1", "inpaint"], photos, moved, steps=4)), run)


@pytest.mark.parametrize(
    ("kind", "sample", "said"),
    [
        ("plain", ("image",), r"sample\.image is .* draws from a prompt alone"),
        ("inpaint", ("image",), r"sample\.mask is missing"),
        ("depth", ("depth", "mask"), r"sample\.mask is .* leave it out"),
        ("edit", ("nowhere",), r"sample\.image .*nowhere\.png can't be used: No such file"),
    ],
)
def test_a_recipe_names_no_files_in_vain(
    kind: str, sample: tuple[str, ...], said: str, tiny_bases: dict, wide_bases: dict, files: dict[str, Path],
    photos: Path,
) -> None:  # fmt: skip
    write_companions(photos)
    base = tiny_bases["sd1"] if kind == "plain" else wide_bases[CASES[kind]]
    given = {"image": "/nowhere.png"} if sample == ("nowhere",) else {name: str(files[name]) for name in sample}
    with pytest.raises(BadInput, match=said) as caught:
        prepare(parse_recipe(named(base, photos, given)))
    assert "\n" not in str(caught.value)


def header_of_a_huge_png() -> bytes:
    """A PNG that says it has 60,000 x 60,000 pixels, and holds none."""
    size = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    chunks = ((b"IHDR", size), (b"IDAT", zlib.compress(b"")), (b"IEND", b""))
    packed = [
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in chunks
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(packed)


def corner_mask() -> Image.Image:
    """White only at the left edge, which the crop in the middle leaves out."""
    mask = Image.new("L", (96, 32))
    mask.paste(255, (0, 0, 16, 32))
    return mask


def spoilt(folder: Path, files: dict[str, Path]) -> dict[str, Path]:
    """Files that can't be used, by name."""
    images = {
        "black.png": Image.new("L", (32, 32)), "faint.png": Image.new("L", (32, 32), 1),
        "wide.png": Image.new("L", (64, 32), 255), "wide_rgb.png": Image.new("RGB", (96, 32), "red"),
        "corner.png": corner_mask(), "flat.png": Image.new("L", (32, 32), 9), "little.png": Image.new("RGB", (8, 8)),
        "strip.png": Image.new("RGB", (4000, 16)),
    }  # fmt: skip
    for name, image in images.items():
        image.save(folder / name)
    holes = np.full((32, 32), np.nan, dtype=np.float32)
    holes[:16] = np.arange(32)
    Image.fromarray(holes).save(folder / "holes.tiff")
    (folder / "text.png").write_text("no image at all")
    (folder / "empty.png").write_bytes(b"")
    (folder / "huge.png").write_bytes(header_of_a_huge_png())
    (folder / "cut.png").write_bytes(files["image"].read_bytes()[:900])
    (folder / "script.eps").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 32 32\nshowpage\n")
    (folder / "folder.png").mkdir()
    os.mkfifo(folder / "pipe.png")
    return {file.name: file for file in folder.iterdir()}


IMAGE, MASK, DEPTH = ("--image", "image"), ("--mask", "mask"), ("--depth", "depth")
# what is sampled, the options, and the words of the sentence
BAD: dict[str, tuple[str, tuple[str, ...], tuple[str, ...]]] = {
    "inpainting from nothing": ("inpaint", (), ("an image and a mask", "--image is missing")),
    "inpainting without a mask": ("inpaint", IMAGE, ("--mask is missing", "white where it is painted anew")),
    "a mask without its image": ("inpaint", MASK, ("--image is missing",)),
    "a depth map to inpaint": ("inpaint", (*IMAGE, *MASK, *DEPTH), ("--depth is", "an image and a mask", "leave it")),
    "depth from nothing": ("depth", (), ("--depth is missing", "near is bright")),
    "depth from an image alone": ("depth", IMAGE, ("--depth is missing", "depth estimator")),
    "a mask for a depth base": ("depth", (*DEPTH, *MASK), ("--mask is", "a depth map and an image", "leave it out")),
    "editing nothing": ("edit", (), ("--image is missing", "it starts from")),
    "a mask for an edit": ("edit", (*IMAGE, *MASK), ("--mask is", "draws from an image", "leave it out")),
    "an image for a plain base": ("plain", IMAGE, ("--image is", "sd1", "a prompt alone", "inpainting")),
    "a strength for a plain base": ("plain", ("--strength", "0"), ("--strength is 0.0", "a prompt alone")),
    "no such image": ("edit", ("--image", "/nowhere.png"), ("--image /nowhere.png", "No such file")),
    "a folder as image": ("edit", ("--image", "folder.png"), ("not a regular file",)),
    "a pipe as image": ("edit", ("--image", "pipe.png"), ("not a regular file",)),
    "text as image": ("edit", ("--image", "text.png"), ("--image", "text.png", "not an image")),
    "an empty image": ("edit", ("--image", "empty.png"), ("empty file",)),
    "a cut image": ("edit", ("--image", "cut.png"), ("cut.png", "truncated")),
    "a bomb": ("edit", ("--image", "huge.png"), ("more than",)),
    "a PostScript program": ("edit", ("--image", "script.eps"), ("not an image",)),
    "a little image": ("edit", ("--image", "little.png"), ("8x8 pixels is too small",)),
    "a strip": ("edit", ("--image", "strip.png"), ("4000x16", "crop it")),
    "text as mask": ("inpaint", (*IMAGE, "--mask", "text.png"), ("--mask", "not an image")),
    "a black mask": ("inpaint", (*IMAGE, "--mask", "black.png"), ("black.png is white nowhere", "0 of 255")),
    "a mask of zeros and ones": ("inpaint", (*IMAGE, "--mask", "faint.png"), ("white nowhere", "1 of 255")),
    "a mask of another shape": ("inpaint", (*IMAGE, "--mask", "wide.png"), ("64x32", "image.png is 32x32", "aspect")),
    "a mask that is cropped away": (
        "inpaint", ("--image", "wide_rgb.png", "--mask", "corner.png"), ("white nowhere", "in what is drawn"),
    ),
    "a flat depth map": ("depth", ("--depth", "flat.png"), ("9 everywhere", "no depth")),
    "a depth map with holes": ("depth", ("--depth", "holes.tiff"), ("no finite numbers",)),
    "a depth map of another shape": ("depth", (*IMAGE, "--depth", "wide.png"), ("64x32", "aspect ratio")),
    "image guidance below 1": ("edit", (*IMAGE, "--image-guidance", "0.5"), ("is 0.5", "such as 1.5")),
    "image guidance that is no number": ("edit", (*IMAGE, "--image-guidance", "nan"), ("nan", "such as 1.5")),
    "image guidance without guidance": (
        "edit", (*IMAGE, "--image-guidance", "2", "--guidance", "1"), ("--guidance is 1.0", "switches both"),
    ),
    "image guidance for a mask": ("inpaint", (*IMAGE, *MASK, "--image-guidance", "2"), ("--image-guidance is 2.0",)),
    "strength 0": ("inpaint", (*IMAGE, *MASK, "--strength", "0"), ("--strength is 0.0", "above 0")),
    "strength above 1": ("inpaint", (*IMAGE, *MASK, "--strength", "1.5"), ("--strength is 1.5", "1 at most")),
    "strength that is no number": ("inpaint", (*IMAGE, *MASK, "--strength", "nan"), ("--strength is nan",)),
    "strength that leaves no step": (
        "inpaint", (*IMAGE, *MASK, "--strength", "0.3"), ("none of the 3 steps", "at least 0.34"),
    ),
    "strength without an image": ("depth", (*DEPTH, "--strength", "0.5"), ("--image is missing", "no effect")),
    "strength of an edit": ("edit", (*IMAGE, "--strength", "0.5"), ("--strength is 0.5", "leave it out")),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input_gets_one_sentence_and_leaves_nothing(
    name: str, runs: Callable[[str], Path], files: dict[str, Path], tmp_path: Path
) -> None:
    kind, given, said = BAD[name]
    (tmp_path / "files").mkdir()
    known = {key: str(file) for key, file in (spoilt(tmp_path / "files", files) | files).items()}
    words = ["sample", str(runs(kind)), "-p", "a mug", *STEPS, *[known.get(word, word) for word in given]]
    code, message = finetune([*words, "--out", str(tmp_path / "out")])
    assert code == 2, message
    assert message.startswith("error: ")
    assert "\n" not in message
    assert "Traceback" not in message
    missing = [word for word in said if word not in message]
    assert not missing, message
    assert not (tmp_path / "out").exists()
