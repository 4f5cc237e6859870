"""What the header of a LoRA file says: the family that it is for, and the scale of its modules."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from finetune.export.lora.diffusers import prefixes, read_header
from finetune.families.naming.clip import strip_text_model
from finetune.families.registry import FAMILIES

# how other trainers begin `ss_base_model_version` and modelspec's architecture; the first that fits counts
BEGINNINGS = (
    ("sdxl_refiner", "sdxl-refiner"), ("stable-diffusion-xl-v1-refiner", "sdxl-refiner"),
    ("sdxl", "sdxl"), ("stable-diffusion-xl", "sdxl"),
    ("sd_v1", "sd1"), ("sd_1", "sd1"), ("sd1", "sd1"), ("stable-diffusion-v1", "sd1"),
    ("sd_v2", "sd2"), ("sd_2", "sd2"), ("sd2", "sd2"), ("stable-diffusion-v2", "sd2"),
    ("sd_3", "sd3"), ("sd3", "sd3"), ("stable-diffusion-3", "sd3"), ("stable-diffusion-v3", "sd3"),
    ("flux", "flux"),
)  # fmt: skip
NAMES_A_BASE = ("modelspec.architecture", "ss_base_model_version")


def named_family(metadata: Mapping[str, str]) -> str | None:
    """The family that a file's header names; None if it names none, or one that is not supported."""
    for key in NAMES_A_BASE:
        said = metadata.get(key, "").strip().lower().removesuffix("/lora")
        for name, family in FAMILIES.items():
            labels = family.naming.labels
            known = {labels.kohya, labels.v_kohya, labels.architecture, labels.v_architecture} - {""}
            if said in {label.lower() for label in known}:
                return name
        found = next((name for beginning, name in BEGINNINGS if said.startswith(beginning)), None)
        if found in FAMILIES:
            return found
    return None


def predicts_v(metadata: Mapping[str, str]) -> bool:
    """Whether the header says that the base predicts v."""
    version = metadata.get("ss_base_model_version", "")
    return metadata.get("modelspec.prediction_type") == "v" or version in {
        family.naming.labels.v_kohya for family in FAMILIES.values() if family.naming.labels.v_kohya
    }


class HeaderScales:
    """The ranks and alphas in the header of a diffusers file (`lora_adapter_metadata`), by module."""

    def __init__(self, path: Path, metadata: Mapping[str, str], family: str) -> None:
        """Raises:
        BadInput: the header is not one that diffusers writes.
        """
        self.about = read_header(path, metadata)
        self.prefixes = prefixes(family)

    def scale(self, part: str, module: str, rank: int) -> float | None:
        """alpha / rank of a module, or alpha / sqrt(rank) for rsLoRA; None if the header does not say."""
        alpha = self._value(part, module, "alpha_pattern", "lora_alpha")
        if alpha is None:
            return None
        rooted = self.about.get(f"{self.prefixes[part]}.use_rslora") is True
        return alpha / (math.sqrt(rank) if rooted else rank)

    def rank(self, part: str, module: str) -> float | None:
        """The module's rank by the header; None if it does not say."""
        return self._value(part, module, "rank_pattern", "r")

    def _value(self, part: str, module: str, pattern: str, usual: str) -> float | None:
        """PEFT's rule: a pattern is a module's name or the end of it after a dot; `^` asks for the whole name."""
        patterns = self.about.get(f"{self.prefixes[part]}.{pattern}")
        for name, value in (patterns if isinstance(patterns, dict) else {}).items():
            wanted = strip_text_model(name.removeprefix("^"))
            if module == wanted or (not name.startswith("^") and module.endswith(f".{wanted}")):
                return _number(value)
        return _number(self.about.get(f"{self.prefixes[part]}.{usual}"))


def _number(value: Any) -> float | None:
    return float(value) if type(value) in (int, float) else None
