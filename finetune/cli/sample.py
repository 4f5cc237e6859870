"""The command that draws images with a run, a checkpoint or an adapter file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from finetune.cli.output import loud, say

StepOption = Annotated[
    int | None,
    typer.Option("--step", help="a checkpoint's step; default: the result, or the newest of an unfinished run"),
]
WeightOption = Annotated[float, typer.Option(help="the strength of the LoRA")]
SizeOption = Annotated[int | None, typer.Option(min=1, help="side length in pixels; default: as trained")]
StepsOption = Annotated[int, typer.Option(min=1, help="sampling steps for each image")]
NegativeOption = Annotated[str, typer.Option(help="the negative prompt: what images should not show")]
CountOption = Annotated[int, typer.Option(min=1, max=1_000, help="images for each prompt")]
GuidanceOption = Annotated[
    float | None, typer.Option(help="how closely images follow the prompt; default: the run's own, or 5")
]
SamplerOption = Annotated[str, typer.Option(help="how images are drawn: dpm++, ddim, euler or unipc")]
BatchSizeOption = Annotated[int, typer.Option(min=1, max=65_536, help="images drawn at once: fewer need less memory")]
_Source = Annotated[Path, typer.Argument(help="a run folder or an adapter file", metavar="RUN_OR_ADAPTER")]
_Prompt = Annotated[
    list[str], typer.Option("-p", "--prompt", help="may be given several times; a run fills in {token} and {noun}")
]
_AnySeed = Annotated[
    int, typer.Option(min=-(2**63), max=2**63 - 1, help="the first image's seed; the next has one more")
]
_Image = Annotated[Path | None, typer.Option(help="inpainting, depth, editing, refiner: the image to start from")]
_Mask = Annotated[Path | None, typer.Option(help="inpainting: white is painted anew")]
_Depth = Annotated[Path | None, typer.Option(help="depth: a depth map, near is bright")]
_ImageGuidance = Annotated[
    float | None, typer.Option(help="editing: how closely the image is followed; default: the run's own, or 1.5")
]
_Strength = Annotated[
    float | None,
    typer.Option(
        help="with --image: share of noise that is added to it; default: inpainting 1, depth 0.8, refiner 0.3"
    ),
]
_AdapterBase = Annotated[
    str | None, typer.Option("--base", help="of an adapter file: a folder or a hub id; default: tiny, if it fits")
]
_Folder = Annotated[Path, typer.Option(help="folder for the images")]


def sample(
    source: _Source,
    prompt: _Prompt,
    step: StepOption = None,
    weight: WeightOption = 1.0,
    negative: NegativeOption = "",
    seed: _AnySeed = 0,
    count: CountOption = 4,
    size: SizeOption = None,
    steps: StepsOption = 25,
    guidance: GuidanceOption = None,
    sampler: SamplerOption = "dpm++",
    image: _Image = None,
    mask: _Mask = None,
    depth: _Depth = None,
    image_guidance: _ImageGuidance = None,
    strength: _Strength = None,
    batch_size: BatchSizeOption = 8,
    base: _AdapterBase = None,
    out: _Folder = Path("samples"),
) -> None:
    """Draw images with a run, a checkpoint or an adapter file. They are written as PNG files and a grid."""
    loud()
    from finetune.core.devices import machine
    from finetune.jobs.images import ImageRequest, draw_more, name_cut_prompts
    from finetune.jobs.open import base_to_draw, open_result
    from finetune.jobs.words import filled_prompts
    from finetune.sampling.draw import check_sampling
    from finetune.sampling.given import Given, open_given
    from finetune.sampling.settings import Sampling

    base = base_to_draw(source, base)
    family, info = open_result(source, base, *machine(), weight=weight, step=step)
    guidance = guidance if guidance is not None else info.guidance
    sampling = Sampling(negative, sampler, steps, guidance, size or info.resolution or family.resolution, batch_size)
    check_sampling(family, sampling, "--")
    read = open_given(family, Given(image, mask, depth, image_guidance, strength), sampling, "--", info.image_guidance)
    prompt = filled_prompts(prompt, info)
    _note([*read.notes, *name_cut_prompts(family, [*prompt, negative])])
    request = ImageRequest(
        prompt, range(seed, seed + count), sampling, info.base or base, read.condition, read.origins
    )
    drawn, page = draw_more(family, request, out)
    typer.echo(f"{drawn} images and {page.name} in {out}")


def _note(lines: list[str]) -> None:
    """What a person should know of what was asked for."""
    for line in lines:
        say(f"note: {line}")
