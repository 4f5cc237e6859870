"""Samplers by the names that people use, each made from the base's own schedule."""

from __future__ import annotations

import difflib
from typing import Any

import diffusers

from finetune.core.errors import BadInput

SAMPLERS: dict[str, tuple[str, dict[str, Any]]] = {
    "dpm++": ("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver++", "timestep_spacing": "trailing"}),
    "ddim": ("DDIMScheduler", {"timestep_spacing": "trailing", "clip_sample": False}),
    "euler": ("EulerDiscreteScheduler", {"timestep_spacing": "trailing"}),
    "unipc": ("UniPCMultistepScheduler", {"timestep_spacing": "trailing"}),
}

_SCHEDULE = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas", "prediction_type")


def make_scheduler(base: Any, sampler: str | None) -> Any:
    """The scheduler called `sampler` with the noise schedule of `base` (a diffusers scheduler); None keeps `base`.

    Only the schedule is taken over: a base's own sampling settings belong to its own sampler.
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
    """Euler is the flow's own scheduler; the others take its noise levels and its shift."""
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
