"""The cases of dreambooth_claims.py: recipes, and what is changed in them. `base` is the untouched base.

METHODS, PRIORS and PEERS are measured on every subject. LEVERS say what was tried on the development subjects alone,
before the default recipe was fixed. FAULTS are made to be bad, so that verdicts.py can ask whether verdicts see it.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

PEERS_FOLDER = Path(__file__).with_name("peers")


@dataclass(frozen=True)
class Case:
    """A recipe's name or file, settings that are changed in it, the strength at which its adapter is drawn, and
    whether the photos get masks by `finetune data mask`."""

    name: str
    recipe: str
    settings: tuple[str, ...] = ()
    weight: float = 1.0
    masked: bool = False


def _lora(name: str, *settings: str, weight: float = 1.0, masked: bool = False) -> Case:
    return Case(name, "dreambooth-lora", settings, weight, masked)


def _peer(file: str, *settings: str) -> Case:
    return Case(file + (", our rate and steps" if settings else ""), str(PEERS_FOLDER / f"{file}.yaml"), settings)


NO_OTHERS = "prior.others=null"
FULL = "prior.weight=1"  # what the default had until its prior's weights were lowered
IMAGES = (FULL, "prior.others={guidance: 3.0, steps: 12}", "prior.caption_dropout=0")
WITHOUT_CLASS_IMAGES = ("prior.others={guidance: 3.0}", "prior.caption_dropout=0")
OTHERS = (FULL, *WITHOUT_CLASS_IMAGES, "prior.steps=20")
QUICKER = (FULL, "prior.others={guidance: 3.0, steps: 12}", "prior.steps=12", "prior.caption_dropout=0.25")
FEWER = (FULL, "prior.count=64", "prior.steps=12", "prior.others={guidance: 3.0, count: 128, steps: 12}")
TEACHER = (*OTHERS, "prior.others.target=base")
UNWEIGHTED = "objective.weighting=none"
LOWER = "objective.density={kind: logit_normal, mean: -0.5}"
HALF = (
    FULL,
    "prior.count=64",
    "prior.others={guidance: 3.0, count: 128, steps: 12}",
    "prior.caption_dropout=0.25",
)
OUR_PACE = ("optim.lr=2e-3", "optim.schedule=cosine", "run.steps=500")


BY_IMAGES = "prior.target=images"  # what class images aimed at before the frozen base taught them


def _fewer(share: float) -> tuple[str, ...]:
    """Fewer images of the prior in a step, which pull as much together. Class images aim at themselves."""
    other = f"prior.others={{guidance: 3.0, steps: 12, weight: {0.5 / share:g}, share: {share:g}}}"
    return BY_IMAGES, f"prior.weight={0.3 / share:g}", f"prior.share={share:g}", other, "prior.caption_dropout=0"


BEFORE = (
    "data.flip=true",
    "run.batch_size=2",
)  # what the default had until a mirrored logo was seen to be another one


def _whole(name: str, *settings: str, weight: float = 1.0, masked: bool = False) -> Case:
    """A case with as many images of the prior as photos in a step, as the default had them before."""
    kinds = [setting for setting in settings if setting.startswith("prior.kind=")]
    others = any(setting.startswith("prior.others=") for setting in settings)
    prior = _fewer(1.0)[: 3 if others else None] if kinds in ([], ["prior.kind=class_images"]) else ()
    return _lora(name, *prior, *settings, weight=weight, masked=masked)


def _mirrored(name: str, *settings: str, weight: float = 1.0, masked: bool = False) -> Case:
    """A case with the default's earlier photos."""
    return _whole(name, *BEFORE, *settings, weight=weight, masked=masked)


def _before(name: str, *settings: str, masked: bool = False) -> Case:
    """A case beside the earlier default."""
    return _mirrored(name, *IMAGES, *settings, masked=masked)


def _weights(own: float, others: float, taught: bool = False) -> tuple[str, ...]:
    """The weights of class images and of everything else."""
    target = ", target: base" if taught else ""
    other = f"prior.others={{guidance: 3.0, steps: 12, weight: {others:g}{target}}}"
    return f"prior.weight={own:g}", other, "prior.caption_dropout=0"


