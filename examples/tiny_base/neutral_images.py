"""Draws the tiny base's images of everything else, which the package brings so that nobody waits for them.

    python examples/tiny_base/neutral_images.py    # writes finetune/tiny_base/neutral_images.zip

They have the settings of the recipe `demo`, which are those of the profile for this base. Draw them anew when the base
or those settings change: with others they are left alone, and each user draws his own.
"""

from __future__ import annotations

import os
import tempfile
from dataclasses import replace

os.environ.setdefault("OMP_NUM_THREADS", "1")

from finetune.config.load import load_recipe
from finetune.core.determinism import threads_at_most
from finetune.jobs.class_sets import class_images
from finetune.jobs.demo import demo_images
from finetune.jobs.prepare import other_set, prepare
from finetune.jobs.ready_made import READY_MADE, pack_images


def main() -> None:
    job = prepare(load_recipe("demo", [f"data.photos={demo_images()}", "data.class_noun=mug"]))
    wanted = other_set(job)
    assert wanted is not None
    file = job.family.folder / READY_MADE
    with tempfile.TemporaryDirectory() as cache, threads_at_most(2):
        os.environ["FINETUNE_CACHE"] = cache
        drawn = replace(wanted, ready_made=None)
        names = [image.path.name for image in class_images(job.family, drawn)]
        pack_images(drawn.folder, file, names)
    print(f"{len(names)} images in {file}: {file.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
