"""The command as a person meets it: exit codes, sentences, no traceback, a quick --help."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image

from finetune.cli.main import main

COMMANDS = (
    [], ["train"], ["resume"], ["dreambooth"], ["demo"], ["sample"], ["evaluate"], ["export"], ["report"], ["doctor"],
    ["recipes"], ["recipes", "list"], ["recipes", "copy"], ["tokens"], ["tokens", "suggest"], ["tokens", "check"],
    ["plan"], ["inspect"], ["verify"], ["convert"], ["resize"], ["merge"], ["extract"],
)  # fmt: skip
HEAVY = ("torch", "diffusers", "transformers", "peft", "accelerate", "numpy", "PIL")

Done = subprocess.CompletedProcess[str]
Command = Callable[..., Done]


@pytest.fixture
def finetune(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Command:
    """The command in this process, in tmp_path: one of its own takes five seconds to import torch and diffusers."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")

    def call(*arguments: object) -> Done:
        monkeypatch.setattr(sys, "argv", ["finetune", *map(str, arguments)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as ended:
            main()
        said = capfd.readouterr()
        return Done(sys.argv, int(ended.value.code or 0), said.out, said.err)

    return call


def shell(*arguments: object, cwd: Path, program: list[str] | None = None) -> Done:
    command = [sys.executable, "-m", *(program or ["finetune"]), *map(str, arguments)]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2]), "COLUMNS": "200", "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=environment, check=False)


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_help_imports_nothing_heavy(command: list[str]) -> None:
    program = (
        "import sys; from finetune.cli.main import app\n"
        f"try: app({[*command, '--help']!r})\n"
        "except SystemExit: pass\n"
        f"sys.exit(any(name in sys.modules for name in {HEAVY!r}))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "Usage" in done.stdout


def assert_one_sentence(done: Done, *words: str, code: int = 2) -> None:
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, done.stderr
    assert all(word in lines[0] for word in words), lines[0]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["train", "demmo"], ("demmo", "did you mean 'demo'")),
        (["resume", "/nowhere"], ("/nowhere", "run folder")),
        (["dreambooth", "/nowhere", "--class-noun", "dog"], ("/nowhere",)),
    ],
)
@pytest.mark.slow
def test_bad_input_is_one_sentence_and_exit_2(arguments: list[str], words: tuple[str, ...], tmp_path: Path) -> None:
    """As the shell sees it; all the other cases are in reliability/test_bad_input.py."""
    assert_one_sentence(shell(*arguments, cwd=tmp_path), *words)
    assert not list(tmp_path.iterdir())


def test_debug_shows_the_traceback(tmp_path: Path) -> None:
    assert "Traceback" in shell("train", "nothing", "--debug", cwd=tmp_path).stderr


def test_recipes_are_listed_shown_copied_and_described(finetune: Command, tmp_path: Path) -> None:
    assert "demo" in finetune("recipes", "list").stdout
    shown = finetune("recipes", "show", "demo").stdout
    assert finetune("recipes", "copy", "demo").returncode == 0
    assert (tmp_path / "demo.yaml").read_text() == shown
    assert_one_sentence(finetune("recipes", "copy", "demo"), "demo.yaml")
    assert finetune("recipes", "schema").returncode == 0
    assert "properties" in json.loads((tmp_path / "recipe.schema.json").read_text())


def test_doctor_tells_what_works(finetune: Command) -> None:
    done = finetune("doctor")
    assert done.returncode == 0, done.stdout + done.stderr
    for word in ("torch", "bitsandbytes", "bf16", "fp16", "adamw8bit", "free space", "hub"):
        assert word in done.stdout


def test_doctor_tries_every_optimiser(monkeypatch: pytest.MonkeyPatch) -> None:
    """What can't work here is told with its reason and is no fault of the machine; a wrong step is one."""
    from finetune.cli.doctor import _optimisers
    from finetune.optim.adamw import AdamW
    from finetune.optim.registry import OPTIMISERS

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    found = {item.name: item for item in _optimisers()}
    assert list(found) == [f"optim.kind {kind}" for kind in OPTIMISERS]
    paged = found.pop("optim.kind paged_adamw8bit")
    assert (paged.ok, paged.value) == (None, "not on this machine")
    assert "needs an NVIDIA GPU" in paged.advice
    assert paged.advice.endswith("use optim.kind=adamw8bit")
    assert all(item.ok for item in found.values()), found
    monkeypatch.setitem(sys.modules, "prodigyopt", None)
    missing = next(item for item in _optimisers() if item.name == "optim.kind prodigy")
    assert (missing.ok, missing.value) == (None, "not on this machine")
    assert "needs the package prodigyopt" in missing.advice
    assert missing.advice.endswith("pip install prodigyopt")
    monkeypatch.setattr(AdamW, "build", lambda self, trained: torch.optim.SGD(trained.values(), maximize=True))
    wrong = next(item for item in _optimisers() if item.name == "optim.kind adamw")
    assert wrong.ok is False


