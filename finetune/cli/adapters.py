"""Commands for a base or a recipe (inspect, plan) and for adapter files (verify, convert, resize, merge, extract)."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from finetune.cli.output import say_row
from finetune.core.errors import BadInput, CheckFailed
from finetune.core.logging import plain
from finetune.export.settings import UNCHECKED

if TYPE_CHECKING:
    from finetune.export.base import Adapter, Exported
    from finetune.export.decompose import Kept

DTYPES = ("fp16", "fp32", "bf16")
File = Annotated[Path, typer.Argument(help="a LoRA file from any trainer, or a PEFT folder", metavar="FILE")]
BaseOption = Annotated[str, typer.Option("--base", help="tiny, a diffusers folder or a hub id")]
Against = Annotated[
    str | None, typer.Option("--base", help="tiny, a diffusers folder or a hub id; default: as the file tells")
]
Out = Annotated[str, typer.Option("--out", help="NEW.safetensors, FOLDER/ or a name without an ending")]
To = Annotated[list[str] | None, typer.Option("--to", help="kohya, diffusers or peft; default: kohya")]
Dtype = Annotated[str, typer.Option("--dtype", help="precision of the new file: fp16, fp32 or bf16")]
Force = Annotated[bool, typer.Option("--force", help="overwrite existing files")]
Rank = Annotated[int | None, typer.Option("--rank", min=1, help="the rank of the new file")]


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
    """Show what a base is, without reading its weights.

    Family, objective, schedule, resolution, encoders, sizes, licence.
    """
    from finetune.adapters.operations import refuse_what_is_no_base
    from finetune.export.card import licence_of
    from finetune.families.facts import facts
    from finetune.families.source import resolve_base

    refuse_what_is_no_base(source)
    folder = resolve_base(source, like=like)
    for name, value in (facts(folder) | {"licence": licence_of(folder) or "not stated in its folder"}).items():
        typer.echo(f"{name:>16}  {plain(str(value))}")


def plan(
    recipe: Annotated[str, typer.Argument(help="a shipped recipe's name or a YAML file")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="section.key=value ...", metavar="[KEY=VALUE]...")
    ] = None,
) -> None:
    """Estimate what a recipe trains, writes and needs in memory. Reads the base's configs and small photos."""
    from finetune.config.load import load_recipe

    checked = load_recipe(recipe, overrides or [])  # reports a mistake at once, before the heavy imports
    from finetune.jobs.estimate import report
    from finetune.jobs.hints import photo_hints

    for name, value in report(checked).items():
        say_row(f"{name:>16}  {value}")
    borrowed = checked.borrowed if checked.data.photos.exists() else ()
    for hint in [*borrowed, *photo_hints(checked)]:
        say_row(f"{'hint':>16}  {hint}")


def verify(file: File, base: Against = None) -> None:
    """Show what a LoRA file is and which programs read it. Says what is wrong with it; the exit code is then 1."""
    from finetune.adapters.operations import verify_file

    found = verify_file(file, base)
    ranks = ", ".join(
        f"{rank} ({count} modules)" if len(found.ranks) > 1 else str(rank)
        for rank, count in sorted(found.ranks.items())
    )
    scales = ", ".join(f"{scale:g}" for scale in sorted(found.scales))
    typer.echo(f"{file}: {found.called} for {found.family}, {found.size / 1e6:.2f} MB, {', '.join(found.dtypes)}")
    typer.echo(f"  {found.compared.line}")
    if found.native:
        typer.echo("  its names, shapes and values are checked; it is not compared with a LoRA")
    parts = {part: len(layers) for part, layers in found.adapter.layers.items()} if found.adapter else found.parts
    for part, count in parts.items():
        typer.echo(f"  {part}: {count} modules")
    if ranks or not found.native:  # LoKr of whole matrices has neither
        typer.echo(f"  rank {ranks or 'unknown'}; scale (alpha / rank) {scales or 'unknown'}")
    if found.zero:
        typer.echo(f"  {len(found.zero)} modules are zero, such as {found.zero[0]}")
    for key in ("modelspec.title", "modelspec.trigger_phrase", "ss_base_model_version", "modelspec.architecture"):
        if found.metadata.get(key):
            typer.echo(f"  {key}: {plain(' '.join(found.metadata[key].split()))}")
    for reader, (state, why) in found.verdicts.items():
        typer.echo(f"  {reader:<12} {state}{f': {why}' if why else ''}")
    for note in found.notes:
        typer.echo(f"  note: {note}")
    for problem in found.problems:
        typer.echo(f"  PROBLEM: {problem.line}")
    if found.problems:
        raise CheckFailed(
            f"{file} has {len(found.problems)} problem{'s' if len(found.problems) > 1 else ''}: see the lines above"
        )


