"""Any number of processes, one result; and what happens when one of them dies, or was never started."""

from __future__ import annotations

import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType

import psutil
import pytest
import torch
import work
from ends import metrics, weights
from PIL import Image
from safetensors.torch import load_file
from work import methods_of, wait_for_steps

from finetune.cli.main import run as finetune
from finetune.jobs.verdicts import best_step
from finetune.runs.folder import RunFolder
from finetune.training.checkpoint import Checkpoints
from finetune.verdicts.rows import read_rows

ROOT = Path(__file__).parents[2]
PROGRAM = """
import sys, {module}
from finetune.cli.launch import launch
code, message = launch({count}, {name}, sys.argv[1:])
print(message, file=sys.stderr)
sys.exit(code)
"""


def environment() -> dict[str, str]:
    """With a cache of its own: not that of whoever runs the tests, which may hold images of an older version."""
    path = os.pathsep.join([str(ROOT), str(Path(__file__).parent)])
    cache = str(Path(os.environ["FINETUNE_CACHE"]) / "processes")
    return os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "FINETUNE_CACHE": cache}


def processes(count: int, name: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    program = PROGRAM.format(count=count, name=name, module=name.split(".")[0])
    command = [sys.executable, "-c", program, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=environment(), timeout=1200, check=False)


def one_and_two(work: ModuleType, name: str, out: Path, *arguments: object) -> None:
    """`work.name` in this process, with results in out/1, then in two of their own, with results in out/2."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FINETUNE_CACHE", "")  # the work sets it
        code, message = getattr(work, name)([str(out / "1"), *map(str, arguments)])
    assert code == 0, message
    done = processes(2, f"{work.__name__}.{name}", out / "2", *arguments)
    assert done.returncode == 0, done.stderr[-3000:]


def distance(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    """|one - other| / |one| over all weights."""
    assert one.keys() == other.keys()
    apart = sum(float((one[name] - other[name]).double().square().sum()) for name in one)
    return (apart / sum(float(value.double().square().sum()) for value in one.values())) ** 0.5


def losses(run: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]


def class_images(cache: Path) -> dict[str, str]:
    return {
        str(file.relative_to(cache)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in (cache / "class-images").rglob("*.png")
    }


def entries_of(cache: Path) -> dict[str, str]:
    """Key of each entry in the shards below a folder -> SHA-256 over its values."""
    found = {}
    for file in cache.rglob("*.safetensors"):
        tensors = load_file(file)
        keys = tensors.pop("keys", None)
        if keys is None:  # not a shard
            found[file.name] = hashlib.sha256(file.read_bytes()).hexdigest()
            continue
        del tensors["digests"]
        for row, key in enumerate(keys):
            values = b"".join(tensors[name][row].numpy().tobytes() for name in sorted(tensors))
            found[f"{file.parent.name}/{bytes(key.tolist()).hex()}"] = hashlib.sha256(values).hexdigest()
    return found


@pytest.mark.slow
def test_one_and_two_processes_end_equal(tiny_bases: dict[str, Path], photos: Path, tmp_path: Path) -> None:
    """LoRA and full on every kind of family, DoRA (dropout in it, too) and LoKr on SD1; text encoders trained too: 20
    steps of four."""
    names = ("sd1", "sdxl", "sd3", "flux")
    one_and_two(work, "work", tmp_path, photos, *(tiny_bases[name] for name in names))
    runs = sorted(path.name for path in (tmp_path / "1" / "runs").iterdir())
    assert runs == sorted(f"{base}-{method}" for base in names for method in methods_of(base))
    for name in runs:
        one, two = (tmp_path / count / "runs" / name for count in ("1", "2"))
        assert len(losses(one)) == 20
        assert losses(two) == pytest.approx(losses(one), rel=1e-5)
        weights = [load_file(run / "adapter" / "trained.safetensors") for run in (one, two)]
        assert distance(*weights) < 1e-5, name
    images = class_images(tmp_path / "1" / "cache")
    assert len(images) == 5 * len(names)
    assert class_images(tmp_path / "2" / "cache") == images
    written = (tmp_path / "2" / "written.txt").read_text().splitlines()
    shared = ("/cache/class-images", "/cache/latents", "/cache/prompts", "file-hashes.json")  # its share of the work
    odd = [line for line in written if not line.endswith("/cache") and not any(name in line for name in shared)]
    entries = entries_of(tmp_path / "1" / "cache" / "latents")
    assert entries_of(tmp_path / "2" / "cache" / "latents") == entries, "dealt out, they are the same bits"
    renamed = [line for line in written if "/cache/latents/" in line and line.startswith("os.rename")]
    own = {name for line in renamed for name in re.findall(r"[0-9a-f]{64}\.safetensors", line)}
    shards = [file for file in (tmp_path / "2" / "cache" / "latents").rglob("*.safetensors") if file.name in own]
    assert 0.3 * len(entries) < sum(len(load_file(file)["keys"]) for file in shards) < 0.7 * len(entries)
    assert not odd, "the second process wrote what is the first one's to write"


@pytest.mark.slow
def test_priors_without_class_images_do_not_depend_on_the_processes(
    tiny_bases: dict[str, Path], photos: Path, tmp_path: Path
) -> None:
    """What is added to the loss is averaged over the processes as the loss is; LoRA (with dropout) and full. With no
    prior of the class, images of everything else (tests/jobs/test_others.py has parts of unequal size)."""
    one_and_two(work, "priors", tmp_path, photos, tiny_bases["sd1"])
    runs = sorted(path.name for path in (tmp_path / "1" / "runs").iterdir())
    assert runs == [
        f"{method}-{prior}" for method in ("full", "lora") for prior in ("distance", "frozen_base", "none")
    ]
    for name in runs:
        one, two = (tmp_path / count / "runs" / name for count in ("1", "2"))
        assert losses(two) == pytest.approx(losses(one), rel=1e-5)
        assert distance(*[load_file(run / "adapter" / "trained.safetensors") for run in (one, two)]) < 1e-5, name


@pytest.mark.slow
def test_verdicts_do_not_depend_on_the_processes(tiny_bases: dict[str, Path], photos: Path, tmp_path: Path) -> None:
    """Not measured, measured, and stopped in between, with images of everything else and EMA: no bit of the run
    changes with any number of processes, and the curves are the same up to the rounding of the weights."""
    one_and_two(work, "verdicts", tmp_path, photos, tiny_bases["sd1"])
    curves = []
    for count in ("1", "2"):
        off, on, stopped = (tmp_path / count / "runs" / name for name in ("off", "on", "stopped"))
        for other in (on, stopped):
            wanted, found = weights(off), weights(other)
            assert metrics(other) == metrics(off)
            assert all(torch.equal(value, found[name]) for name, value in wanted.items())
        assert not (off / "verdicts.jsonl").exists()
        rows, again = (read_rows(run / "verdicts.jsonl") for run in (on, stopped))
        assert [row.step for row in rows] == [0, 2, 4, 6, 8]
        assert [row.values for row in again] == [row.values for row in rows]
        kept = [Checkpoints(run).steps() for run in (on, stopped)]
        assert kept[0] == kept[1] == sorted({best_step(RunFolder(on)), 8})
        curves.append(rows)
    for one, two in zip(*curves, strict=True):
        assert two.values == pytest.approx(one.values, rel=1e-3, abs=1e-4)
        assert one.step == 0 or any(abs(value) > 1e-2 for value in one.values.values())


def command(base: Path, photos: Path, run: Path, *more: str) -> list[str]:
    return [
        "train", "dreambooth-lora", f"base={base}", f"data.photos={photos}", "data.class_noun=mug", "prior.count=2",
        "prior.steps=1", "prior.others=null",
        f"run.dir={run}", "sample.steps=1", "sample.count=1", "run.batch_size=2", *more,
    ]  # fmt: skip


def start(*arguments: object) -> subprocess.Popen[str]:
    words = [sys.executable, "-m", "finetune", *map(str, arguments)]
    return subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment())


@pytest.mark.slow
def test_buckets_and_masks_are_the_same_on_two_processes(
    tiny_bases: dict[str, Path], photos: Path, tmp_path: Path
) -> None:
    """Photos of four shapes, two of them masked; batches of four with padding: whole, in micro-batches, on two."""
    for name, size in (("tall", (40, 60)), ("wide", (66, 44)), ("strip", (300, 30))):
        Image.effect_noise(size, 80).convert("RGB").save(photos / f"{name}.png")
    for name, size in (("tall", (40, 60)), ("0", (48, 40))):
        Image.linear_gradient("L").resize(size).save(photos / f"{name}.mask.png")
    more = ("data.shape=buckets", "data.masks=auto", "data.flip=true", "run.batch_size=4", "run.steps=10")
    ways = {"one": (), "two": (), "cut": ("run.accumulate=2",)}
    commands = {n: command(tiny_bases["sdxl"], photos, tmp_path / n, *more, *way) for n, way in ways.items()}
    assert finetune(commands["one"]) == (0, "")
    done = processes(2, "work.commands", *(json.dumps(commands[name]) for name in ("two", "cut")))
    assert done.returncode == 0, done.stderr[-3000:]
    weights = {name: load_file(tmp_path / name / "adapter" / "trained.safetensors") for name in ways}
    for name in ("two", "cut"):
        assert losses(tmp_path / name) == pytest.approx(losses(tmp_path / "one"), rel=1e-5)
        assert distance(weights["one"], weights[name]) < 1e-5, name


def second_process(launcher: int, run: Path) -> psutil.Process:
    first = int((run / "run.lock.txt").read_text().split()[1])
    workers = [child for child in psutil.Process(launcher).children() if "spawn_main" in " ".join(child.cmdline())]
    (second,) = [child for child in workers if child.pid != first]
    return second


@pytest.mark.slow
def test_a_process_that_dies_ends_the_run_and_the_run_goes_on_with_one(
    tiny_bases: dict[str, Path], photos: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    arguments = command(tiny_bases["sd1"], photos, run, "run.checkpoint_every=2")
    with start(*arguments, "--processes", "2", "run.steps=100000") as process:
        wait_for_steps(run, 5)
        second_process(process.pid, run).kill()
        began = time.monotonic()
        _, error = process.communicate(timeout=60)
    assert time.monotonic() - began < 60
    assert process.returncode == 2, error
    assert "process 1 of 2 was ended by SIGKILL" in error
    assert "Traceback" not in error
    reached = int(sorted((run / "checkpoints").iterdir())[-1].name[-6:])
    assert reached >= 4
    text = (run / "recipe.yaml").read_text().replace("steps: 100000", f"steps: {reached + 2}")
    (run / "recipe.yaml").write_text(text)
    assert finetune(["resume", str(run)]) == (0, "")
    assert len(losses(run)) == reached + 2


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_all_of_them_after_the_same_step(
    number: signal.Signals, tiny_bases: dict[str, Path], photos: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    arguments = command(tiny_bases["sd1"], photos, run, "run.checkpoint_every=100000", "run.steps=100000")
    with start(*arguments, "--processes", "2") as process:
        wait_for_steps(run, 3)
        process.send_signal(number)
        _, error = process.communicate(timeout=60)
    assert process.returncode == 128 + number, error
    assert error.count(f"finetune resume {run}") == 1
    (saved,) = (run / "checkpoints").iterdir()
    assert int(saved.name[-6:]) == len(losses(run)) >= 3


@pytest.mark.slow
def test_a_launch_that_does_not_fit_the_batch_is_refused_once(
    tiny_bases: dict[str, Path], photos: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    with start(*command(tiny_bases["sd1"], photos, run, "--processes", "3")) as process:
        _, error = process.communicate(timeout=120)
    assert_refused(process.returncode, error, run, ("run.batch_size 2", "3 processes", "multiple of 3"))


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["run.processes=2"], ("run.processes is 2 but 1 process", "--processes 2")),
        (["--processes", "0"], ("--processes", "at least 1")),
    ],
)
def test_a_launch_that_is_not_what_was_asked_for_is_refused(
    more: list[str], words: tuple[str, ...], photos: Path, tmp_path: Path, tiny_bases: dict[str, Path],
    capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    run = tmp_path / "run"
    code, message = finetune(command(tiny_bases["sd1"], photos, run, *more))
    assert_refused(code, capfd.readouterr().err + message, run, words)


def assert_refused(code: int, error: str, run: Path, words: tuple[str, ...]) -> None:
    assert code == 2, error
    assert "Traceback" not in error
    assert all(word in error for word in words), error
    assert error.lower().count("error") == 1, error
    assert not run.exists()


@pytest.mark.slow
def test_a_bad_step_of_one_process_stops_all_and_names_everything(tiny_bases: dict[str, Path], tmp_path: Path) -> None:
    done = processes(2, "work.one_bad_rank", tmp_path, tiny_bases["sd1"])
    assert done.returncode == 1, done.stderr
    assert done.stderr.count("step 3 is not finite (loss nan)") == 1
    facts = json.loads((tmp_path / "bad-step-000003" / "step.json").read_text())
    assert [item["sample"] for item in facts["samples"]] == [0, 1, 2, 3]
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-000002"]
