"""The command line: parses, calls, prints. Heavy packages are imported only when a command needs them."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from finetune import __version__
from finetune.cli import lists
from finetune.cli.adapters import BaseOption, register, say_exported
from finetune.cli.evaluate import evaluate
from finetune.cli.help import HELP, Sections
from finetune.cli.output import loud, progress_shown, say, say_row, train_instead
from finetune.cli.page import ui
from finetune.cli.sample import StepOption, sample
from finetune.core.allocator import keep_freed_memory
from finetune.core.errors import BadInput, CheckFailed, Stopped, disk_sentence
from finetune.core.launcher import end_with_launcher
from finetune.core.logging import plain, printable, quiet
from finetune.core.pickles import pickles_allowed
from finetune.core.progress import is_main_process

if TYPE_CHECKING:
    from finetune.config.recipe import Recipe

app = typer.Typer(
    name="finetune",
    cls=Sections,
    help=HELP,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    rich_markup_mode=None,
)
for part in (lists.recipes_app, lists.tokens_app):
    app.add_typer(part)
register(app)
for own in (evaluate, sample, ui):
    app.command()(own)


NO_MEMORY = "can't allocate memory"
OUT_OF_MEMORY = (
    "the memory was not enough: for training set run.gradient_checkpointing=true, or lower run.batch_size or "
    "data.resolution; for drawing lower sample.batch_size and prior.batch_size; `finetune plan RECIPE` estimates what "
    "a run needs"
)

ProcessCount = Annotated[int | None, typer.Option("--processes", min=1, help="processes on this machine, one per GPU")]
KeyValues = Annotated[list[str] | None, typer.Argument(help="section.key=value ...", metavar="[KEY=VALUE]...")]
SkipBad = Annotated[bool, typer.Option("--skip-bad", help="leave out photos that can't be used")]
AcceptChanges = Annotated[
    bool, typer.Option("--accept-changes", help="go on although photos, base or packages changed; it is recorded")
]
BestOption = Annotated[
    str | None,
    typer.Option("--step", metavar="N|best", help="a checkpoint's step, or best: the one that the verdicts recommend"),
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="print the plan and stop")]


def _say_version(asked: bool) -> None:
    if asked:
        say(f"finetune {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_say_version, is_eager=True, help="print the version and stop")
    ] = False,
    debug: Annotated[
        bool, typer.Option("--debug", help="show an error's traceback; may stand anywhere in a command")
    ] = False,
    allow_pickle: Annotated[
        bool,
        typer.Option("--allow-pickle", help="read pickled weights too, which can run code; may stand anywhere"),
    ] = False,
) -> None:
    """`run` takes the last two out of the arguments: here they are for --help alone."""


@app.command()
def train(
    recipe: Annotated[str, typer.Argument(help="a shipped recipe's name or a YAML file")],
    overrides: KeyValues = None,
    dry_run: DryRun = False,
    skip_bad: SkipBad = False,
    accept_changes: AcceptChanges = False,
    processes: ProcessCount = None,
) -> None:
    """Train a recipe from start to end. With run.dir=RUN, an interrupted run of the same recipe continues."""
    from finetune.config.load import load_recipe
    from finetune.config.placeholders import refuse_placeholder

    asked = load_recipe(recipe, [*(overrides or []), *_skipping(skip_bad)])
    refuse_placeholder(recipe, asked, overrides or [])
    _train(asked, dry_run, processes, accept_changes=accept_changes)


@app.command(context_settings={"allow_extra_args": True})
def resume(
    context: typer.Context,
    run: Annotated[Path, typer.Argument(help="a run folder")],
    photos: Annotated[Path | None, typer.Option(help="where the run's photos are now, if they moved")] = None,
    accept_changes: AcceptChanges = False,
    processes: ProcessCount = None,
) -> None:
    """Continue an interrupted run. The result is the same as without the interruption."""
    if context.args:
        raise BadInput(_no_other_settings(run, context.args))
    from finetune.jobs.nodes import recipe_to_resume

    recipe = recipe_to_resume(run, photos)
    _train(recipe, False, processes, run, accept_changes)


@app.command()
def dreambooth(
    photos: Annotated[str, typer.Argument(help="a folder with 3-10 photos of the subject")],
    class_noun: Annotated[str, typer.Option("--class-noun", help="what the subject is, such as dog")],
    overrides: KeyValues = None,
    base: BaseOption = "tiny",
    dry_run: DryRun = False,
    skip_bad: SkipBad = False,
    processes: ProcessCount = None,
) -> None:
    """Train a LoRA of one subject from a folder of photos. It is DreamBooth with class images; no recipe is needed."""
    from finetune.config.load import load_recipe

    own = [
        ("data.photos", photos),
        ("data.class_noun", class_noun),
        ("base", base),
        ("run.name", _file_name(class_noun)),
    ]
    _train(load_recipe("dreambooth-lora", [*own, *(overrides or []), *_skipping(skip_bad)]), dry_run, processes)


@app.command()
def demo(out: Annotated[Path | None, typer.Option("--out", help="the run folder")] = None) -> None:
    """Train on five images of a mug in minutes, without a GPU. It uses the built-in tiny base."""
    from finetune.jobs.demo import run_demo

    loud()
    run_demo(out, typer.echo)


@app.command()
def export(
    run: Annotated[Path, typer.Argument(help="a run's folder")],
    to: Annotated[
        list[str] | None, typer.Option("--to", help="kohya, diffusers, peft, lycoris, folder, checkpoint or embedding")
    ] = None,
    rank: Annotated[
        int | None, typer.Option("--rank", help="rank of the LoRA, if the trained weights must be converted into one")
    ] = None,
    max_error: Annotated[
        float | None, typer.Option("--max-error", help="largest relative error of that conversion, such as 0.1")
    ] = None,
    step: BestOption = None,
    out: Annotated[Path | None, typer.Option("--out", help="a folder; default: RUN/exports")] = None,
    verify: Annotated[str | None, typer.Option("--verify", help="full, deltas or off; default: the run's own")] = None,
) -> None:
    """Write a run's result as files for other programs. They are in RUN/exports, and every file is checked."""
    loud()
    from finetune.jobs.export import export_result

    given = {"export.rank": rank, "export.max_error": max_error, "export.verify": verify}
    overrides = [f"{key}={value}" for key, value in given.items() if value is not None]
    say_exported(export_result(run, to or [], step=_chosen_step(run, step), out=out, overrides=overrides))


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []})
def data(context: typer.Context) -> None:
    """Turn a pile of files into a training set."""
    from data_tools.__main__ import main as data_tools

    code = data_tools(context.args, "finetune data")
    if code:
        raise typer.Exit(code)


