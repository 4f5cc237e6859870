"""The JSON configs of a diffusers folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from finetune.core.errors import BadInput


def read_config(folder: Path, name: str) -> dict[str, Any]:
    file = folder / name
    if not file.is_file():
        raise BadInput(f"{folder} has no {name}: the base must be a diffusers folder")
    try:
        config: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        return config
    except ValueError as error:
        raise BadInput(f"{file} is no JSON ({error}): fetch the base again") from error
