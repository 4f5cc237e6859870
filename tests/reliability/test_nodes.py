"""Several launchers, each with a disk of its own, as machines have: real torchrun agents and gloo on 127.0.0.1."""

from __future__ import annotations

import hashlib
import os
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from PIL import Image
from test_processes import entries_of, environment, losses
from work import wait_for_steps

SETTINGS = (
    "data.class_noun=mug", "data.token=zwx", "prior.count=2", "prior.others=null",
    "prior.steps=1", "prior.batch_size=1", "run.steps=8",
    "run.checkpoint_every=2", "run.batch_size=2", "run.ema=0.9", "sample.steps=1", "sample.count=1",
    "sample.prompts=['a {noun}']", "export.verify=off", "method.dropout=0.1", "objective.timesteps=stratified",
)  # fmt: skip
LONG = 240  # seconds until a test gives up: nothing depends on them


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Machine:
    """A folder with its own copy of base and photos, its own cache and its own runs; where it works."""

    def __init__(self, folder: Path, base: Path, photos: Path) -> None:
        folder.mkdir()
        self.folder, self.run = folder, folder / "runs" / "dreambooth"
        shutil.copytree(base, folder / "base")
        shutil.copytree(photos, folder / "photos")

    def train(self, *more: str) -> list[str]:
        return ["train", "dreambooth-lora", "base=base", "data.photos=photos", *SETTINGS, *more]

    def start(self, command: list[str], *torchrun: object) -> subprocess.Popen[str]:
        words = [sys.executable, "-m", "torch.distributed.run", *map(str, torchrun), "-m", "finetune", *command]
        own = environment() | {"FINETUNE_CACHE": str(self.folder / "cache")}
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        return subprocess.Popen(words, cwd=self.folder, env=own, **pipes)


def start_both(machines: list[Machine], *commands: list[str]) -> list[subprocess.Popen[str]]:
    port = free_port()
    place = ("--nnodes", 2, "--nproc_per_node", 1, "--master_addr", "127.0.0.1", "--master_port", port, "--node_rank")
    return [machine.start(commands[rank], *place, rank) for rank, machine in enumerate(machines)]


def ended(started: list[subprocess.Popen[str]]) -> list[tuple[int, str]]:
    return [(said, process.returncode)[::-1] for process in started for said in [process.communicate(timeout=LONG)[0]]]


def digest(run: Path) -> str:
    return hashlib.sha256((run / "adapter" / "trained.safetensors").read_bytes()).hexdigest()


def machines_in(folder: Path, base: Path, photos: Path) -> list[Machine]:
    folder.mkdir(exist_ok=True)
    return [Machine(folder / f"machine-{number}", base, photos) for number in (0, 1)]


@pytest.fixture(scope="module")
def unbroken(tiny_bases: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> list[Machine]:
    """A run of two machines that nobody stopped."""
    from conftest import write_photos

    folder = tmp_path_factory.mktemp("unbroken")
    machines = machines_in(folder / "two", tiny_bases["sd1"], write_photos(folder / "photos"))
    results = ended(start_both(machines, *[machine.train() for machine in machines]))
    assert [code for code, _ in results] == [0, 0], results
    return machines


def cached(machine: Machine, kind: str) -> set[str]:
    folder = machine.folder / "cache" / kind
    return {file.name for file in folder.rglob("*.png")} | set(entries_of(folder))


@pytest.mark.slow
def test_each_machine_has_what_it_needs_on_its_own_disk(unbroken: list[Machine]) -> None:
    first, second = unbroken
    for kind in ("latents", "prompts", "class-images"):
        assert cached(first, kind) == cached(second, kind) != set()
    assert first.run.is_dir()
    assert not second.run.exists(), "only the first one writes the run"


@pytest.mark.slow
def test_a_run_of_two_machines_survives_a_killed_agent(
    unbroken: list[Machine], tiny_bases: dict[str, Path], photos: Path, tmp_path: Path
) -> None:
    """The agent is killed, its worker and the other machine's end by themselves; the second machine has no run folder
    when both resume."""
    machines = machines_in(tmp_path / "two", tiny_bases["sd1"], photos)
    # every checkpoint is kept: the workers take steps until they notice that the agent is gone
    started = start_both(machines, *[machine.train("run.steps=100000", "run.keep=1000") for machine in machines])
    wait_for_steps(machines[0].run, 3)
    workers = [child for agent in started for child in psutil.Process(agent.pid).children(recursive=True)]
    assert len(workers) == 2
    started[1].kill()
    _, alive = psutil.wait_procs(workers, timeout=LONG)
    assert not alive, "a worker outlived its launcher"
    ended(started)
    shutil.rmtree(machines[1].folder / "runs", ignore_errors=True)
    recipe = machines[0].run / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace("steps: 100000", "steps: 8"))
    for later in (machines[0].run / "checkpoints").glob("step-*"):
        if int(later.name[-6:]) >= 8:
            shutil.rmtree(later)
    assert any((machines[0].run / "checkpoints").iterdir()), "it would start over, which is not the question here"
    results = ended(start_both(machines, *[["resume", "runs/dreambooth", "--photos", "photos"]] * 2))
    assert [code for code, _ in results] == [0, 0], results
    assert "resumes  after step" in results[0][1]
    assert digest(machines[0].run) == digest(unbroken[0].run)
    assert losses(machines[0].run) == losses(unbroken[0].run)


