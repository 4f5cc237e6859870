"""The pictures of why: what differs, maps of words over their image, and the loss by noise level."""

from __future__ import annotations

import base64
import io
import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from finetune.config.load import dump_recipe, load_recipe
from finetune.core.errors import BadInput
from finetune.report import why
from finetune.report.bars import pairs_of_bars
from finetune.report.html import write_report
from finetune.report.why import difference, overlaid
from finetune.runs.timesteps import TimestepLoss, read_timestep_loss, write_timestep_loss


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """One prompt at three seeds. All but a bright left half is equal before and after; maps of two words."""
    for seed in range(3):
        for name, left in (("before", 10), ("after", 210)):
            image = Image.new("RGB", (32, 32), (10, 10, 10))
            image.paste((left, left, left), (0, 0, 16, 32))
            save(image, tmp_path / "samples" / name / f"00-{seed}.png")
        for word in range(2):
            save(Image.linear_gradient("L").resize((32, 32)), tmp_path / "attention" / f"00-{seed}-{word}.png")
    info = {"token": "zwx", "class_noun": "<i>mug", "prompts": ["a photo of zwx mug"], "resolution": 32}
    (tmp_path / "run.json").write_text(json.dumps(info))
    return tmp_path


def save(image: Image.Image, file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    image.save(file)


def section(page: str) -> str:
    return page.split("<h2>What changed, and why</h2>")[1].split("<h2>")[0]


def shown(html: str) -> list[tuple[str, Image.Image]]:
    found = re.findall(r'<img alt="([^"]*)"[^>]*base64,([^"]*)"', html)
    return [(alt, Image.open(io.BytesIO(base64.b64decode(data)))) for alt, data in found]


@pytest.mark.parametrize("first", [8, -2])
def test_the_strip_shows_one_seed(run: Path, first: int) -> None:
    """Previews have the first seed alone, and "00-10" sorts before "00-8"."""
    image = Image.new("RGB", (32, 32))
    for seed in range(first, first + 4):
        save(image, run / "samples" / "before" / f"01-{seed}.png")
    save(image, run / "samples" / "step-000010" / f"01-{first}.png")
    info = json.loads((run / "run.json").read_text(encoding="utf-8"))
    (run / "run.json").write_text(json.dumps(info | {"prompts": ["none", "a mug"]}), encoding="utf-8")
    strip = write_report(run).read_text(encoding="utf-8").split("<h2>Over the steps</h2>")[1].split("<h2>")[0]
    assert [alt for alt, _ in shown(strip)][-2:] == [f"seed {first}"] * 2


def test_each_seed_is_a_row_of_before_after_difference_and_maps(run: Path) -> None:
    images = shown(section(write_report(run).read_text(encoding="utf-8")))
    assert [alt for alt, _ in images] == [
        f"{what}, seed {seed}"
        for seed in range(2)
        for what in ("before", "after", "difference: 39%", "reads “zwx”", "reads “&lt;i&gt;mug”")
    ]  # half of the pixels differ by 200 of 255
    changed = np.asarray(images[2][1].convert("L"), dtype=int)
    assert changed[:, :70].min() > 240, "three times 200 is white"
    assert changed[:, 90:].mean() < 3


def test_an_older_run_and_a_checkpoint_have_no_maps(run: Path) -> None:
    (run / "recipe.yaml").write_text(dump_recipe(load_recipe("demo")))
    page = write_report(run, step=5, out=run / "step.html").read_text(encoding="utf-8")
    assert "What changed, and why" not in page, "no images of this step"
    for file in (run / "samples" / "after").iterdir():
        save(Image.open(file), run / "samples" / "step-000005" / file.name)
    page = write_report(run, step=5, out=run / "step.html").read_text(encoding="utf-8")
    assert len(shown(section(page))) == 6
    assert "DAAM" not in page
    for file in (run / "attention").iterdir():
        file.unlink()
    page = write_report(run).read_text(encoding="utf-8")
    assert len(shown(section(page))) == 6
    assert "DAAM" not in page


def test_what_is_missing_or_damaged_is_left_out(run: Path) -> None:
    (run / "attention" / "00-0-1.png").write_bytes(b"no image")
    (run / "samples" / "before" / "00-1.png").unlink()
    save(Image.new("RGB", (16, 16)), run / "samples" / "before" / "00-0.png")
    page = write_report(run).read_text(encoding="utf-8")
    assert "What changed, and why" not in page


def test_a_link_out_of_the_run_is_refused(run: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    secret = tmp_path_factory.mktemp("other") / "secret.png"
    save(Image.new("L", (32, 32)), secret)
    (run / "attention" / "00-0-0.png").unlink()
    (run / "attention" / "00-0-0.png").symlink_to(secret)
    with pytest.raises(BadInput, match="link that leads out"):
        write_report(run)


def test_large_images_are_made_smaller_before_they_are_compared(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("before", "after"):
        save(Image.new("RGB", (1024, 768)), run / "samples" / name / "00-0.png")
    seen: list[tuple[int, int]] = []

    def watched(one: Image.Image, other: Image.Image) -> np.ndarray:
        seen.append(one.size)
        return difference(one, other)

    monkeypatch.setattr(why, "difference", watched)
    write_report(run)
    assert seen == [(512, 384), (32, 32)]


def test_difference_and_overlay_in_numbers() -> None:
    one, other = Image.new("RGB", (4, 4), (10, 20, 30)), Image.new("RGB", (4, 4), (40, 20, 0))
    assert np.array_equal(difference(one, other), np.full((4, 4), 20.0))  # (30 + 0 + 30) / 3
    assert np.array_equal(difference(one, one), np.zeros((4, 4)))
    found = Image.new("L", (4, 4), 60)
    found.putpixel((3, 3), 200)
    shown = overlaid(Image.new("RGB", (4, 4), (100, 100, 100)), found)
    assert shown.getpixel((3, 3)) == (200, 200, 200)  # the maximum: .3 * .7 * 100 + .7 * 255, rounded
    assert shown.getpixel((0, 0)) == (56, 56, 56)  # the minimum: .8 * .7 * 100


def test_the_loss_by_noise_level(run: Path) -> None:
    assert "Loss by noise level" not in write_report(run).read_text(encoding="utf-8")
    write_timestep_loss(run, TimestepLoss(images=8, base=[1.0, 0.5]))
    assert "Loss by noise level" not in write_report(run).read_text(encoding="utf-8"), "training has not ended"
    write_timestep_loss(run, TimestepLoss(images=8, base=[1.0, 0.5], trained=[0.25, 0.75]))
    page = write_report(run).read_text(encoding="utf-8").split("<h2>Loss by noise level</h2>")[1]
    assert "It fell most at 0–50% noise, by 75%" in page
    assert "-75%</text>" in page
    assert "+50%</text>" in page


def test_bars_are_as_tall_as_their_values() -> None:
    chart = pairs_of_bars("loss", ["a", "<b>"], [1.0, 0.5], [0.25, 0.0])
    heights = [float(height) for height in re.findall(r'<rect [^>]* height="([0-9.]+)"', chart)]
    assert [round(height / heights[0], 2) for height in heights] == [1.0, 0.25, 0.5, 0.0]
    assert "<b>" not in chart


@pytest.mark.parametrize(
    "text",
    ['{"schema": 1}', '{"schema": 9, "images": 1, "base": [1]}', '{"schema": 1, "images": 1, "base": [-1]}', "{"],
)
def test_damaged_numbers_are_named(run: Path, text: str) -> None:
    (run / "timestep_loss.json").write_text(text)
    with pytest.raises(BadInput, match=r"timestep_loss\.json"):
        read_timestep_loss(run)