@app.command()
def report(
    run: Annotated[Path, typer.Argument(help="a run folder")],
    captions: Annotated[bool, typer.Option("--captions", help="show the captions from caption files")] = False,
    step: StepOption = None,
    out: Annotated[Path | None, typer.Option("--out", help="a file; default: RUN/report.html")] = None,
) -> None:
    """Write RUN/report.html again, or the page of a checkpoint."""
    from finetune.report.html import write_report
    from finetune.runs.folder import RunFolder

    folder = RunFolder(run)
    folder.recipe  # noqa: B018 - says so if this is no run folder
    if out is None:
        folder.refuse_work()
    begun = step is not None or folder.has_result or folder.checkpoints.steps()
    chosen = folder.step_to_open(step) if begun else None
    own = run / f"report-step-{step:06d}.html" if step is not None and chosen is not None else None
    typer.echo(str(write_report(run, captions, step=chosen, out=out or own)))


@app.command()
def doctor(
    rehash: Annotated[
        bool, typer.Option("--rehash", help="forget the stored hashes of bases and photos, and hash them again")
    ] = False,
) -> None:
    """Check what works on this machine. It says how to fix what does not."""
    loud()
    if rehash:
        from finetune.data.known_photos import forget_scans
        from finetune.families.digests import forget_hashes

        forget_hashes()
        forget_scans()
    from rich.console import Console
    from rich.table import Table

    from finetune.cli.doctor import examine

    table = Table("", "", "what to do", box=None)
    findings = examine()
    for item in findings:
        mark = {True: "[green]ok[/] ", False: "[red]bad[/] ", None: ""}[item.ok]
        table.add_row(item.name, f"{mark}{item.value}", item.advice)
    Console().print(table)
    bad = [item.name for item in findings if item.ok is False]
    if bad:
        raise CheckFailed(f"{', '.join(bad)}: see what to do above")


