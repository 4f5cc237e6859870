"""A run writes maps of its words and the loss by noise level, and both are what they say."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

import finetune.jobs.train as job
from finetune.config.load import parse_recipe
from finetune.core.rng import SampleKey
from finetune.data.crops import make_crops
from finetune.jobs import timestep_loss
from finetune.jobs.prepare import Prepared, prepare
from finetune.jobs.timestep_loss import BINS, IMAGES, images_measured, losses_by_timestep, measure_trained
from finetune.runs.timesteps import read_timestep_loss


def recipe(base: Path, photos: Path, **sections: Any) -> dict[str, Any]:
    return {
        "base": {"source": str(base)},
        "data": {"photos": str(photos), "class_noun": "mug", "token": "zwx"},
        "prior": {"kind": "none"},
        "method": {"kind": "lora", "rank": 4},
        "optim": {"kind": "adamw", "lr": 1e-2},
        "run": {"steps": 12, "batch_size": 1},
        "sample": {
            "prompts": ["a photo of {token} {noun}", "a {noun}"],
            "steps": 2,
            "count": 3,
            "seed": 5,
            "batch_size": 4,
        },
        "export": {"formats": ["kohya"], "verify": "off"},
    } | sections


def test_a_run_writes_maps_and_losses(
    tiny_bases: dict[str, Path], photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Maps of both words for two seeds, none of the token for the prompt without it; the losses fell."""
    monkeypatch.setattr(timestep_loss, "SHARE", 10)  # so few steps would not pay for it
    run = job.train(parse_recipe(recipe(tiny_bases["sd1"], photos)), tmp_path / "run")
    maps = sorted(file.name for file in (run / "attention").iterdir())
    assert maps == ["00-5-0.png", "00-5-1.png", "00-6-0.png", "00-6-1.png", "01-5-1.png", "01-6-1.png"]
    with Image.open(run / "attention" / "00-6-0.png") as shown:
        assert (shown.size, shown.mode, np.asarray(shown).max()) == ((32, 32), "L", 255)
        assert "cross-attention of 'zwx' in 'a photo of zwx mug', seed 6: white is" in shown.info["parameters"]
    found = read_timestep_loss(run)
    assert found is not None
    assert (len(found.base), len(found.trained), found.images) == (BINS, BINS, IMAGES)
    assert sum(found.trained) < sum(found.base)
    page = (run / "report.html").read_text(encoding="utf-8")
    assert page.count("reads “zwx”</figcaption>") == 2
    assert page.count("reads “mug”</figcaption>") == 4
    assert "Loss by noise level" in page
    assert str(tmp_path) not in page


def test_a_base_without_cross_attention_has_no_maps(tiny_bases: dict[str, Path], photos: Path, tmp_path: Path) -> None:
    values = recipe(tiny_bases["sd3"], photos, run={"steps": 1, "batch_size": 1})
    run = job.train(parse_recipe(values), tmp_path / "run")
    assert not (run / "attention").exists()
    assert not (run / "timestep_loss.json").exists(), "a run of one step is not measured"
    assert "DAAM" not in (run / "report.html").read_text(encoding="utf-8")


def prepared(base: Path, photos: Path, **sections: Any) -> Prepared:
    return prepare(parse_recipe(recipe(base, photos, **sections)))