@pytest.mark.slow
def test_tokens_are_suggested_and_checked(finetune: Command) -> None:
    found = finetune("tokens", "suggest", "-n", "2")
    assert found.returncode == 0, found.stderr
    assert len(found.stdout.splitlines()) == 2
    assert "for the base tiny, the toy" in found.stderr  # which nobody named
    best = found.stdout.split()[0]
    assert finetune("tokens", "check", best).returncode == 0
    bad = finetune("tokens", "check", "mug")
    assert_one_sentence(bad, "mug", "tokens suggest", code=1)
    assert "rifle" in finetune("tokens", "check", "sks").stdout


SHORT = (
    "run.steps=2", "prior.count=2", "prior.others=null", "prior.steps=1", "sample.steps=1", "sample.count=1",
    "sample.prompts=['a photo of {token} {noun}']", "run.checkpoint_every=1",
)  # fmt: skip


@pytest.mark.slow
def test_from_photos_to_pictures(finetune: Command, photos: Path, tmp_path: Path) -> None:
    """dreambooth, dry and real; sample from the run and from the file; export; a changed recipe; going on.

    The run that trains is one of the shell."""
    dry = finetune("dreambooth", photos, "--class-noun", "mug", "--dry-run", *SHORT)
    assert dry.returncode == 0, dry.stderr
    assert "token" in dry.stdout
    assert not (tmp_path / "runs").exists()

    done = shell("dreambooth", photos, "--class-noun", "mug", *SHORT, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    run = tmp_path / "runs" / "mug"
    assert (run / "recipe.yaml").is_file()
    assert "report.html" in done.stdout

    drawing = ["-p", "a photo of a mug", "--count", "2", "--steps", "1", "--out"]
    assert finetune("sample", run, *drawing, tmp_path / "a").returncode == 0
    file = run / "exports" / "mug.safetensors"
    assert finetune("sample", file, *drawing, tmp_path / "b").returncode == 0
    assert Image.open(tmp_path / "a" / "00-0.png").info["parameters"].startswith("a photo of a mug\n")
    assert (tmp_path / "b" / "grid.png").is_file()

    exported = finetune("export", run, "--to", "kohya", "--to", "peft")
    assert exported.returncode == 0, exported.stderr
    assert "ComfyUI" in exported.stdout
    assert_one_sentence(finetune("export", run, "--to", "kohia"), "kohia", "kohya")

    recipe = run / "recipe.yaml"
    assert_one_sentence(finetune("train", recipe, f"run.dir={run}", "optim.lr=0.5"), "optim.lr")
    bent = finetune("train", recipe, f"run.dir={run}", "run.steps=3")
    assert_one_sentence(bent, "optim.schedule_steps=2")
    longer = finetune("train", recipe, f"run.dir={run}", "run.steps=3", "optim.schedule_steps=2")
    assert longer.returncode == 0, longer.stderr
    assert [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()] == [1, 2, 3]
    assert finetune("resume", run).returncode == 0


@pytest.mark.slow
def test_two_processes_make_one_run(
    finetune: Command, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torchrun: one folder, said once; the losses are those of one (test_processes.py compares weights)."""
    arguments = ["train", "demo", f"data.photos={photos}", "data.class_noun=mug", *SHORT, "run.batch_size=2"]
    port = str(29900 + os.getpid() % 90)
    torchrun = ["torch.distributed.run", "--nproc_per_node", "2", "--master_port", port, "-m", "finetune"]

    def alone() -> Done:
        monkeypatch.chdir(tmp_path / "one")
        return finetune(*arguments)

    ways = {"one": alone, "two": lambda: shell(*arguments, cwd=tmp_path / "two", program=torchrun)}
    losses = {}
    for name, run in ways.items():
        (tmp_path / name).mkdir()
        done = run()
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("run folder") == 1
        assert [path.name for path in (tmp_path / name / "runs").iterdir()] == ["demo"]
        lines = (tmp_path / name / "runs" / "demo" / "metrics.jsonl").read_text().splitlines()
        losses[name] = [json.loads(line)["loss"] for line in lines]
    assert losses["two"] == pytest.approx(losses["one"], rel=1e-4)
