"""Fine-tuning and personalisation of diffusion models, with proof.

from finetune import draw, load_recipe, open_result, train
run = train(load_recipe("dreambooth-lora", ["data.photos=photos/", "data.class_noun=dog", "base=OWNER/NAME"]))
family, about = open_result(run)
images = draw(family, [f"a photo of {about.trigger}"], seeds=[0])
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from finetune.config.load import load_recipe
    from finetune.config.recipe import Recipe
    from finetune.core.errors import BadInput, CheckFailed, Stopped
    from finetune.core.signals import Stop
    from finetune.jobs.export import export_result
    from finetune.jobs.open import open_result
    from finetune.jobs.train import resume, train
    from finetune.sampling.draw import draw
    from finetune.sampling.settings import Sampling

__version__ = "0.1.0"
__all__ = [
    "BadInput",
    "CheckFailed",
    "Recipe",
    "Sampling",
    "Stop",
    "Stopped",
    "draw",
    "export_result",
    "load_recipe",
    "open_result",
    "resume",
    "train",
]

_HOMES = {
    "BadInput": "finetune.core.errors",
    "CheckFailed": "finetune.core.errors",
    "Recipe": "finetune.config.recipe",
    "Sampling": "finetune.sampling.settings",
    "Stop": "finetune.core.signals",
    "Stopped": "finetune.core.errors",
    "draw": "finetune.sampling.draw",
    "export_result": "finetune.jobs.export",
    "load_recipe": "finetune.config.load",
    "open_result": "finetune.jobs.open",
    "resume": "finetune.jobs.train",
    "train": "finetune.jobs.train",
}


def __dir__() -> list[str]:
    """What is imported on use is listed too."""
    return sorted({*globals(), *__all__})


if not TYPE_CHECKING:  # a type checker would take every misspelled name for one of ours

    def __getattr__(name: str) -> Any:
        """Imports torch and the rest only when something that needs them is asked for (PEP 562)."""
        if name not in _HOMES:
            raise AttributeError(f"module 'finetune' has no attribute {name!r}")
        import importlib

        from finetune.core.logging import quiet_import

        with quiet_import():
            return getattr(importlib.import_module(_HOMES[name]), name)
