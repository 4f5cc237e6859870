"""What started processes do in test_words.py: textual inversion and pivotal tuning, one after the other."""

from __future__ import annotations

import os
from pathlib import Path

METHODS = {
    "textual_inversion": ("method.kind=textual_inversion", "method.vectors=2", "method.norm=keep"),
    "pivotal": ("method.kind=pivotal", "method.rank=4", "method.dropout=0.1", "method.pivot=0.4"),
}
SETTINGS = (
    "data.class_noun=mug", "data.caption_dropout=0.4", "prior.kind=none", "run.steps=12", "run.batch_size=4",
    "sample.steps=1", "sample.count=1", "sample.prompts=['a {token}']", "optim.kind=adamw", "optim.lr=1e-3",
    "optim.text_lr=1e-2", "export.verify=off",
)  # fmt: skip


def work(arguments: list[str]) -> tuple[int, str]:
    """arguments: a folder, the photos, and a base; RUNS/<method> come out."""
    from finetune.core.logging import quiet, quiet_bars

    quiet()
    quiet_bars()
    import torch

    from finetune import load_recipe, train
    from finetune.core.errors import BadInput, CheckFailed

    torch.set_num_threads(1)
    out, photos, base = map(Path, arguments)
    os.environ["FINETUNE_CACHE"] = str(out / "cache")
    for name, method in METHODS.items():
        own = [f"base={base}", f"data.photos={photos}", *method, *SETTINGS]
        try:
            train(load_recipe("dreambooth-lora", own), out / "runs" / name)
        except (BadInput, CheckFailed) as error:
            return 2, str(error)
    return 0, ""
