"""CLIP-I."""

from __future__ import annotations

from finetune.evaluation.base import Likeness


class ClipI(Likeness):
    """Mean cosine of CLIP's image embeddings, image by photo."""

    name = "clip_i"
    place = 4
    title = "CLIP-I"
    backbone = "clip"
    default = True
    meaning = "likeness to the photos as CLIP sees it: the same kind of thing in the same kind of scene"
    blind = "it likes the photos' backgrounds and hardly tells two things of one class apart"
    source = "arXiv:2208.12242, section 4; arXiv:2103.00020"
