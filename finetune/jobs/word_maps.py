"""Draws maps of where a run's images read its words, while the images are drawn: RUN/attention."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from finetune.core.files import replacing_folder
from finetune.jobs.prepare import Prepared
from finetune.runs.attention import SEEDS, file_of, words_of_run
from finetune.sampling.attention_maps import AttentionMap, AttentionRecorder, has_maps, words_of
from finetune.sampling.images import save_image


def recorder_of(job: Prepared, prompts: Sequence[str], seeds: Sequence[int]) -> AttentionRecorder | None:
    """Returns a recorder for images that are drawn prompt by prompt, seed by seed, or None if the base's denoiser has
    no such maps.

    It records the words of the run in the first images of each prompt.
    """
    if not has_maps(job.family):
        return None
    words = words_of_run((subject.token, subject.noun) for subject in job.subjects)
    chosen: list[tuple[str, Sequence[str]]] = []
    for prompt in prompts:
        found = words_of(job.family, prompt, words)
        chosen += [(prompt, found if place < SEEDS else []) for place in range(len(seeds))]
    return AttentionRecorder(job.family, chosen, job.recipe.sample.batch_size)


def write_maps(job: Prepared, recorder: AttentionRecorder, seeds: Sequence[int], folder: Path) -> None:
    """Writes each recorded map as a grey image of the size of the run's images; they replace `folder` as a whole.

    White is the map's own maximum, which the file's text says.
    """
    words = words_of_run((subject.token, subject.noun) for subject in job.subjects)
    with replacing_folder(folder) as temporary:
        for index, maps in enumerate(recorder.maps):
            prompt, seed = recorder.words[index][0], seeds[index % len(seeds)]
            for found in maps:
                image, peak = _grey(found, job.resolution)
                about = f"cross-attention of {found.word!r} in {prompt!r}, seed {seed}: white is {peak:.3g}"
                file = file_of(index // len(seeds), seed, words.index(found.word))
                save_image(image, temporary / file, about)


def _grey(found: AttentionMap, side: int) -> tuple[Image.Image, float]:
    """The map as an image, and its maximum."""
    values = found.at(side).numpy()
    peak = float(values.max())
    return Image.fromarray(np.round(values / (peak or 1.0) * 255).astype(np.uint8)), peak