DEFAULT = "lora"
WHOLE_PRIOR = _whole("lora, whole prior")
CLASS_BY_IMAGES = _lora("lora, class by images", BY_IMAGES, "prior.weight=0.6")
GENTLY_BY_BASE = _lora("lora, class gently by the base", "prior.weight=0.6")
FULL_WEIGHTS = _before("lora, full weights")
METHODS = (
    _lora(DEFAULT),
    Case("full", "dreambooth-full"),
    Case("textual inversion", "textual-inversion"),
    Case("pivotal", "pivotal"),
    Case("pivotal, no prior", "pivotal", (NO_OTHERS,)),
)
EARLIER_DEFAULTS = (CLASS_BY_IMAGES, GENTLY_BY_BASE, WHOLE_PRIOR)
PRIORS = (
    _lora("lora, no prior", "prior.kind=none", NO_OTHERS),
    _lora("lora, class images", NO_OTHERS, BY_IMAGES, FULL, "prior.share=1"),
    _lora("lora, frozen base", "prior.kind=frozen_base", NO_OTHERS),
)
EARLIER_PRIORS = (  # beside the default that mirrored half of two photos a step
    _mirrored("lora, mirrored photos"),
    _mirrored("mirrored photos, no prior", "prior.kind=none", NO_OTHERS),
    _mirrored("mirrored photos, class images", "prior.kind=class_images", FULL, NO_OTHERS),
    _mirrored("mirrored photos, frozen base", "prior.kind=frozen_base", NO_OTHERS),
    FULL_WEIGHTS,
    _mirrored("mirrored photos, taught by the base", "prior.target=base", *_weights(0.5, 0.5, taught=True)),
)
FULL_PRIORS = (
    Case("full, mirrored photos", "dreambooth-full", ("data.flip=true",)),
    Case("full, no prior", "dreambooth-full", ("prior.kind=none", NO_OTHERS)),
    Case("full, class images", "dreambooth-full", ("prior.kind=class_images", NO_OTHERS)),
)
PEERS = (_peer("diffusers"), _peer("diffusers", *OUR_PACE), _peer("kohya"), _peer("kohya", *OUR_PACE))
LEVERS = (
    FULL_WEIGHTS,
    _mirrored("class images alone", "prior.kind=class_images", FULL, NO_OTHERS, "prior.steps=20"),
    _mirrored("class images without dropout", "prior.kind=class_images", FULL, NO_OTHERS, "prior.caption_dropout=0"),
    _mirrored("others", *OTHERS),
    _mirrored("others by the base", *TEACHER),
    _mirrored("others, half", *OTHERS, "prior.others.share=0.5"),
    _mirrored("others, frozen base", "prior.kind=frozen_base", *WITHOUT_CLASS_IMAGES, "prior.others.target=base"),
    _mirrored("others, rank 4", *OTHERS, "method.rank=4"),
    _mirrored("others, rank 32", *OTHERS, "method.rank=32"),
    _mirrored("others, half the rate", *OTHERS, "optim.lr=1e-3"),
    _mirrored("others, 300 steps", *OTHERS, "run.steps=300"),
    _mirrored("others, 800 steps", *OTHERS, "run.steps=800"),
    _mirrored("others, attention alone", *OTHERS, "method.targets=attention"),
    _mirrored("others, EMA", *OTHERS, "run.ema=0.99"),
    _mirrored("others, no weighting", *OTHERS, UNWEIGHTED),
    _mirrored("others, less of the high noise", *OTHERS, LOWER),
    _mirrored("others, the text encoder too", *OTHERS, "method.parts=[denoiser,text_encoders]", "optim.text_lr=2e-4"),
    _mirrored("others, strength .8", *OTHERS, weight=0.8),
    _mirrored("others, masks", *OTHERS, "data.masks=auto", masked=True),
    _mirrored("others, 12 steps each, with dropout", *QUICKER),
    _mirrored("others, half as many images, 12 steps each", *FEWER, "prior.caption_dropout=0"),
    _mirrored(
        "others, half as many images, 12 steps each, 300 steps", *FEWER, "prior.caption_dropout=0", "run.steps=300"
    ),
    _before("12 steps, no flips", "data.flip=false"),
    _before("12 steps, no weighting", UNWEIGHTED),
    _before("12 steps, 800 steps", "run.steps=800"),
    _before("12 steps, masks", "data.masks=auto", masked=True),
    _before("12 steps, a batch of 4", "run.batch_size=4"),
    _before("12 steps, rank 64", "method.rank=64"),
    _before("12 steps, the text encoder too", "method.parts=[denoiser,text_encoders]", "optim.text_lr=2e-4"),
    _mirrored("12 steps, no weighting, half as many images", UNWEIGHTED, *HALF),
    _before("12 steps, no weighting, less of the high noise", UNWEIGHTED, LOWER),
    _before("12 steps, no weighting, 800 steps", UNWEIGHTED, "run.steps=800"),
    _mirrored("weights .5 and .5", *_weights(0.5, 0.5)),
    _mirrored("weights .5 and .5, 750 steps", *_weights(0.5, 0.5), "run.steps=750"),
    _mirrored("weights .15 and .25", *_weights(0.15, 0.25)),
    _mirrored("weights .5 and .5, taught by the base", "prior.target=base", *_weights(0.5, 0.5, taught=True)),
    _mirrored("weights .3 and .3, taught by the base", "prior.target=base", *_weights(0.3, 0.3, taught=True)),
)
SMALL_LOGOS = (  # on cars with a moon
    WHOLE_PRIOR,
    _mirrored("lora, mirrored photos"),
    _mirrored("mirrored photos, no weighting", UNWEIGHTED),
    _whole("two photos a step", "run.batch_size=2"),
    _whole("two photos a step, no weighting", "run.batch_size=2", UNWEIGHTED),
    _whole("two photos a step, 800 steps", "run.batch_size=2", "run.steps=800"),
    _whole("350 steps", "run.steps=350"),
)
FAINT_LOGOS = ("car", "moon-1")  # subjects for development that lose their logos most
PRIOR_IMAGES = (  # on them: how many there are in a step, and what they aim at
    CLASS_BY_IMAGES,
    GENTLY_BY_BASE,
    WHOLE_PRIOR,
    _whole("taught by the base", "prior.target=base", *_weights(0.5, 0.5, taught=True)),
    _whole("taught by the base, weights .3 and .3", "prior.target=base", *_weights(0.3, 0.3, taught=True)),
    _whole(
        "taught by the base, a rate of 4e-3", "prior.target=base", *_weights(0.5, 0.5, taught=True), "optim.lr=4e-3"
    ),
    _lora("six photos, half as many of the prior", "run.batch_size=6", *_fewer(0.5)),
    _lora("a quarter of the prior", *_fewer(0.25)),
    _lora("700 steps, fewer of the prior", *_fewer(0.5), "run.steps=700"),
    _whole("masks, a floor of .2", "data.masks=auto", "data.mask_floor=0.2", masked=True),
)
CLASS_TEACHER = (CLASS_BY_IMAGES, GENTLY_BY_BASE, _lora(DEFAULT))
FAULTS = (
    _before("too short", "run.steps=60"),
    _before("too faint", "optim.lr=1e-4", "run.steps=250"),
    _before("too hot", "optim.lr=6e-3"),
    _mirrored("too hot, no prior", "optim.lr=6e-3", "prior.kind=none", NO_OTHERS, "optim.schedule=constant"),
    _mirrored("too long, no prior", "run.steps=1000", "prior.kind=none", NO_OTHERS),
)
ON_ALL = (*METHODS, *EARLIER_DEFAULTS, *PRIORS, *EARLIER_PRIORS, *FULL_PRIORS, *PEERS)
CASES = {case.name: case for case in (*ON_ALL, *LEVERS, *SMALL_LOGOS, *PRIOR_IMAGES, *FAULTS)}