@pytest.mark.slow
def test_workers_that_torchrun_starts_again_continue_the_run_that_nobody_named(
    unbroken: list[Machine], tiny_bases: dict[str, Path], photos: Path, tmp_path: Path
) -> None:
    """A folder of that name is there before: the launch takes another, and stays with it."""
    machine = Machine(tmp_path / "machine", tiny_bases["sd1"], photos)
    machine.run.mkdir(parents=True)
    own = machine.run.with_name("dreambooth-2")
    process = machine.start(machine.train("run.checkpoint_every=1"), "--nproc_per_node", 2, "--max-restarts", 1)
    wait_for_steps(own, 3)
    os.kill(int((own / "run.lock.txt").read_text().split()[1]), signal.SIGKILL)
    ((code, said),) = ended([process])
    assert code == 0, said
    assert sorted(path.name for path in machine.run.parent.iterdir()) == ["dreambooth", "dreambooth-2"]
    assert "resumes  after step" in said
    assert digest(own) == digest(unbroken[0].run)
    caches = [entries_of(one.folder / "cache") for one in (machine, unbroken[0])]
    assert caches[0] == caches[1] != {}, "two shares of one cache are what one process alone makes"


@pytest.mark.slow
def test_a_machine_with_other_photos_or_another_recipe_is_refused_by_name(
    tiny_bases: dict[str, Path], photos: Path, tmp_path: Path
) -> None:
    machines = machines_in(tmp_path / "two", tiny_bases["sd1"], photos)
    Image.new("RGB", (48, 40), (1, 2, 3)).save(machines[1].folder / "photos" / "1.png")
    results = ended(start_both(machines, machines[0].train(), machines[1].train("data.flip=true")))
    for code, said in results:
        assert code != 0
        assert "data.flip is True and not False; the photo 1.png is not the same image" in said
        assert "process 1 on" in said
    assert not machines[0].run.exists()


SILENT = """
import time
from finetune.training.peers import together
with together() as peers:
    peers.wait()
    print("met", flush=True)
    if peers.rank:
        time.sleep(1000)
    peers.wait()
"""


@pytest.mark.slow
def test_a_process_that_falls_silent_is_named_and_ends_the_others() -> None:
    """Stopped, not killed: its connections stay, as those of a machine without power."""
    port = str(free_port())
    own = environment() | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    first, second = (
        subprocess.Popen(
            [sys.executable, "-c", SILENT],
            env=own | {"RANK": rank, "LOCAL_RANK": rank, "FINETUNE_PEER_TIMEOUT": "5"},
            **pipes,
        )
        for rank in "01"
    )
    try:
        assert second.stdout is not None
        assert second.stdout.readline() == "met\n"
        second.send_signal(signal.SIGSTOP)
        _, error = first.communicate(timeout=LONG)
        assert first.returncode == 2, error
        assert "process 1 of 2 has not been heard of for 5 seconds" in error
    finally:
        for process in (first, second):
            process.kill()
            process.communicate()
