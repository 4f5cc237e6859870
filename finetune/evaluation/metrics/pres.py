"""PRES: has the class turned into the subject?"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from finetune.evaluation.base import Likeness, Score, Seen
from finetune.evaluation.statistics import cosines, interval


class Pres(Likeness):
    """DINO between images of the class alone ("a photo of a dog") and the photos of the subject."""

    name = "pres"
    place = 8
    title = "PRES"
    backbone = "dino"
    higher_is_better = False
    group = "class"
    for_kinds = ("object", "live")
    default = True
    meaning = "class drift: likeness of the class without the token to the subject; compare it with the base's own"
    blind = "two dogs are always a little alike, so that it is never 0; it sees nothing of other classes"
    source = "arXiv:2208.12242, section 4.2"

    def score(self, seen: Seen) -> Score:
        """There is one prompt, so that the interval is over its images."""
        found = super().score(seen)
        values = [cosines(seen.images[k], seen.photos).mean(axis=1) for k in found.prompts]
        low, high = (interval(list(np.concatenate(values))) if values else None) or (None, None)
        return replace(found, low=low, high=high)
