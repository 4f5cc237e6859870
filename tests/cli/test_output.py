"""What the command and `finetune.train` say where there is no terminal, and what stands in --help."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import write_photos

from finetune import BadInput, __version__, load_recipe, train
from finetune.cli import output
from finetune.cli.help import SECTIONS
from finetune.cli.main import run

ROOT = Path(__file__).parents[2]
SHORT = (
    "run.steps=2", "prior.count=2", "prior.others=null",
    "prior.steps=1", "sample.steps=1", "sample.count=1", "sample.every=2",
    "sample.prompts=['a photo of {token} {noun}']", "optim.warmup=0",
)  # fmt: skip
PHASES = ("photos", "base", "before", "class images", "latents", "prompts", "training", "preview", "export kohya",
          "check kohya", "after")  # fmt: skip
HINT = f"{'hint':>16}"
NONE = "resume takes no settings, since it goes on with the run's own: use `finetune train"
NOISE = re.compile(r"LoRA keys|open an issue|it/s|Loading|Warning|gemm_4bit|peft_config", re.IGNORECASE)


def python(*arguments: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if not name.endswith("VERBOSITY")}
    environment |= {"PYTHONPATH": str(ROOT), "FINETUNE_CACHE": str(cwd / "cache"), "COLUMNS": "80"}
    environment.pop("HF_HUB_DISABLE_PROGRESS_BARS", None)
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=environment, check=False)


def assert_every_phase_is_told(lines: list[str]) -> None:
    for name in PHASES:
        told = [line for line in lines if re.match(rf" *{name}  (\d|begins|done)", line)]
        assert len(told) >= 2, f"{name} begins and ends: {told}"
    training = [line for line in lines if line.startswith("        training  ")]
    assert training[0].endswith("0 of 2 steps")
    assert re.search(r"1 of 2 steps, loss \d\.\d+, .* left$", training[1])
    assert re.search(r"2 of 2 steps, loss \d\.\d+, done after \d+:\d\d$", training[2])


@pytest.mark.slow
def test_a_run_into_a_file_is_told_in_plain_lines(tmp_path: Path) -> None:
    photos = write_photos(tmp_path / "photos")
    done = python("-m", "finetune", "dreambooth", photos, "--class-noun", "corgi", *SHORT, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert_every_phase_is_told(lines)
    assert "\x1b" not in done.stdout
    assert "\r" not in done.stdout
    assert not NOISE.search(done.stdout + done.stderr), done.stderr
    expected = [line for line in lines if "six kinds of things" in line]
    assert len(expected) == 2, "in the plan and at the end"
    assert all("It does not know 'corgi'" in line and "--base stable-diffusion" in line for line in expected)
    assert lines.index(expected[1]) == len(lines) - 1


@pytest.mark.slow
def test_python_logs_the_same_lines_without_noise_and_leaves_nothing_behind(tmp_path: Path) -> None:
    photos = write_photos(tmp_path / "photos")
    script = tmp_path / "work.py"
    script.write_text(f"""
