"""Samplers by their common names, built with the base's own noise schedule."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any

import diffusers

from finetune.core.errors import BadInput
from finetune.families.configs import read_config
from finetune.objectives.schedule import read_schedule

SAMPLERS: dict[str, tuple[str, dict[str, Any]]] = {
    "dpm++": ("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver++", "timestep_spacing": "trailing"}),
    "ddim": ("DDIMScheduler", {"timestep_spacing": "trailing", "clip_sample": False}),
    "euler": ("EulerDiscreteScheduler", {"timestep_spacing": "trailing"}),
    "unipc": ("UniPCMultistepScheduler", {"timestep_spacing": "trailing"}),
}

# the classes that a base's scheduler_config.json may name: with others, a downloaded config could load any class
KNOWN = {
    "DDIMScheduler", "DDPMScheduler", "PNDMScheduler", "LMSDiscreteScheduler", "HeunDiscreteScheduler",
    "EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler", "DPMSolverMultistepScheduler",
    "DPMSolverSinglestepScheduler", "DPMSolverSDEScheduler", "KDPM2DiscreteScheduler",
    "KDPM2AncestralDiscreteScheduler", "DEISMultistepScheduler", "UniPCMultistepScheduler", "SASolverScheduler",
    "EDMEulerScheduler", "EDMDPMSolverMultistepScheduler", "LCMScheduler", "TCDScheduler", "DDIMInverseScheduler",
    "FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler",
}  # fmt: skip

_SCHEDULE = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas", "prediction_type")


def read_scheduler(folder: Path) -> Any:
    """A base's own scheduler.

    Raises:
        BadInput: it is missing, its class is not one of `KNOWN`, or its schedule is not supported.
    """
    file = folder / "scheduler" / "scheduler_config.json"
    if not file.is_file():
        raise BadInput(
            f"{folder} has no scheduler/scheduler_config.json, which states what the base predicts: add it, or fetch "
            "the base again"
        )
    config = read_config(folder, "scheduler/scheduler_config.json")
    name = config.get("_class_name", "DDIMScheduler")
    if not isinstance(name, str) or name not in KNOWN:
        raise BadInput(
            f"{file} names the scheduler {str(name)[:80]!r}: change it to one of {', '.join(sorted(KNOWN))}"
        )
    read_schedule(config)  # raises BadInput before diffusers raises errors of its own
    return getattr(diffusers, name).from_pretrained(folder, subfolder="scheduler")


def make_scheduler(base: Any, sampler: str | None) -> Any:
    """The scheduler called `sampler` with the noise schedule of `base` (a diffusers scheduler); None returns `base`.

    Only the noise schedule is copied: the other settings of `base` belong to its own sampler.

    Raises:
        BadInput: the sampler is unknown, or does not fit the base.
    """
    if sampler is None:
        return base
    if sampler not in SAMPLERS:
        nearest = difflib.get_close_matches(sampler, SAMPLERS, n=1)
        hint = f"did you mean {nearest[0]!r}?" if nearest else f"known are {', '.join(SAMPLERS)}"
        raise BadInput(f"there is no sampler {sampler!r}; {hint}")
    name, settings = SAMPLERS[sampler]
    if type(base).__name__.startswith("FlowMatch"):
        return _for_flow(base, sampler, name)
    schedule = {key: base.config[key] for key in _SCHEDULE if key in base.config} | {"steps_offset": 1}
    if base.config.get("rescale_betas_zero_snr"):
        schedule["rescale_betas_zero_snr"] = True
    return getattr(diffusers, name)(**schedule, **settings)


def _for_flow(base: Any, sampler: str, name: str) -> Any:
    """For flows: "euler" is the base's own scheduler; the others use its noise levels and shift."""
    if sampler == "euler":
        return type(base).from_config(base.config)
    if sampler == "ddim":
        raise BadInput("the sampler 'ddim' is for diffusion and this base is a flow: use euler, dpm++ or unipc")
    settings = {"use_dynamic_shifting": True} if base.config.get("use_dynamic_shifting") else {}
    kind = {"algorithm_type": "dpmsolver++"} if sampler == "dpm++" else {}
    return getattr(diffusers, name)(
        num_train_timesteps=base.config["num_train_timesteps"],
        prediction_type="flow_prediction",
        use_flow_sigmas=True,
        flow_shift=base.config.get("shift", 1.0),
        **settings,
        **kind,
    )
