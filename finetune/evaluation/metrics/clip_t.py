"""CLIP-T: do the images show what the prompt says?"""

from __future__ import annotations

import numpy as np

from finetune.evaluation.base import PromptMetric, Seen
from finetune.evaluation.statistics import Vectors, cosines


class ClipT(PromptMetric):
    """Mean cosine of CLIP's embeddings of an image and of its prompt, without the token."""

    name = "clip_t"
    place = 7
    title = "CLIP-T"
    backbone = "clip"
    higher_is_better = True
    default = True
    meaning = "obedience: how well an image fits its prompt, read without the token"
    blind = "it counts no things and ignores their order; values are low (0.2 to 0.35) and differ little"
    source = "arXiv:2208.12242, section 4; arXiv:2103.00020"

    def of_prompt(self, images: Vectors, seen: Seen, number: int) -> float:
        assert seen.texts is not None
        return float(np.mean(cosines(images, seen.texts[number : number + 1])))
