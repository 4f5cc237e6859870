"""Checks of a whole LoRA file: alphas that differ, names of two kinds, a header that disagrees, another base."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping

import torch
from torch import Tensor

from finetune.adapters.bases import Shapes, best_fits, published, published_fits
from finetune.adapters.faults import ANOTHER_BASE, MIXED_NAMES, ODD_ALPHA, Problem
from finetune.adapters.header import named_family
from finetune.adapters.result import Inspection
from finetune.export.lora.kohya import Place
from finetune.families.registry import FAMILIES

ATTENTION = re.compile(r"attn.*_(to_)?(q|k|v|out)(_proj|_0)?$")
Sizes = Mapping[str, tuple[str, str]]  # module -> its sizes (in the file, in the base), as text


def odd_alphas(found: Inspection, held_by: Mapping[str, Mapping[str, Tensor]], known: Mapping[str, Place]) -> None:
    """Modules with another alpha than most of their part: a fault where diffusers ignores that, otherwise a note."""
    by_part: dict[str, dict[str, float]] = {}
    for name, place in known.items():
        alpha = held_by[name].get("alpha")
        if alpha is not None and alpha.numel() == 1 and bool(torch.isfinite(alpha).all()):
            by_part.setdefault(place.part, {})[name] = float(alpha)
    for alphas in by_part.values():
        usual, _ = Counter(alphas.values()).most_common(1)[0]
        odd = [name for name, alpha in alphas.items() if alpha != usual]
        if FAMILIES[found.family].naming.joined:  # their alphas differ as their ranks do
            continue
        for name in odd:
            if ATTENTION.search(name):
                found.fault(ODD_ALPHA, name)
    _odd_scales(found)


def _odd_scales(found: Inspection) -> None:
    """Notes few modules with another strength than the others, in any format."""
    usual, most = found.scales.most_common(1)[0] if found.scales else (1.0, 0)
    odd = {scale: count for scale, count in found.scales.items() if scale != usual}
    if odd and ODD_ALPHA not in found.faults and sum(odd.values()) * 4 <= most:
        said = ", ".join(f"{count} of scale {scale:g}" for scale, count in sorted(odd.items())[:3])
        found.notes.append(f"{most} modules have the scale {usual:g}, beside {said}")


def mixed_names(found: Inspection, known: Mapping[str, Place]) -> None:
    """UNets only: some modules under diffusers' names, others under the original ones."""
    naming = FAMILIES[found.family].naming
    if naming.joined or found.kind != "kohya":
        return
    prefix = naming.prefixes["denoiser"]
    original = {f"{prefix}_{word}" for word in ("input_blocks_", "middle_block_", "output_blocks_")}
    blocks = {f"{prefix}_{word}" for word in ("down_blocks_", "mid_block_", "up_blocks_")}
    theirs = [name for name in known if name.startswith(tuple(blocks))]
    if any(name.startswith(tuple(original)) for name in known):
        for name in theirs:
            found.fault(MIXED_NAMES, name)


def another_base(found: Inspection, shapes: Shapes, sizes: Sizes, readable: int) -> None:
    """Records one problem in place of lists of sizes and names, if most of the file is for another base.

    Args:
        sizes: the sound modules whose sizes differ from the base's.
        readable: the number of modules that fit.
    """
    if 2 * readable > len(shapes):
        return
    better = best_fits(published_fits(shapes), len(shapes))
    hint = next((published(name).words for name in better if published(name).folder != found.compared.folder), "")
    if not hint and (not sizes or 2 * len(sizes) < len(shapes)):
        return
    such = "; ".join(f"{name}: {ours}, there {theirs}" for name, (ours, theirs) in list(sizes.items())[:3])
    differing = f"{len(sizes)} of {len(shapes)} modules have other sizes (such as {such})" if sizes else ""
    lacking = f"{len(found.unknown_keys)} of {len(shapes)} are not in it" if found.unknown_keys else ""
    reasons = " and ".join(text for text in (differing, lacking) if text)
    advice = f"they fit {hint}" if hint else "give the right one with --base"
    message = f"the file was made for another base than {found.compared.words}: {reasons}; {advice}"
    kept = {name: problem for name, problem in found.faults.items() if name != "another-shape"}
    found.faults = {ANOTHER_BASE: Problem(ANOTHER_BASE, message)} | kept
    found.unknown_keys = []


def header_family(found: Inspection) -> None:
    """Notes a header that names another family than the file was compared with."""
    named = named_family(found.metadata)
    if named is not None and named != found.family:
        found.notes.append(f"the header says {named}, and the file is compared with a base of {found.family}")
