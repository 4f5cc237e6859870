"""How well each UI reads a LoRA file without faults, by its family and its kind of keys.

SD1, SD2, SDXL, Flux and SD3.5 medium were run against the loaders (docs/exports.md). What holds for a whole family
stands in its `Readers`; here is what depends on a file's own keys.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

from finetune.adapters.bases import LONE_ENCODER, MISNAMED_ENCODER
from finetune.adapters.faults import UIS
from finetune.families.naming.base import Verdict
from finetune.families.registry import FAMILIES

FORGE_LIMIT = 12  # with more unmatched keys, Forge ignores the whole file
FULLY: Verdict = ("fully", "")
UNETS = ("sd1", "sd2", "sdxl")
TO_KOHYA = "convert it to kohya"
LOST_BY_A1111 = "lora_unet_up_blocks_0_upsamplers_0_conv"  # of SDXL, under diffusers' name
UNET_DIFFUSERS: tuple[Verdict, ...] = (
    ("partly", f"it matches only some of these keys (measured on SDXL: 24 of 56): {TO_KOHYA}"),
    ("refused", f"it does not read these keys: {TO_KOHYA}"),
    ("unknown", f"not established for these keys: {TO_KOHYA}"),
    ("refused", f"it has no loader for these keys: {TO_KOHYA}"),
    ("unknown", f"not established for these keys: {TO_KOHYA}"),
)
NOTHING: Verdict = ("refused", f"it matches none of these keys: {TO_KOHYA}")


@dataclass(frozen=True)
class Keys:
    """What a loader sees of a file: its family, the kind of its keys, its modules' names, the parts that they belong
    to, the number of keys that fit nothing, and the scale of a header that says another than 1 ("")."""

    family: str
    kind: str
    names: Sequence[str]
    parts: Collection[str]
    unknown: int = 0
    header_scale: str = ""

    @property
    def has_texts(self) -> bool:
        return any(part != "denoiser" for part in self.parts)


def read_by(keys: Keys) -> dict[str, Verdict]:
    """UI -> ("fully", "partly", "refused" or "unknown"; the reason)."""
    if keys.kind == "peft":
        return dict.fromkeys(UIS, ("refused", f"it reads single files: {TO_KOHYA}"))
    rules: dict[str, Callable[[Keys], dict[str, Verdict]]] = {"flux": _joined, "sd3": _joined}
    rules |= dict.fromkeys(UNETS, _unet)
    if keys.family not in rules:
        return dict.fromkeys(UIS, ("unknown", f"not established for {keys.family}"))
    if keys.kind not in ("kohya", "diffusers"):
        return dict.fromkeys(UIS, ("unknown", f"not established for these keys: {TO_KOHYA}"))
    return _without_unknown(keys, rules[keys.family](keys))


def _without_unknown(keys: Keys, verdicts: dict[str, Verdict]) -> dict[str, Verdict]:
    """Corrects the verdicts for keys that fit nothing."""
    if not keys.unknown:
        return verdicts
    found = {
        ui: ("partly", f"{keys.unknown} keys are not loaded") if verdict[0] == "fully" else verdict
        for ui, verdict in verdicts.items()
    }
    if keys.unknown > FORGE_LIMIT:
        found["Forge"] = ("refused", f"{keys.unknown} keys are unmatched, more than {FORGE_LIMIT}")
    naming = FAMILIES[keys.family].naming
    for ui in naming.known_readers.refuse_unknown:
        found[ui] = ("refused", f"unknown keys are an error for {naming.labels.sidecar}")
    return found


def _unet(keys: Keys) -> dict[str, Verdict]:
    if keys.kind != "kohya":
        found = dict(zip(UIS, UNET_DIFFUSERS, strict=True))
        if keys.header_scale:
            state, why = found["ComfyUI"]
            found["ComfyUI"] = (state, f"{why}; and at scale 1 in place of the header's {keys.header_scale}")
        return found
    found = dict.fromkeys(UIS, FULLY)
    lone = LONE_ENCODER in FAMILIES[keys.family].naming.prefixes.values()
    silent = sum(name.startswith(f"{MISNAMED_ENCODER}_") for name in keys.names) if lone else 0
    if silent:
        wrong, right = f"{MISNAMED_ENCODER}_", f"{LONE_ENCODER}_"
        why = f"it silently skips {silent} text-encoder modules ({wrong} instead of {right}): convert the file"
        found["InvokeAI"] = found["sdnext"] = ("partly", why)
    if keys.family == "sdxl" and LOST_BY_A1111 in keys.names:
        found["A1111"] = ("partly", f"it does not load {LOST_BY_A1111}")
    return found


def _joined(keys: Keys) -> dict[str, Verdict]:
    """SD3 and Flux: each UI has its own rules for each form."""
    forms = ("diffusers_format", "with_texts") if keys.kind == "diffusers" else ("kohya", "kohya_with_texts")
    readers = FAMILIES[keys.family].naming.known_readers
    found = {ui: readers.verdict(forms[keys.has_texts], ui) for ui in UIS}
    found = {ui: NOTHING if state == "nothing" else (state, why) for ui, (state, why) in found.items()}
    if keys.family == "sd3" and keys.kind == "kohya" and not any("attn2" in name for name in keys.names):
        found["sdnext"] = ("unknown", "not established for SD3 without attn2")
    return found
