"""Copies: are the images the training photos again?"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from finetune.evaluation.base import PromptMetric, Score, Seen
from finetune.evaluation.statistics import Vectors, cosines

COPY = 0.5  # Somepalli et al. count an image as replicated above this similarity (arXiv:2212.03860, section 4)


class Copies(PromptMetric):
    """The cosine of a copy-detection descriptor with the nearest photo, mean over the images."""

    name = "copies"
    place = 11
    title = "copies"
    backbone = "copy"
    higher_is_better = False
    meaning = "memorisation: similarity to the nearest photo; also the share of images above 0.5"
    blind = "it finds copies of pictures, not of a subject in another pose; mirrored photos may escape it"
    source = "arXiv:2202.10261; arXiv:2212.03860"

    def score(self, seen: Seen) -> Score:
        found = super().score(seen)
        chosen = [cosines(seen.images[k], seen.photos).max(axis=1) for k in found.prompts]
        if not chosen:
            return found
        return replace(found, extra={"share above 0.5": float(np.mean(np.concatenate(chosen) > COPY))})

    def of_prompt(self, images: Vectors, seen: Seen, number: int) -> float:
        return float(cosines(images, seen.photos).max(axis=1).mean())

    def reference(self, photos: Vectors) -> float | None:
        """Of each photo, its similarity to the nearest other one."""
        if len(photos) < 2:
            return None
        matrix = cosines(photos, photos)
        np.fill_diagonal(matrix, -np.inf)
        return float(matrix.max(axis=1).mean())