def convert(
    file: File, out: Out, to: To = None, base: Against = None,
    dtype: Annotated[str | None, typer.Option(help="fp16, fp32 or bf16; default: the file's own")] = None,
    force: Force = False,
) -> None:  # fmt: skip
    """Write a LoRA in other formats. Every written file is read back and compared."""
    from finetune.adapters.inspection import open_adapter
    from finetune.adapters.operations import about_of, write
    from finetune.adapters.targets import check_adapter_formats, target_of

    target = target_of(out, _stem(file))
    check_adapter_formats(to or [])
    wanted = _dtype(dtype or "fp32")
    adapter, found = open_adapter(file, base)
    if dtype is None and len(found.dtypes) == 1 and found.dtypes[0] in DTYPES:
        wanted = found.dtypes[0]
    _say_compared(adapter)
    say_exported(write(adapter, target, to or ["kohya"], wanted, force, about_of(found)))


def resize(
    file: File, out: Out, rank: Rank = None,
    energy: Annotated[float | None, typer.Option(min=0.0, max=1.0, help="share of it to keep, such as 0.95")] = None,
    to: To = None, base: Against = None, dtype: Dtype = "fp16", force: Force = False,
) -> None:  # fmt: skip
    """Reduce a LoRA to a smaller rank. An SVD does it: to --rank, or to the rank that keeps --energy."""
    from finetune.adapters.algebra import resize as smaller
    from finetune.adapters.inspection import open_adapter
    from finetune.adapters.operations import about_of, write
    from finetune.adapters.targets import check_adapter_formats, target_of

    if (rank is None) == (energy is None):
        raise BadInput("resize needs either --rank or --energy: give one of them, such as --rank 8")
    target = target_of(out, _stem(file))
    check_adapter_formats(to or [])
    _dtype(dtype)
    adapter, found = open_adapter(file, base)
    small, kept = smaller(adapter, rank, energy)
    _say_compared(adapter)
    _say_kept(kept)
    say_exported(write(small, target, to or ["kohya"], dtype, force, about_of(found)))


def merge(
    files: Annotated[list[str], typer.Argument(help="LoRA files; WEIGHT: default 1", metavar="FILE[:WEIGHT]...")],
    out: Out, to: To = None, rank: Rank = None, base: Against = None, dtype: Dtype = "fp16", force: Force = False,
) -> None:  # fmt: skip
    """Merge LoRAs into one, or into their base. --to: kohya, diffusers or peft; or folder or checkpoint."""
    from finetune.adapters.operations import merged_files, merged_model, write
    from finetune.adapters.targets import check_adapter_formats, model_format, model_path, target_of, weighted

    pairs = [weighted(text) for text in files]
    to = ["folder" if name == "diffusers-model" else name for name in to or ["kohya"]]  # a name that some expect
    model, target = model_format(to, rank), target_of(out, "+".join(_stem(path) for path, _ in pairs))
    _dtype(dtype)
    if model is not None:
        if base is None:
            raise BadInput(f"--to {model} adds the LoRA to the base's weights: say where they are with --base BASE")
        say_exported([merged_model(pairs, base, model_path(target, model), dtype, model)])
        return
    check_adapter_formats(to)
    adapter, kept = merged_files(pairs, base, rank)
    _say_compared(adapter)
    if kept:
        _say_kept(kept)
    say_exported(write(adapter, target, to, dtype, force, {}))


def extract(
    model: Annotated[str, typer.Argument(help="a fine-tuned model: a diffusers folder or a hub id", metavar="MODEL")],
    out: Out, rank: Annotated[int, typer.Option("--rank", min=1, help="the rank of the new file")] = 32,
    to: To = None, base: Against = None,
    dtype: Dtype = "fp16", force: Force = False,
) -> None:  # fmt: skip
    """Write what a fine-tuned model changed as a LoRA. The error of that rank is printed."""
    from finetune.adapters.operations import extracted, write
    from finetune.adapters.targets import check_adapter_formats, target_of

    if base is None:
        raise BadInput("extract subtracts the base's weights: say where they are with --base BASE")
    target = target_of(out, _stem(Path(model)))
    check_adapter_formats(to or [])
    _dtype(dtype)
    adapter, kept = extracted(model, base, rank)
    _say_kept(kept)
    say_exported(write(adapter, target, to or ["kohya"], dtype, force, {}))


def _stem(path: Path) -> str:
    return path.name.removesuffix(".safetensors") or "adapter"


def _say_compared(adapter: Adapter) -> None:
    from finetune.adapters.bases import compared_by_itself

    line = compared_by_itself(adapter.base_folder, adapter.alike)
    if line:
        typer.echo(line)


def _dtype(name: str) -> str:
    if name not in DTYPES:
        raise BadInput(f"there is no --dtype {name!r}: use fp16, fp32 or bf16")
    return name


def _say_kept(kept: Kept) -> None:
    typer.echo(
        f"kept {kept.energy:.2%} of the energy; relative error {kept.error:.1e}, of the worst module {kept.worst:.1e} "
        f"({kept.worst_module})"
    )
    if kept.left_out:
        typer.echo(f"not in the file: {kept.left_out}")


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