import logging, finetune
from finetune import load_recipe, open_result, draw, export_result, Sampling
run = finetune.train(load_recipe("demo", ["data.photos={photos.as_posix()}", *{SHORT!r}]), "run")
family, info = open_result(run)
assert len(draw(family, ["a mug"], Sampling(steps=1), seeds=[0])) == 1
assert [item.format for item in export_result(run, ["kohya"])] == ["kohya"]
import transformers.utils.logging as t, diffusers.utils.logging as d
print(t.is_progress_bar_enabled(), d.is_progress_bar_enabled(), t.get_verbosity(), d.get_verbosity())
print(logging.getLogger("finetune").handlers, logging.getLogger("finetune").level, logging.getLogger("peft").level)
""")
    done = python(script, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    lines = done.stderr.splitlines()
    assert_every_phase_is_told(lines)
    assert not NOISE.search(done.stderr), done.stderr
    assert "    class images  2 of 'a photo of a mug', each seen" in done.stderr, "the plan"
    assert done.stdout.splitlines() == ["True True 30 30", "[] 0 0"]


def shown(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    capsys.readouterr()
    assert run(list(arguments)) == (0, "")
    return capsys.readouterr().out


def test_help_begins_with_an_example_and_what_is_needed_first(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    page = shown(capsys, "--help")
    places = [page.index(f"\n  {name} ") for names in SECTIONS.values() for name in names]
    assert places == sorted(places)
    assert next(iter(SECTIONS.values()))[:6] == ("demo", "dreambooth", "train", "sample", "evaluate", "export")
    assert page.index("finetune demo") < page.index("finetune dreambooth PHOTOS") < places[0]
    for option in ("--version", "--debug", "--allow-pickle", "--install-completion", "-h, --help"):
        assert page.index(option) > places[-1]
    assert "More:" not in page, "every command has its section"
    assert max(map(len, page.splitlines())) <= 80


@pytest.mark.parametrize("group", [[], ["recipes"], ["tokens"]])
def test_no_sentence_of_help_is_cut_at_80_columns(
    group: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    page = shown(capsys, *group, "-h")
    assert not [line for line in page.splitlines() if line.endswith("...") and "Usage" not in line]


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert shown(capsys, "--version") == f"finetune {__version__}\n"


def test_the_shell_completes_commands(tmp_path: Path) -> None:
    code = "from finetune.cli.main import main; main()"
    environment = os.environ | {
        "PYTHONPATH": str(ROOT), "_FINETUNE_COMPLETE": "complete_bash", "COMP_WORDS": "finetune dr", "COMP_CWORD": "1"
    }  # fmt: skip
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment, check=False)
    assert done.stdout.split() == ["dreambooth"], done.stderr


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        (("dreambooth", "p", "--class-noun", "dog", "--steps", "30"), "write the setting, run.steps=30 or "),
        (("train", "demo", "--lr=1e-3"), "write the setting, optim.lr=1e-3"),
        (("train", "demo", "--batch-size", "--dry-run"), "run.batch_size=VALUE"),
        (("train", "demo", "--dry"), "--dry-run"),
        (("resume", "x", "--steps", "3"), f"{NONE} x/recipe.yaml run.dir=x run.steps=3`"),
        (("resume", "--steps=3", "my runs/x"), f"{NONE} 'my runs/x/recipe.yaml' 'run.dir=my runs/x' run.steps=3`"),
        (("resume", "--processes", "2", "x", "--lr", "3"), f"{NONE} x/recipe.yaml run.dir=x optim.lr=3`"),
        (("resume", "--accept-changes", "x", "--lr"), f"{NONE} x/recipe.yaml run.dir=x optim.lr=VALUE`"),
        (("resume", "x", "run.steps=30", "--lr=3"), f"{NONE} x/recipe.yaml run.dir=x run.steps=30 optim.lr=3`"),
        (("resume", "--lr", "3"), f"{NONE} RUN/recipe.yaml run.dir=RUN optim.lr=3`"),
        (("resume", "x", "--dry-run"), f"{NONE} x/recipe.yaml run.dir=x --dry-run`"),
        (("resume", "x", "--photo", "p"), "--photos"),
    ],
)
def test_an_option_that_is_a_setting_is_told_as_one(
    typed: tuple[str, ...], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run([*typed])[0] == 2
    assert said in " ".join(capsys.readouterr().err.split())


def test_a_start_says_what_a_first_run_often_gets_wrong(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Before the base is read, so that the run can be stopped: here there is none."""
    photos = write_photos(tmp_path / "photos")
    for file in sorted(photos.iterdir())[1:]:
        file.unlink()
    typed = ["train", "dreambooth-lora", f"data.photos={photos}", "base=/nowhere/none"]
    assert run([*typed, "data.class_noun=a mug"])[0] == 2
    hints = [line.split(maxsplit=1)[1] for line in capsys.readouterr().out.splitlines() if line.startswith(HINT)]
    assert [hint.split(":")[0] for hint in hints] == ["data.class_noun is 'a mug'", "1 photo of photos"]
    assert run(typed)[0] == 2
    own = "data.class_noun is 'dog', which is the recipe's own example"
    assert capsys.readouterr().out.count(own) == 1
    lines: list[str] = []
    with pytest.raises(BadInput, match="/nowhere/none"):
        train(load_recipe("dreambooth-lora", {"data.photos": photos, "base": "/nowhere/none"}), say=lines.append)
    assert [line.split(":")[0].split(maxsplit=1)[1] for line in lines] == [own, "1 photo of photos"]


@pytest.mark.parametrize("command", [["plan"], ["train", "--dry-run"]], ids=["plan", "dry run"])
def test_a_plan_is_wrapped_in_a_terminal_alone(
    command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A pipe gets each row as one line, whatever COLUMNS says; in a terminal, values have a column of their own."""
    photos = write_photos(tmp_path / "photos")
    for photo in photos.glob("*.png"):
        photo.with_suffix(".txt").write_text("a {token} {noun} " + "on a green table " * 5, encoding="utf-8")
    monkeypatch.setattr(output.Progress, "enable", lambda self: None)
    monkeypatch.setenv("COLUMNS", "70")
    words = [*command, "dreambooth-lora", f"data.photos={photos}", "data.captions=files"]
    assert run(words) == (0, "")
    rows = capsys.readouterr().out.splitlines()
    assert all(line[:16].strip() and line[16:18] == "  " for line in rows)
    assert max(map(len, rows)) > 160
    monkeypatch.setattr(output, "in_terminal", lambda: True)
    assert run(words) == (0, "")
    wrapped = capsys.readouterr().out.splitlines()
    assert max(map(len, wrapped)) <= 70
    assert [line[:16] for line in wrapped if line[:18].strip()] == [line[:16] for line in rows]
    assert " ".join(wrapped).split() == " ".join(rows).split()


@pytest.mark.parametrize("columns", ["10", "0", "many"])
def test_a_narrow_terminal_still_gets_words(
    columns: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Words are not cut, as paths are among them."""
    monkeypatch.setattr(output, "in_terminal", lambda: True)
    monkeypatch.setenv("COLUMNS", columns)
    value = f"{'/a-long-folder' * 9} {'word ' * 30}end"
    output.say_row(f"{'photos':>16}  {value}")
    printed = capsys.readouterr().out
    assert printed.split() == ["photos", *value.split()]
    assert printed.count("\n") > 1


def test_a_runs_own_rows_are_wrapped_as_a_plans_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """And other text is not: a path that was broken could not be copied."""
    monkeypatch.setattr(output.Progress, "enable", lambda self: None)
    monkeypatch.setattr(output, "in_terminal", lambda: True)
    monkeypatch.setenv("COLUMNS", "60")
    words = ["train", "dreambooth-lora", f"data.photos={write_photos(tmp_path / 'photos')}", "data.class_noun=a mug"]
    assert run([*words, "base=/nowhere/none"])[0] == 2
    hints = capsys.readouterr().out.splitlines()
    assert "leave 'a' out" in " ".join(" ".join(hints).split())
    assert max(map(len, hints)) <= 60
    output.say_row(f"done: look at {'/a folder' * 20}")
    assert capsys.readouterr().out.count("\n") == 1
