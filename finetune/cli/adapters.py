"""Commands for a base or a recipe (inspect, plan) and for adapter files (verify, convert, resize, merge, extract)."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from finetune.core.errors import BadInput, CheckFailed
from finetune.core.logging import plain
from finetune.export.settings import UNCHECKED

if TYPE_CHECKING:
    from finetune.export.base import Exported
    from finetune.export.decompose import Kept

File = Annotated[Path, typer.Argument(help="a LoRA file from any trainer, or a PEFT folder", metavar="FILE")]
BaseOption = Annotated[str, typer.Option("--base", help="tiny, a diffusers folder or a hub id")]
Out = Annotated[Path, typer.Option("--out", help="output path and name, without a file extension")]
To = Annotated[list[str] | None, typer.Option("--to", help="kohya, diffusers or peft; default: kohya")]
Dtype = Annotated[str, typer.Option("--dtype", help="fp16, fp32 or bf16")]
Force = Annotated[bool, typer.Option("--force", help="overwrite existing files")]
Rank = Annotated[int | None, typer.Option("--rank", min=1)]


def register(app: typer.Typer) -> None:
    """Adds the commands of this module to `app`."""
    for command in (inspect, plan, verify, convert, resize, merge, extract):
        app.command()(command)


def inspect(
    source: Annotated[str, typer.Argument(help="tiny, a diffusers folder, a hub id or a .safetensors checkpoint")],
    like: Annotated[
        str | None, typer.Option("--like", help="for a single file: a folder or hub id of the same model family")
    ] = None,
) -> None:
    """Show what a base is: family, objective, schedule, resolution, encoders, sizes, licence."""
    from finetune.export.card import licence_of
    from finetune.families.facts import facts
    from finetune.families.source import resolve_base

    folder = resolve_base(source, like=like)
    for name, value in (facts(folder) | {"licence": licence_of(folder) or "not stated in its folder"}).items():
        typer.echo(f"{name:>16}  {plain(str(value))}")


def plan(
    recipe: Annotated[str, typer.Argument(help="a shipped recipe's name or a YAML file")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="section.key=value ...", metavar="[KEY=VALUE]...")
    ] = None,
) -> None:
    """Estimate what a recipe trains, writes and needs in memory. Reads only the base's configs."""
    from finetune.config.load import load_recipe

    checked = load_recipe(recipe, overrides or [])  # reports a mistake at once, before the heavy imports
    from finetune.jobs.estimate import report

    for name, value in report(checked).items():
        typer.echo(f"{name:>16}  {plain(str(value))}")


def verify(file: File, base: BaseOption = "tiny") -> None:
    """Show what a LoRA file is, what is wrong with it, and which programs read it. Exit 1 if something is wrong."""
    from finetune.adapters.operations import verify_file

    found = verify_file(file, base)
    ranks = ", ".join(
        f"{rank} ({count} modules)" if len(found.ranks) > 1 else str(rank)
        for rank, count in sorted(found.ranks.items())
    )
    scales = ", ".join(f"{scale:g}" for scale in sorted(found.scales))
    typer.echo(f"{file}: {found.kind} LoRA for {found.family}, {found.size / 1e6:.2f} MB, {', '.join(found.dtypes)}")
    for part, layers in (found.adapter.layers if found.adapter else {}).items():
        typer.echo(f"  {part}: {len(layers)} modules")
    typer.echo(f"  rank {ranks or 'unknown'}; scale (alpha / rank) {scales or 'unknown'}")
    if found.zero:
        typer.echo(f"  {len(found.zero)} modules are zero, such as {found.zero[0]}")
    for key in ("modelspec.title", "modelspec.trigger_phrase", "ss_base_model_version", "modelspec.architecture"):
        if found.metadata.get(key):
            typer.echo(f"  {key}: {plain(' '.join(found.metadata[key].split()))}")
    for reader, (state, why) in found.verdicts.items():
        typer.echo(f"  {reader:<12} {state}{f': {why}' if why else ''}")
    for problem in found.problems:
        typer.echo(f"  PROBLEM: {problem.line}")
    if found.problems:
        raise CheckFailed(f"{file} has {len(found.problems)} kind(s) of problem: see the lines above")


