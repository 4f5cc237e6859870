"""What is told to a browser: sentences without the places of this machine."""

from __future__ import annotations

import re
from pathlib import Path

from finetune.core.logging import plain

PLACE = re.compile(r"(?<![\w.:/\\-])(?:~|[A-Za-z]:)?(?:[/\\][\w.@+~-]+)+[/\\]?")  # an absolute path
PLACES = {  # export format -> where its file goes, for each program
    "kohya": {
        "ComfyUI": "ComfyUI/models/loras",
        "A1111, Forge, sdnext": "stable-diffusion-webui/models/Lora",
        "InvokeAI": "the model manager: Import models",
    },
    "diffusers": {"diffusers": 'pipeline.load_lora_weights("FILE")'},
    "peft": {"peft": "PeftModel.from_pretrained(model, FOLDER)"},
    "lycoris": {"ComfyUI": "ComfyUI/models/loras", "A1111, Forge, sdnext": "stable-diffusion-webui/models/Lora"},
    "checkpoint": {
        "ComfyUI": "ComfyUI/models/checkpoints",
        "A1111, Forge, sdnext": "stable-diffusion-webui/models/Stable-diffusion",
    },
    "embedding": {
        "ComfyUI": "ComfyUI/models/embeddings; in a prompt: embedding:NAME",
        "A1111, Forge": "stable-diffusion-webui/embeddings",
    },
}  # fmt: skip
# as in finetune.verdicts.registry.MEASURES, which imports torch: a test compares them
MEASURE_TITLES = {
    "learned": "learned, on the photos",
    "held_out": "learned, on unseen views",
    "overfit": "overfit",
    "class_drift": "class drift",
    "takeover": "class became the subject",
    "elsewhere": "drift elsewhere",
    "forgotten": "other prompts forgotten",
    "prompts_lost": "sample prompts not followed",
    "empty_class": "empty prompt became the class",
    "empty_prompt": "empty prompt became the subject",
}
WITH_STRENGTH = ("lora",)  # methods whose result can be drawn with at another strength; a test compares them
VERDICTS_IN_WORDS = {
    "good": "It has learned the subject, and the rest of the model works as before.",
    "undertrained": "It has not learned enough yet.",
    "overtrained": "It learned too much from the photos: by heart, or it no longer follows prompts (overfitting).",
    "class drifted": "Other things of the same kind have changed too.",
    "base damaged": "Other things have changed too.",
}


BY_COMMAND = re.compile(r"\(it is kept: finetune export RUN --step \d+\)")
AGAIN = "train again with run.keep_best=true"


def advice_for_the_page(advice: str) -> str:
    """The advice of a verdict, where a page has a button or a field in place of a command."""
    return BY_COMMAND.sub("(it is kept)", advice).replace(AGAIN, "in a new run, write run.keep_best=true in Settings")


def without_places(text: str) -> str:
    """Returns a text in which paths inside this folder are relative, and other ones are only their last part."""
    here = str(Path.cwd())
    for own in (f"{here}/", f"{here}\\", here):
        text = text.replace(own, "")
    return PLACE.sub(lambda found: re.split(r"[/\\]", found[0].rstrip("/\\"))[-1] or found[0], plain(text))
