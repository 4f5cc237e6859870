"""When a run is measured: as often as a twentieth of its time pays for."""

from __future__ import annotations

from collections.abc import Sequence

from finetune.training.priors.base import PriorSettings
from finetune.training.settings import Run
from finetune.verdicts import adherence
from finetune.verdicts.bank import LEVELS, WHOLE

SHARE = 0.05  # of the run's time
TRAINED = 3  # predictions that training on one sample costs: forward, and twice that backward (arXiv:2001.08361 2.1)
OFTEN = 10  # times in a run, if that is within the share
SELDOM = 3  # fewer show no curve, so that a short run is not measured

# How many points each set has; all are compared with the base's at the same points, so few are enough.
PHOTO_POINTS, CLASS_DRAWINGS, OTHERS, DRAWINGS = 4, 2, 8, 8
POINTS = 2 * PHOTO_POINTS + LEVELS * (3 * CLASS_DRAWINGS + 2 * OTHERS)  # the class's with three prompts each
FIRST = POINTS + PHOTO_POINTS + 2 * (LEVELS - 1) * CLASS_DRAWINGS  # and the drawings
DRAWN = 2 * DRAWINGS  # the base's own drawings, in a run whose time pays for them too
ANSWERS = adherence.predictions(2, adherence.IMAGES)  # on what images show: the default has two prompts to ask about
DRAWN_ONCE = 2 * (LEVELS - 1) * OTHERS  # for a base: the beginnings of drawings for everyday prompts
WHOLE_ONCE = 2 * WHOLE * DRAWINGS  # and whole drawings


def samples_in_step(run: Run, prior: PriorSettings) -> float:
    """The samples in a step, over all processes: photos, class images, and everything else."""
    classes = prior.class_images.share if prior.class_images is not None else 0.0
    others = prior.others.share if prior.others is not None else 0.0
    return run.batch_size * (1 + classes + others)


def due_steps(run: Run, samples: float) -> Sequence[int]:
    """The steps after which a run is measured, besides its beginning; none for a run that is not measured, as no
    sharded one is: the main process would need the others for each prediction.

    The drawings for prompts about other things are not counted: they are made once for a base.

    Args:
        run: its settings.
        samples: the number of samples in a step, over all processes.
    """
    if run.verdicts == "off" or run.shard:
        return []
    if run.verdicts_every is not None:
        return sorted({*range(run.verdicts_every, run.steps + 1, run.verdicts_every), run.steps})
    drawn = DRAWN * asks_drawings(run, samples)
    count = OFTEN if _often(run) else min(OFTEN, _affordable(run, samples, drawn, ANSWERS * asks_images(run, samples)))
    if count < SELDOM:
        return []
    return sorted({-(-run.steps * number // count) for number in range(1, count + 1)})


def asks_drawings(run: Run, samples: float) -> bool:
    """Whether the base's own drawings are among the points: not where they would leave less than SELDOM times."""
    return run.verdicts_every is not None or _often(run) or _affordable(run, samples, DRAWN) >= SELDOM


def asks_images(run: Run, samples: float) -> bool:
    """Whether the images of sample prompts are asked what they show: on the same terms, after the base's drawings."""
    if run.verdicts_every is not None or _often(run):
        return True
    return _affordable(run, samples, DRAWN * asks_drawings(run, samples), ANSWERS) >= SELDOM


def _often(run: Run) -> bool:
    return run.verdicts == "on" or run.keep_best


def _affordable(run: Run, samples: float, more: int, once: int = 0) -> int:
    """How many times a run's share pays for, with so many more points each time and at the beginning, and `once`."""
    return int((SHARE * TRAINED * samples * run.steps - FIRST - more - once) / (POINTS + more))
