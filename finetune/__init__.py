"""Fine-tuning and personalisation of diffusion models, with proof.

from finetune import load_recipe, train
train(load_recipe("dreambooth-lora", ["data.photos=photos/", "data.class_noun=dog"]))
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from finetune.config.load import load_recipe
    from finetune.jobs.train import resume, train

__version__ = "0.1.0"
__all__ = ["load_recipe", "resume", "train"]

_HOMES = {"load_recipe": "finetune.config.load", "train": "finetune.jobs.train", "resume": "finetune.jobs.train"}


if not TYPE_CHECKING:  # a type checker would take every misspelled name for one of ours

    def __getattr__(name: str) -> Any:
        """Imports torch and the rest only when something that needs them is asked for (PEP 562)."""
        if name not in _HOMES:
            raise AttributeError(f"module 'finetune' has no attribute {name!r}")
        import importlib

        return getattr(importlib.import_module(_HOMES[name]), name)
