"""The part of the page that shows what training did, and why: differences, maps of words, and the loss by timestep."""

from __future__ import annotations

from collections.abc import Iterator
from html import escape
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from finetune.data.decoding import BadImage
from finetune.report.bars import pairs_of_bars
from finetune.report.pictures import image_tag, readable, seed_in
from finetune.runs.attention import FOLDER, SEEDS, file_of, words_of_run
from finetune.runs.record import RunRecord
from finetune.runs.timesteps import read_timestep_loss

LARGEST = 512  # pixels: sides are made smaller before pixels become numbers
GAIN = 3  # the difference is shown so many times as bright: most differences are small
DIM = 0.7  # of the image's brightness under a map
# black, blue, red, yellow, white: the colours of low to high values, in equal steps
HEAT = ((0, 0, 0), (40, 30, 140), (210, 40, 60), (255, 200, 50), (255, 255, 255))


def pictures_of_why(path: Path, info: RunRecord, after: Path, finished: bool) -> str:
    """Returns the section with images before and after, what differs, and which places read the run's words; empty
    without images. A run of an older version has no maps, nor have bases without a UNet.

    Args:
        after: the folder with the images after training, or after a step of it.
        finished: whether they are the run's own result, to which its maps belong.
    """
    rows = [
        f"<p class=prompt>{escape(prompt)}</p>{shown}"
        for number, prompt in enumerate(info.prompts)
        if (shown := "".join(_rows(path, info, after / f"{number:02d}-", finished)))
    ]
    if not rows:
        return ""
    maps = (
        " The maps show which places of the image read a word: the cross-attention to it, the mean over layers, heads "
        "and steps (DAAM, arXiv:2210.04885). Colours go from each map's own minimum (dark) to its maximum (white), "
        "so they show where, not how much."
    )
    has_maps = finished and any((path / FOLDER).glob("*.png"))
    return (
        "<h2>What changed, and why</h2><p class=soft>Each row is one seed. The difference is bright where the image "
        f"changed (amplified {GAIN} times). Its number is the mean over all pixels, in percent of the largest "
        "possible difference."
        f"{maps if has_maps else ''}</p><div class=card>{''.join(rows)}</div>"
    )


def _rows(path: Path, info: RunRecord, start: Path, finished: bool) -> Iterator[str]:
    """A row of figures for each of the first seeds of a prompt; `start`: of the names of its images after training."""
    for file in sorted(start.parent.glob(f"{start.name}*.png"), key=seed_in)[:SEEDS]:
        before = _read(path / "samples" / "before" / file.name, path)
        after = _read(file, path)
        if before is None or after is None or before.size != after.size:
            continue
        seed, changed = seed_in(file), difference(before, after)
        share = changed.mean() / 255
        figures = [
            _figure(before, "before", seed),
            _figure(after, "after", seed),
            _figure(_image(GAIN * changed), f"difference: {share:.0%}", seed),
        ]
        figures += _maps(path, info, file, after) if finished else []
        yield f'<div class=strip style="--columns:{len(figures)}">{"".join(figures)}</div>'


def _maps(path: Path, info: RunRecord, file: Path, image: Image.Image) -> Iterator[str]:
    """A figure for each map of an image."""
    subjects = [(each.token, each.class_noun) for each in info.subjects] or [(info.token, info.class_noun)]
    number = int(file.stem.split("-", 1)[0])
    for index, word in enumerate(words_of_run(subjects)):
        found = _read(path / FOLDER / file_of(number, seed_in(file), index), path)
        if found is not None:
            yield _figure(overlaid(image, found), f"reads “{word}”", seed_in(file))


def _figure(image: Image.Image, caption: str, seed: int) -> str:
    shown = image_tag(image, f"{caption}, seed {seed}")
    return f"<figure>{shown}<figcaption>{escape(caption)}</figcaption></figure>"


def _read(file: Path, run: Path) -> Image.Image | None:
    """An image of the run, RGB, made smaller if it is large; None if it is missing or can't be read.

    Raises:
        BadInput: the file is a link that leads out of the run folder.
    """
    if not file.is_file():
        return None
    try:  # the rest of the page says what can't be read
        shown = readable(file, run).convert("RGB")
    except BadImage:
        return None
    shown.thumbnail((LARGEST, LARGEST))
    return shown


def difference(before: Image.Image, after: Image.Image) -> NDArray[np.float64]:
    """Returns the absolute difference of two RGB images, the mean over their channels: [height, width], 0 to 255."""
    mean: NDArray[np.float64] = np.abs(_values(before) - _values(after)).mean(-1)
    return mean


def overlaid(image: Image.Image, found: Image.Image) -> Image.Image:
    """Returns a map in colours, from its minimum to its maximum, over a darker, grey copy of its image.

    The map may be of another size.
    """
    heat = _values(found.resize(image.size, Image.Resampling.BICUBIC).convert("L"))
    heat = (heat - heat.min()) / max(1.0, heat.max() - heat.min())
    steps = np.linspace(0, 1, len(HEAT))
    colours = np.stack([np.interp(heat, steps, [colour[c] for colour in HEAT]) for c in range(3)], -1)
    grey = DIM * np.repeat(_values(image.convert("L"))[:, :, None], 3, -1)
    share = (0.2 + 0.5 * heat)[:, :, None]
    return _image((1 - share) * grey + share * colours)


def _image(values: NDArray[np.float64]) -> Image.Image:
    """An image of values from 0 to 255, grey or in colours; larger ones are white."""
    return Image.fromarray(np.round(values).clip(0, 255).astype(np.uint8))


def _values(image: Image.Image) -> NDArray[np.float64]:
    return np.asarray(image, dtype=np.float64)


def loss_by_timestep(path: Path) -> str:
    """Returns the chart of the loss in each part of the noise levels, before and after; empty for a run without it.

    Raises:
        BadInput: the file of its numbers is damaged.
    """
    found = read_timestep_loss(path)
    if found is None or not found.trained:
        return ""
    count = len(found.base)
    names = [f"{100 * k // count}–{100 * (k + 1) // count}%" for k in range(count)]
    change = [after / max(before, 1e-12) - 1 for before, after in zip(found.base, found.trained, strict=True)]
    best = min(range(count), key=lambda k: change[k])
    fell = f"It fell most at {names[best]} noise, by {-change[best]:.0%}."
    said = fell if change[best] < 0 else "It did not fall at any noise level."
    return (
        "<h2>Loss by noise level</h2><div class=card>"
        + pairs_of_bars("loss", names, found.base, found.trained)
        + f"<p class=soft>The loss on {found.images} crops of the photos, with the same noise before (grey) and after "
        f"(blue) training, from hardly any noise (left) to pure noise (right). {said} High noise levels decide layout "
        "and large shapes, low ones the details.</p></div>"
    )
