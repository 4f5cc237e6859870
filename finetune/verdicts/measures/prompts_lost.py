"""What the images after a run do not show of its sample prompts."""

from __future__ import annotations

from typing import ClassVar

from finetune.verdicts.base import Number


class PromptsLost(Number):
    """Of the sample prompt that lost most (`finetune.verdicts.adherence`). It is measured once, after the images."""

    name: ClassVar = "prompts_lost"
    title: ClassVar = "sample prompts not followed"
    meaning: ClassVar = "how much of what a sample prompt says its images do not show; the worst of the prompts"