def _train(
    recipe: Recipe,
    dry_run: bool,
    processes: int | None,
    run: Path | None = None,
    accept_changes: bool = False,
) -> None:
    if processes:
        _launch_or_check(processes, dry_run)
        recipe = recipe.model_copy(update={"run": recipe.run.model_copy(update={"processes": None})})
    loud()
    from finetune.families.toy import expectation
    from finetune.jobs import train as job
    from finetune.jobs.hints import photo_hints
    from finetune.jobs.plan import plan
    from finetune.runs.plan import plan_lines

    if dry_run:
        hints = [f"{'hint':>16}  {hint}" for hint in [*recipe.borrowed, *photo_hints(recipe)]]
        for line in plan_lines(plan(job.check_run(recipe, processes))) + hints:
            say_row(line)
        return
    tell = say_row if is_main_process() else _silent
    path = job.train(recipe, run, tell, accept_changes=accept_changes)
    tell(f"done: look at {path}/report.html")
    expected = expectation(recipe.base.source, [subject.class_noun for subject in recipe.data.all_subjects])
    if expected:
        tell(f"note: {expected}")


def _no_other_settings(run: Path, more: list[str]) -> str:
    """Why `resume` takes nothing but the run's folder, and the command that does."""
    if not all("=" in text for text in more):
        return f"resume takes one run folder, and {more[0]!r:.200} is one too many: resume one run at a time"
    return train_instead(str(run), more)


def _chosen_step(run: Path, text: str | None) -> int | None:
    """A step's number, or the number of the best one."""
    from finetune.jobs.verdicts import best_step
    from finetune.runs.folder import RunFolder

    if text is None or text.isdecimal():
        return None if text is None else int(text)
    if text != "best":
        raise BadInput(f"--step is {text!r:.40}: give the number of a checkpoint's step, or best")
    step = best_step(RunFolder(run))
    say(f"the verdicts recommend step {step}")
    return step


def _file_name(noun: str) -> str:
    return re.sub(r"[^\w-]+", "-", noun).strip("-_") or "run"


def _skipping(skip_bad: bool) -> list[str]:
    return ["data.skip_bad=true"] if skip_bad else []


def _launch_or_check(processes: int, dry_run: bool) -> None:
    launched = os.environ.get("WORLD_SIZE")
    if launched is None and processes > 1 and not dry_run:
        raise _Launch(processes)
    if launched is not None and launched != str(processes):
        raise BadInput(
            f"--processes is {processes} but {launched} processes were started: leave --processes out under torchrun"
        )


def _silent(line: str) -> None:
    """Prints nothing: for the processes other than the main one."""


class _Launch(Exception):
    """Asks `run` to start the command in `processes` new processes instead of this one."""

    def __init__(self, processes: int) -> None:
        super().__init__()
        self.processes = processes


def run(arguments: list[str]) -> tuple[int, str]:
    """Runs a command; returns the exit code and the message to print (empty if there is none).

    Exit codes: 0 done, 1 a check failed, 2 bad input or a failed write, 128 + n stopped by signal n (130: SIGINT,
    143: SIGTERM).

    Raises:
        Exception: a bug in finetune; with `--debug` also the errors that are otherwise shown as one sentence.
    """
    debug = "--debug" in arguments
    end_with_launcher()
    quiet()
    printable()
    own = [argument for argument in arguments if argument not in ("--debug", "--allow-pickle")]
    try:
        with pickles_allowed("--allow-pickle" in arguments), progress_shown():
            app(own, prog_name="finetune")
    except SystemExit as end:
        return int(end.code or 0), ""
    except _Launch as wish:
        from finetune.cli.launch import launch

        return launch(wish.processes, run, arguments)
    except (BadInput, CheckFailed) as error:
        if debug:
            raise
        return (1 if isinstance(error, CheckFailed) else 2), f"error: {error}"
    except Stopped as stop:
        return 128 + stop.number, f"\n{stop}"
    except OSError as error:
        if debug or not disk_sentence(error):
            raise
        return 2, f"error: {disk_sentence(error)}"
    except (MemoryError, RuntimeError) as error:
        if debug or not _is_out_of_memory(error):
            raise
        return 2, f"error: {OUT_OF_MEMORY}"
    return 0, ""


def _is_out_of_memory(error: MemoryError | RuntimeError) -> bool:
    """torch has an error of its own for a GPU, and a RuntimeError with these words for main memory."""
    return isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError" or NO_MEMORY in str(error)


def main() -> None:
    """The `finetune` command. With `--debug`, an error shows its traceback instead of one sentence."""
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before torch: threads that wait take no core from others
    keep_freed_memory()
    code, message = run(sys.argv[1:])
    if message:
        typer.echo(plain(message), err=True)
    sys.exit(code)


if __name__ == "__main__":
    main()
