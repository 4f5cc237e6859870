"""`finetune demo`: the whole job on the embedded base and five pictures of a mug."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from finetune.config.load import load_recipe
from finetune.core.determinism import threads_at_most
from finetune.jobs.train import train
from finetune.runs.folder import RunFolder

LOOK = """
Look at {run}/report.html:
  1. "{thing}" is the mug of the five pictures;
  2. it stands on the beach and in the snow, where it was never photographed;
  3. "a mug" without the token is still any mug.

With your own photos (5 or so, of one thing, in different places):
  finetune dreambooth PHOTOS --class-noun dog --base stable-diffusion-v1-5/stable-diffusion-v1-5
"""


def demo_images() -> Path:
    """The demo's pictures: beside the package in a checkout, inside it in a wheel."""
    inside = Path(__file__).parents[1] / "_examples" / "subject_mug"
    return inside if inside.is_dir() else Path(__file__).parents[2] / "examples" / "subject_mug"


def run_demo(out: Path | None, say: Callable[[str], None]) -> Path:
    recipe = load_recipe("demo", [f"data.photos={demo_images()}"])
    with threads_at_most(2):  # 64-pixel tensors: more threads only wait for each other
        run = train(recipe, out, say)
    info = RunFolder(run).info
    say(LOOK.format(run=run, thing=info.trigger))
    return run