def test_losses_are_the_mean_squares_of_the_denoisers_errors(
    tiny_bases: dict[str, Path], photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One bin by the formulas of arXiv:2006.11239, with the UNet itself; three photos in turn for eight images."""
    made = prepared(tiny_bases["sd1"], photos)
    encodings, real = [], type(made.family.codec).encode
    monkeypatch.setattr(type(made.family.codec), "encode", lambda own, z: encodings.append(z) or real(own, z))
    monkeypatch.setenv("FINETUNE_CACHE", str(tmp_path / "cache"))
    found = losses_by_timestep(made)
    assert found == losses_by_timestep(made), "the same noise each time"
    assert len(encodings) == 3, "each photo is encoded once"
    parts: Any = made.family.parts
    text = made.family.encode_text(0, [made.captions[0][0]])["hidden"]
    errors = []
    for index in range(IMAGES):
        crop = make_crops(made.photos[index % 3], 32, "center", 1, False, 0)[0]
        noise = torch.randn((4, 16, 16), generator=SampleKey(made.recipe.run.seed, 0, index).generator("noise"))[None]
        t = int((3 + (index + 0.5) / IMAGES) / BINS * 1000)
        with torch.no_grad():
            x0 = parts["vae"].encode(crop.pixels()[None]).latent_dist.mean * parts["vae"].config.scaling_factor
            abar = diffusers.DDIMScheduler.from_pretrained(tiny_bases["sd1"] / "scheduler").alphas_cumprod[t]
            noisy = abar.sqrt() * x0 + (1 - abar).sqrt() * noise
            output = parts["denoiser"](noisy, t, encoder_hidden_states=text).sample
        errors.append(float((output - noise).square().mean()))
    assert found[3] == pytest.approx(np.mean(errors), rel=1e-4)


@pytest.mark.parametrize("name", ["sd2", "sd3", "sdxl-refiner"])
def test_every_kind_of_base_is_measured(name: str, tiny_bases: dict[str, Path], photos: Path) -> None:
    """A denoiser that returns 0 has the mean square of its target: noise, noise - x0, or between them."""
    made = prepared(tiny_bases[name], photos)
    with torch.no_grad():
        for parameter in made.family.parts["denoiser"].parameters():
            parameter.zero_()
    found = losses_by_timestep(made)
    assert len(found) == BINS
    if name == "sd2":  # v is the noise where there is none in the latents, and -x0 in pure noise
        assert found[0] == pytest.approx(1.0, rel=0.1)
        assert found[-1] != pytest.approx(found[0], rel=0.1)
    else:
        assert max(found) - min(found) < 1e-4, "every bin has the same noise and images"
        assert (found[0] > 1.05) == (name == "sd3")


@pytest.mark.parametrize(("right", "same"), [(48, True), (30, False)])
def test_a_mask_decides_what_counts(right: int, same: bool, tiny_bases: dict[str, Path], photos: Path) -> None:
    plain = losses_by_timestep(prepared(tiny_bases["sd1"], photos))
    data = {"photos": str(photos), "class_noun": "mug", "token": "zwx", "masks": "files"}
    for file in sorted(photos.glob("?.png")):
        mask = Image.new("L", (48, 40), 0)
        mask.paste(255, (0, 0, right, 40))
        mask.save(photos / f"{file.stem}.mask.png")
    masked = losses_by_timestep(prepared(tiny_bases["sd1"], photos, data=data))
    assert (masked == pytest.approx(plain, rel=1e-5)) == same


def test_what_is_not_measured(tiny_bases: dict[str, Path], photos: Path, tmp_path: Path) -> None:
    """Short runs, and runs whose base was not measured: an older version began them."""
    made = prepared(tiny_bases["sd1"], photos, run={"steps": 1_100, "batch_size": 1})
    assert images_measured(made) == IMAGES
    measure_trained(made, tmp_path)
    assert read_timestep_loss(tmp_path) is None
    for steps, images in ((9, 0), (100, 0), (400, 3), (1_000, 7), (5_000, IMAGES)):
        other = made.recipe.model_copy(update={"run": made.recipe.run.model_copy(update={"steps": steps})})
        assert images_measured(replace(made, recipe=other)) == images


def test_fewer_images_are_spread_over_each_part(
    tiny_bases: dict[str, Path], photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two images: at a quarter and three quarters of each part; 20 predictions, and no more."""
    made, times = prepared(tiny_bases["sd1"], photos), []
    kind = type(made.family)
    real = kind.predict
    monkeypatch.setattr(kind, "predict", lambda own, z, t, *rest: times.extend(t.tolist()) or real(own, z, t, *rest))
    losses_by_timestep(made, 2)
    assert sorted(times) == [int((part + place) / BINS * 1000) for part in range(BINS) for place in (0.25, 0.75)]
