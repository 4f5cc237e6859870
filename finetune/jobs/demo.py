"""`finetune demo`: a whole run on the built-in tiny base, with five photos of a mug."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from finetune.config.load import load_recipe
from finetune.config.recipes import examples
from finetune.core.determinism import threads_at_most
from finetune.jobs.train import train
from finetune.runs.folder import RunFolder

LOOK = """
Look at {run}/report.html, and compare before and after:
  1. "{thing}": is it pink with orange stripes and a purple square, as the mug of the five images?
  2. The beach and the snow, which no image shows: does the same mug stand there?
  3. "a mug" without the token: other mugs, as before.

With your own photos (about 5 of one subject, in different places) take a real base; this one is a toy:
  finetune dreambooth PHOTOS --class-noun dog --base stable-diffusion-v1-5/stable-diffusion-v1-5
"""


def demo_images() -> Path:
    """Returns the folder of the demo's images."""
    return examples() / "subject_mug"


def run_demo(out: Path | None, say: Callable[[str], None]) -> Path:
    """Trains the demo recipe and returns the run folder: `out`, or a new one in runs/.

    `say` gets lines of text for the user. Raises as `finetune.jobs.train.train`.
    """
    recipe = load_recipe("demo", [f"data.photos={demo_images()}", "data.class_noun=mug"])
    with threads_at_most(2):  # with so small a base, more threads only wait for each other
        run = train(recipe, out, say)
    info = RunFolder(run).info
    say(LOOK.format(run=run, thing=info.trigger))
    return run