def convert(
    file: File, out: Out, to: To = None, base: BaseOption = "tiny",
    dtype: Annotated[str | None, typer.Option(help="default: the file's own")] = None, force: Force = False,
) -> None:  # fmt: skip
    """Write a LoRA in other formats. Every written file is read back and compared."""
    from finetune.adapters.inspection import open_adapter
    from finetune.adapters.operations import about_of, write

    adapter, found = open_adapter(file, base)
    own = found.dtypes[0] if found.dtypes in (("fp32",), ("fp16",), ("bf16",)) else "fp32"
    say_exported(write(adapter, out, to or ["kohya"], _dtype(dtype or own), force, about_of(found)))


def resize(
    file: File, out: Out, rank: Rank = None,
    energy: Annotated[float | None, typer.Option(min=0.0, max=1.0, help="share to keep, such as 0.95")] = None,
    to: To = None, base: BaseOption = "tiny", dtype: Dtype = "fp16", force: Force = False,
) -> None:  # fmt: skip
    """Reduce a LoRA to a smaller rank with an SVD: to --rank, or to the rank that keeps --energy."""
    from finetune.adapters.algebra import resize as smaller
    from finetune.adapters.inspection import open_adapter
    from finetune.adapters.operations import about_of, write

    if (rank is None) == (energy is None):
        raise BadInput("resize needs either --rank or --energy: give one of them, such as --rank 8")
    adapter, found = open_adapter(file, base)
    small, kept = smaller(adapter, rank, energy)
    _say_kept(kept)
    say_exported(write(small, out, to or ["kohya"], _dtype(dtype), force, about_of(found)))


def merge(
    files: Annotated[list[str], typer.Argument(help="several of FILE or FILE:WEIGHT", metavar="FILE[:WEIGHT]...")],
    out: Out, to: To = None, rank: Rank = None, base: BaseOption = "tiny", dtype: Dtype = "fp16", force: Force = False,
) -> None:  # fmt: skip
    """Merge LoRAs into one (--to kohya, diffusers, peft) or into their base (--to folder, checkpoint)."""
    from finetune.adapters.operations import merged, merged_model, weighted, write

    pairs = [weighted(text) for text in files]
    to = ["folder"] if to == ["diffusers-model"] else to  # the name that some users expect
    if to in (["folder"], ["checkpoint"]):
        path = out.with_name(f"{out.name}.safetensors") if to == ["checkpoint"] else out
        say_exported([merged_model(pairs, base, path, _dtype(dtype), to[0])])
        return
    adapter, kept = merged(pairs, base, rank)
    if kept:
        _say_kept(kept)
    say_exported(write(adapter, out, to or ["kohya"], _dtype(dtype), force, {}))


def extract(
    model: Annotated[str, typer.Argument(help="a fine-tuned model: a diffusers folder or a hub id", metavar="MODEL")],
    out: Out, rank: Annotated[int, typer.Option("--rank", min=1)] = 32, to: To = None, base: BaseOption = "tiny",
    dtype: Dtype = "fp16", force: Force = False,
) -> None:  # fmt: skip
    """Extract the difference between a fine-tuned model and its base as a LoRA, and report the error of that rank."""
    from finetune.adapters.operations import extracted, write

    adapter, kept = extracted(model, base, rank)
    _say_kept(kept)
    say_exported(write(adapter, out, to or ["kohya"], _dtype(dtype), force, {}))


def _dtype(name: str) -> str:
    if name not in ("fp16", "fp32", "bf16"):
        raise BadInput(f"there is no --dtype {name!r}: use fp16, fp32 or bf16")
    return name


def _say_kept(kept: Kept) -> None:
    typer.echo(
        f"kept {kept.energy:.2%} of the energy; relative error {kept.error:.1e}, of the worst module {kept.worst:.1e} "
        f"({kept.worst_module})"
    )


def say_exported(exported: list[Exported]) -> None:
    """Prints each written file, the programs that read it, and its checks.

    Raises:
        CheckFailed: a check failed.
    """
    for item in exported:
        readers = f"read by {', '.join(item.read_by) or 'no known program'}" if item.checks else UNCHECKED
        typer.echo(f"{item.format}: {item.path} ({item.size / 1e6:.2f} MB, {item.modules} modules), {readers}")
        for line in (*(check.line for check in item.checks), *item.limits):
            typer.echo(f"  {line}")
    if not all(item.ok for item in exported):
        raise CheckFailed("a written file did not pass its checks: see the lines above")
