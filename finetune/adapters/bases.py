"""What a LoRA file is compared with: the base that the user names, or a published model's configuration."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import torch

from finetune.adapters.header import named_family
from finetune.adapters.keys import without_wrapper
from finetune.core.errors import BadInput
from finetune.export.lora.diffusers import prefixes
from finetune.export.lora.kohya import Place, key_of, places
from finetune.export.lora.lycoris import module_names
from finetune.families.digests import is_base_of
from finetune.families.registry import denoiser_config, family_of, weight_shapes
from finetune.families.source import resolve_base

PUBLISHED = Path(__file__).parent / "published"  # diffusers folders with configs alone
TITLES = {  # in the order in which equally fitting ones are chosen
    "sd1": "SD 1.5", "sd2": "SD 2.1", "sdxl": "SDXL", "sdxl-refiner": "SDXL refiner", "sd3-medium": "SD3 medium",
    "sd3.5-medium": "SD3.5 medium", "sd3.5-large": "SD3.5 large", "flux-dev": "Flux.1 [dev]",
    "flux-schnell": "Flux.1 [schnell]",
}  # fmt: skip
# what only a UNet's names hold, and only a transformer's; a file of text encoders holds neither
UNET = ("unet.", "unet_down_blocks", "unet_mid_block", "unet_up_blocks", "unet_input_", "unet_middle_", "unet_output_")
TRANSFORMER = ("transformer.", "diffusion_model.", "unet_joint_", "unet_double_", "unet_single_", "unet_final_")
LONE_ENCODER, MISNAMED_ENCODER = "lora_te", "lora_te1"  # kohya's names for the only text encoder of SD1, SD2
ARCHITECTURE = "modelspec.architecture"
BASE_HASH = "finetune_base_hash"  # in the headers of our own files
Shapes = Mapping[str, Mapping[str, torch.Size]]  # module -> the shapes of its matrices, "a" and "b"


@dataclass(frozen=True)
class Compared:
    """A base to compare with. `words` names it. `weights`: whether the folder has weights, not configs alone.
    `alike`: other published models that the file fits as well, where its header names none of them."""

    folder: Path
    words: str
    weights: bool = True
    alike: tuple[str, ...] = ()

    @property
    def family(self) -> str:
        return family_of(self.folder).name

    @property
    def line(self) -> str:
        """A sentence for people."""
        advice = "" if self.weights else "; give --base to compare with your own"
        return f"compared with {self.words}{doubt(self.alike)}{advice}"


@dataclass(frozen=True)
class Fit:
    """How a file fits a base: how many of its modules have a name there (`known`), and of those, a size that fits."""

    fits: int
    known: int


def chosen_base(path: Path, shapes: Shapes, metadata: Mapping[str, str], base: str | None) -> Compared:
    """The base that a file is compared with: `base`, or what the file's header, names and sizes tell.

    Raises:
        BadInput: `base` can't be found; or without it, the file does not tell which base it is for.
    """
    if base is not None:
        folder = resolve_base(base)
        return Compared(folder, f"the base {base}", has_weights(folder))
    if metadata.get(BASE_HASH) and is_base_of(resolve_base("tiny"), metadata[BASE_HASH]):
        return Compared(resolve_base("tiny"), "the tiny base, which its header names")
    named = named_family(metadata)
    ours = published_fits(shapes, named) if named else {}
    if ours and not shapes:  # no matrices of a plain LoRA: there are no sizes to compare
        return published(next(iter(ours)))
    best = best_fits(ours, len(shapes)) or best_fits(published_fits(shapes), len(shapes))
    if len({family_of(PUBLISHED / name).name for name in best}) > 1:
        raise BadInput(
            f"{path} fits several published models ({', '.join(TITLES[name] for name in best)}) and its header names "
            "none: say which with --base BASE"
        )
    if best:
        return _of_alike(best, metadata)
    if any(fit.known for fit in ours.values()):
        return published(max(ours, key=lambda name: (ours[name].fits, ours[name].known)))
    raise BadInput(
        f"neither the header of {path} nor the names and sizes of its modules fit a published model: give the base "
        "that it was made for with --base BASE"
    )


def published(name: str) -> Compared:
    return Compared(PUBLISHED / name, f"the published {TITLES[name]} configuration", weights=False)


def _of_alike(best: Sequence[str], metadata: Mapping[str, str]) -> Compared:
    """Of published models of one family that a file fits equally well, the one whose architecture its header names, or
    else the first."""
    kinds = {name: _architecture(name) for name in best}
    said = metadata.get(ARCHITECTURE, "").strip().lower().removesuffix("/lora").replace(".", "-")
    named = next((name for name, kind in kinds.items() if said and said == kind), None)
    if named is not None:
        return published(named)
    alike = tuple(TITLES[name] for name, kind in kinds.items() if kind != kinds[best[0]])
    return replace(published(best[0]), alike=alike)


def _architecture(name: str) -> str:
    """modelspec's name of a published model."""
    naming, folder = family_of(PUBLISHED / name).naming, PUBLISHED / name
    return naming.architecture_of(denoiser_config(folder)) if naming.architecture_of else naming.labels.architecture


