"""The command that measures: finetune evaluate."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from finetune.cli.output import loud, say
from finetune.cli.sample import (
    BatchSizeOption,
    CountOption,
    GuidanceOption,
    NegativeOption,
    SamplerOption,
    SizeOption,
    StepsOption,
    WeightOption,
)
from finetune.core.errors import BadInput

_Sources = Annotated[list[Path] | None, typer.Argument(help="runs' folders and LoRA files", metavar="RUN|FILE")]
_On = Annotated[
    Path | None, typer.Option("--on", metavar="PHOTOS", help="the folder with the subject's photos; required")
]
_Images = Annotated[
    list[Path] | None,
    typer.Option("--images", metavar="DIR", help="existing images: a folder with prompts.csv (file,prompt)"),
]
_Out = Annotated[Path, typer.Option("--out", help="folder for the images, the page and the numbers")]
_Metrics = Annotated[
    str | None,
    typer.Option("--metrics", help="such as dino,clip_t; default: those that fit, see docs/evaluation.md"),
]
_Base = Annotated[
    str | None, typer.Option("--base", help="the base of LoRA files: a folder or a hub id; default: tiny, if it fits")
]
_Token = Annotated[
    str | None,
    typer.Option("--token", help="the token of LoRA files (default: from the header), or one of a run's subjects"),
]
_ClassNoun = Annotated[
    str | None,
    typer.Option("--class-noun", help="the class noun of LoRA files, such as dog; default: from the header"),
]
_Kind = Annotated[
    str | None, typer.Option("--kind", help="object, live or style: which prompts; default: by the class noun")
]
_Prompts = Annotated[
    Path | None, typer.Option("--prompts", help="a file with a prompt on each line, with {token} and {noun}")
]
_ClassCount = Annotated[
    int, typer.Option("--class-count", min=1, max=10_000, help="images of the class alone, for pres")
]
_Network = Annotated[str | None, typer.Option(metavar="DIR", help="a folder or a hub id")]
_Lpips = Annotated[str | None, typer.Option(metavar="DIR", help="for div: weights of AlexNet and LPIPS")]
_Inception = Annotated[
    str | None, typer.Option(metavar="FILE", help="for kid and fid: weights of torch-fidelity's InceptionV3")
]
_Copy = Annotated[str | None, typer.Option(metavar="FILE", help="for copies: a TorchScript descriptor, such as SSCD")]
_Vgg = Annotated[str | None, typer.Option(metavar="FILE", help="for gram: weights of VGG-19")]
_Csd = Annotated[str | None, typer.Option(metavar="FILE", help="for csd: its weights")]
_Step = Annotated[int | None, typer.Option("--step", help="a checkpoint's step; default: the result")]
_Seed = Annotated[int, typer.Option(min=-(2**63), max=2**62, help="the first image's seed")]


def evaluate(
    sources: _Sources = None,
    on: _On = None,
    images: _Images = None,
    out: _Out = Path("evaluation"),
    metrics: _Metrics = None,
    base: _Base = None,
    token: _Token = None,
    class_noun: _ClassNoun = None,
    kind: _Kind = None,
    prompts: _Prompts = None,
    count: CountOption = 4,
    class_count: _ClassCount = 16,
    dino: _Network = None,
    clip: _Network = None,
    dinov2: _Network = None,
    dinov3: _Network = None,
    lpips: _Lpips = None,
    inception: _Inception = None,
    copy: _Copy = None,
    vgg: _Vgg = None,
    csd: _Csd = None,
    step: _Step = None,
    weight: WeightOption = 1.0,
    negative: NegativeOption = "",
    seed: _Seed = 0,
    size: SizeOption = None,
    steps: StepsOption = 25,
    guidance: GuidanceOption = None,
    sampler: SamplerOption = "dpm++",
    batch_size: BatchSizeOption = 8,
) -> None:
    """Measure likeness, obedience and diversity of runs and files.

    Writes one page and one JSON file. Images are drawn by DreamBooth's protocol (25 prompts) and kept: what is
    there is not drawn again.
    """
    if on is None:
        raise BadInput("evaluate compares with photos: give the folder that holds them with --on PHOTOS")
    loud()
    from finetune.jobs.evaluate import PAGE, RESULT, Evaluation
    from finetune.jobs.evaluate import evaluate as measure
    from finetune.jobs.evaluated import ToldWords
    from finetune.sampling.settings import Sampling

    networks = {
        "dino": dino, "clip": clip, "dinov2": dinov2, "dinov3": dinov3, "lpips": lpips, "inception": inception,
        "copy": copy, "vgg": vgg, "csd": csd,
    }  # fmt: skip
    given = {name: value for name, value in networks.items() if value is not None}
    sampling = Sampling(negative, sampler, steps, size=size, batch_size=batch_size)
    asked = Evaluation(
        sources=sources or [], photos=on, out=out, folders=images or [], metrics=metrics, prompts=prompts, kind=kind,
        words=ToldWords(token, class_noun), backbones=given, count=count, class_count=class_count, seed=seed,
        sampling=sampling, guidance=guidance, base=base, step=step, weight=weight,
    )  # fmt: skip
    values = measure(asked, lambda line: say(f"note: {line}"))
    say("\n".join([*table(values), f"{out / PAGE} and {out / RESULT}"]))


def table(values: Mapping[str, Any]) -> list[str]:
    """The numbers as lines of text: a metric on each, the sources in columns."""
    from finetune.report.evaluation import number

    rows = [["", "photos", *(source["name"] for source in values["sources"])]]
    for metric in values["metrics"]:
        better = "higher is better" if metric["higher_is_better"] else "lower is better"
        cells = [_cell(item, number) for item in metric["values"]]
        rows.append([f"{metric['title']} ({better})", number(metric["reference"]), *cells])
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def _cell(item: Mapping[str, Any], number: Any) -> str:
    span = f" ({number(item['low'])} to {number(item['high'])})" if item["low"] is not None else ""
    why = f" ({item['note']})" if item["value"] is None and item["note"] else ""
    return f"{number(item['value'])}{span}{why}"
