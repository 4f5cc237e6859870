"""Optimisers by kind, and the learning rate as a pure function of the step."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from finetune.optim.adamw import AdamW
from finetune.optim.adamw8bit import AdamW8bit

Optim = Annotated[AdamW | AdamW8bit, Field(discriminator="kind")]