def doubt(alike: Sequence[str]) -> str:
    """Why a base was taken where several fit, as the end of a sentence; "" where only one does."""
    if not alike:
        return ""
    return (
        f", the first of those that the file fits (also {', '.join(alike)}; its header names none, and written files "
        "state no architecture)"
    )


def compared_by_itself(folder: Path, alike: Sequence[str] = ()) -> str:
    """A sentence on the published configuration that was chosen for a file; "" if it was compared with a base."""
    return replace(published(folder.name), alike=tuple(alike)).line if folder.parent == PUBLISHED else ""


def published_fits(shapes: Shapes, family: str | None = None) -> dict[str, Fit]:
    """Published model, of one family or of all -> how the file's modules fit it, in the order of preference."""
    unet, transformer = (any(mark in name for name in shapes for mark in marks) for marks in (UNET, TRANSFORMER))
    marked = unet != transformer
    return {
        name: _fit(shapes, name)
        for name in TITLES
        if family in (None, family_of(PUBLISHED / name).name)
        and (not marked or unet == (PUBLISHED / name / "unet").is_dir())
    }


def best_fits(fits: Mapping[str, Fit], modules: int) -> list[str]:
    """The names with the most fitting modules, if those are more than half of the file's."""
    most = max((fit.fits for fit in fits.values()), default=0)
    return [name for name, fit in fits.items() if fit.fits == most] if 2 * most > modules else []


def _fit(shapes: Shapes, name: str) -> Fit:
    sizes = _published_sizes(name)
    known = [name for name in shapes if without_wrapper(name) in sizes]
    return Fit(sum(_fits(shapes[name], sizes[without_wrapper(name)]) for name in known), len(known))


@cache
def _published_sizes(name: str) -> dict[str, torch.Size]:
    """Every module name that trainers write for a published model -> the shape of its weight."""
    weights = weight_shapes(PUBLISHED / name)
    return {key: weight_of(place, weights) for key, place in accepted_names(PUBLISHED / name, native=True).items()}


def weight_of(place: Place, weights: Mapping[str, Mapping[str, torch.Size]]) -> torch.Size:
    """The shape of the weight that a name in a file stands for."""
    return torch.Size([sum(place.rows), *weights[place.part][place.modules[0]][1:]])


def accepted_names(folder: Path, native: bool = False) -> dict[str, Place]:
    """Every module name that trainers write for this base -> the modules that it stands for.

    `native`: also those that only LyCORIS' format has.
    """
    family = family_of(folder)
    title, prefix, config = family.name, prefixes(family.name), denoiser_config(folder)
    names: dict[str, Place] = {}
    lycoris = module_names(folder) if native else {}
    for (part, name), place in places(folder).items():
        names[key_of(title, part, name)] = place
        if part == "denoiser":
            names |= dict.fromkeys(family.naming.other_names(name, config), place)
        elif family.naming.prefixes[part] == LONE_ENCODER:
            names[key_of(title, part, name).replace(f"{LONE_ENCODER}_", f"{MISNAMED_ENCODER}_", 1)] = place
    for part, modules in weight_shapes(folder).items():
        names |= {f"{prefix[part]}.{path}": Place(part, (path,), (shape[0],)) for path, shape in modules.items()}
        if native:
            own = {path: lycoris[part, path] for path in modules if (part, path) in lycoris}
            names |= {own[path]: Place(part, (path,), (modules[path][0],)) for path in own if own[path] not in names}
    return names


def _fits(held: Mapping[str, torch.Size], weight: torch.Size) -> bool:
    """Whether the matrices have the sizes of the weight's input and output, as far as they are there."""
    a, b = held.get("a"), held.get("b")
    return (a is None or (len(a) > 1 and a[1:].numel() == weight[1:].numel())) and (
        b is None or (len(b) > 1 and b[0] == weight[0])
    )


def has_weights(folder: Path) -> bool:
    """Whether a diffusers folder holds weights, and not configs alone."""
    return any(folder.glob("*/*.safetensors")) or any(folder.glob("*/*.bin"))
