"""Sharded weights: the run of one process, in half the memory, from and to any number of processes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import work_shards
from conftest import write_photos
from safetensors.torch import load_file
from test_processes import distance, losses, processes
from test_trainer import Memory
from torch import distributed

from finetune.config.load import load_recipe
from finetune.core.errors import BadInput
from finetune.families.hollow import Hollow
from finetune.families.source import load_family
from finetune.methods.full import Full
from finetune.methods.lora import LoRA
from finetune.objectives.registry import build_objective
from finetune.objectives.settings import ObjectiveSettings
from finetune.training.accelerate import make_accelerator
from finetune.training.checkpoint import Checkpoints, State, read_state, sign
from finetune.training.fsdp import CutWeights
from finetune.training.settings import Run
from finetune.training.shard_files import Layout, read_pieces, write_shards
from finetune.training.step import Step, parts_of

FITS = ("sd1-full", "sdxl-lora", "flux-lora", "flux-full", "sd1-adamw8bit", "sd1-narrow")
JOBS = ("sd1-lora",)


def last(run: Path) -> State:
    found = Checkpoints(run).latest()
    assert found is not None
    return found


def without_its_end(run: Path, copy: Path) -> None:
    shutil.copytree(run, copy)
    shutil.rmtree(copy / "checkpoints" / "step-000004")


@pytest.fixture(scope="module")
def both(tiny_bases: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders "1" (one process) and "2" (two, sharded) with everything; "1 to 2" and "2 to 2" went on with two
    processes from step 2, "2 to 1" with one."""
    out = tmp_path_factory.mktemp("shards")
    bases, photos = tiny_bases["sd1"].parent, write_photos(out / "photos")
    work_shards.fits([str(out / "1"), str(bases), "whole", *FITS])
    without_its_end(out / "1" / "sd1-full", out / "1 to 2" / "sd1-full")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FINETUNE_CACHE", "")  # the work sets it
        assert work_shards.jobs([str(out / "1"), str(photos), str(bases), "[]", *JOBS]) == (0, "")
    done = processes(2, "work_shards.everything", out, photos, bases, json.dumps([FITS, JOBS]))
    assert done.returncode == 0, done.stderr[-3000:]
    without_its_end(out / "2" / "sd1-full", out / "2 to 1" / "sd1-full")
    work_shards.fits([str(out / "2 to 1"), str(bases), "whole", "sd1-full"])
    return out


@pytest.mark.slow
@pytest.mark.parametrize("name", FITS)
def test_two_sharded_processes_end_as_one(name: str, both: Path) -> None:
    one, two = both / "1" / name, both / "2" / name
    assert (last(one).pieces, last(two).pieces) == (1, 2)
    assert losses(two) == pytest.approx(losses(one), rel=1e-5)
    # 8-bit moments are rounded in blocks, which are cut differently
    assert distance(last(one).trained, last(two).trained) < (1e-3 if "8bit" in name else 1e-5)
    assert not last(one).ema or distance(last(one).ema, last(two).ema) < 1e-5


@pytest.mark.slow
def test_four_sharded_processes_end_as_one_in_a_quarter_of_its_memory(both: Path, tiny_bases: dict[str, Path]) -> None:
    done = processes(4, "work_shards.fits", both / "4", tiny_bases["sd1"].parent, "shard", "flux-full")
    assert done.returncode == 0, done.stderr[-3000:]
    one, four = both / "1" / "flux-full", both / "4" / "flux-full"
    assert last(four).pieces == 4
    assert losses(four) == pytest.approx(losses(one), rel=1e-5)
    assert distance(last(one).trained, last(four).trained) < 1e-5
    alone = json.loads((one / "memory-0.json").read_text())
    shared = [json.loads((four / f"memory-{rank}.json").read_text()) for rank in range(4)]
    assert max(shared) <= 0.28 * alone
    assert sum(shared) >= alone


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sd1-full", "sdxl-lora", "flux-full", "flux-lora", "sd1-adamw8bit"])
def test_each_holds_half_of_weights_gradients_state_and_averages(name: str, both: Path) -> None:
    alone, *shared = (json.loads((both / file).read_text()) for file in (
        f"1/{name}/memory-0.json", f"2/{name}/memory-0.json", f"2/{name}/memory-1.json",
    ))  # fmt: skip
    assert max(shared) <= 0.55 * alone
    assert sum(shared) >= alone


@pytest.mark.slow
def test_a_run_goes_on_with_another_number_of_processes(both: Path) -> None:
    wanted = last(both / "1" / "sd1-full").trained
    for way in ("1 to 2", "2 to 1"):
        assert distance(wanted, last(both / way / "sd1-full").trained) < 1e-5, way
    same, again = (last(both / way / "sd1-full") for way in ("2", "2 to 2"))
    for part in ("trained", "optimizer", "ema"):
        found = getattr(again, part)
        assert all(torch.equal(value, found[key]) for key, value in getattr(same, part).items()), part


@pytest.mark.slow
@pytest.mark.parametrize("name", JOBS)
def test_a_sharded_job_ends_as_one_of_one_process(name: str, both: Path) -> None:
    """From the recipe to the adapter: the base read block by block, a prior, checkpointing, and what rank 0 writes."""
    one, two = (both / count / "runs" / name for count in ("1", "2"))
    assert losses(two) == pytest.approx(losses(one), rel=1e-5)
    assert distance(*(load_file(run / "adapter" / "trained.safetensors") for run in (one, two))) < 1e-5
    assert json.loads((two / "exports.json").read_text())


@pytest.mark.slow
def test_moments_in_blocks_stay_with_their_number_of_processes(both: Path, tiny_bases: dict[str, Path]) -> None:
    shutil.copytree(both / "2" / "sd1-adamw8bit", both / "odd" / "sd1-adamw8bit")
    with pytest.raises(BadInput, match=r"adamw8bit in blocks of 2 pieces.* run.shard=true and 2 process"):
        work_shards.fits([str(both / "odd"), str(tiny_bases["sd1"].parent), "whole", "sd1-adamw8bit"])


@pytest.mark.parametrize("name", ["sd1", "sd3"])
def test_a_base_read_block_by_block_is_the_base(name: str, tiny_bases: dict[str, Path]) -> None:
    """And until then its weights take no memory, also with an adapter on them."""
    whole, family = load_family(str(tiny_bases[name])), load_family(str(tiny_bases[name]))
    hollow = Hollow(family.sources["denoiser"], family.folder, torch.float32)
    assert sum(weight.untyped_storage().nbytes() for weight in hollow.module.parameters()) < 2000
    family.parts["denoiser"] = hollow.module
    for one in (whole, family):
        LoRA(rank=2).attach(one, 0)
    hollow.fill(hollow.module)
    wanted, found = (one.parts["denoiser"].state_dict() for one in (whole, family))
    assert wanted.keys() == found.keys()
    assert all(torch.equal(value, found[key]) for key, value in wanted.items())


def test_a_part_whose_files_hold_other_weights_is_not_read_block_by_block(
    tiny_bases: dict[str, Path], tmp_path: Path
) -> None:
    base = shutil.copytree(tiny_bases["sd1"], tmp_path / "base")
    config = base / "unet" / "config.json"
    config.write_text(config.read_text().replace('"in_channels": 4', '"in_channels": 5'))
    with pytest.raises(BadInput, match=r"other names or shapes than the model, such as conv_in.weight"):
        Hollow(load_family(str(tiny_bases["sd1"])).sources["denoiser"], base, torch.float32)


@pytest.mark.parametrize("world", [1, 2, 3, 8])
def test_rows_are_cut_as_torch_cuts_them(world: int) -> None:
    for count in (1, 2, 3, 5, 8, 17):
        values = torch.arange(count)
        pieces = list(values.chunk(world))
        for rank in range(world):
            first, after = Layout({}, [], rank, world).rows(count)
            assert values[first:after].tolist() == (pieces[rank].tolist() if rank < len(pieces) else [])


@pytest.fixture
def group() -> Iterator[None]:
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


@pytest.mark.usefixtures("group")
def test_a_checkpoint_of_pieces_is_what_was_trained(tiny_bases: dict[str, Path], tmp_path: Path) -> None:
    """One process that holds all pieces. torch's own reader of these files is the judge."""
    from torch.distributed.checkpoint import load
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader

    run = Run(batch_size=4)
    family = load_family(str(tiny_bases["sd1"]))
    trained = Full().attach(family, 0)
    before = {name: value.detach().clone() for name, value in trained.items()}
    step = Step(
        family, parts_of(trained), build_objective(ObjectiveSettings(), family.schedule), family.encode_prompts
    )
    held = CutWeights(step, trained, make_accelerator(run, False))
    optimizer = torch.optim.SGD(held.parameters.values(), lr=0.1)
    step.move_to(torch.device("cpu"))
    held.prepared(step, optimizer)
    with torch.no_grad():  # as a checkpoint is loaded: before FSDP first computes
        for mine in held.parameters.values():
            mine.mul_(1.5)
    before = {name: value * 1.5 for name, value in before.items()}
    step(Memory(4).micro(0, 0))
    gathered = held.gathered()
    assert gathered is not None
    assert all(torch.equal(value, gathered[name]) for name, value in before.items())
    layout = Layout(held.cut, held.order, 0, 1)
    state = State(3, dict(held.parameters), {"0/step": torch.tensor(3.0)}, {}, {"a": 1}, pieces=2)
    write_shards(tmp_path, state, layout)
    sign(tmp_path, state)
    own, rows = read_state(tmp_path), read_pieces(tmp_path, layout)
    theirs = {f"trained/{name}": torch.empty_like(value) for name, value in before.items()}
    load(theirs, storage_reader=HuggingFaceStorageReader(str(tmp_path)))
    for name, value in before.items():
        for found in (own.trained[name], rows.trained[name], theirs[f"trained/{name}"]):
            assert torch.equal(value, found), name
    assert (own.step, own.values, own.pieces, float(own.optimizer["0/step"])) == (3, {"a": 1}, 2, 3.0)


REFUSED: dict[str, tuple[Any, ...]] = {
    "method.kind dora": ("method.kind=dora",),
    "optim.kind prodigy": ("optim.kind=prodigy",),
    "prior.kind distance": ("prior.kind=distance",),
    "prior.kind frozen_base": ("prior.kind=frozen_base", "method.kind=full"),
    "a part of a batch": ("prior.others={count: 5, target: base}",),
    "about a part of a batch": ("prior={kind: class_images, target: base}",),
    "precision fp16": ("run.precision=fp16",),
    "run.fast": ("run.fast=on",),  # `auto` takes the plain path there
    "run.compile": ("run.compile=regional",),
    "sample.every": ("sample.every=5",),
    "run.verdicts ": ("run.verdicts=on",),
    "run.keep_best": ("run.keep_best=true",),
    "data.hold_out": ("data.hold_out=1",),
}


@pytest.mark.parametrize("words", REFUSED)
def test_what_needs_the_whole_model_is_refused_by_name(words: str) -> None:
    usual = ("data.photos=photos", "data.class_noun=mug", "run.shard=true", "prior.kind=none", "optim.kind=adamw")
    load_recipe("dreambooth-lora", list(usual))
    with pytest.raises(BadInput, match=words):
        load_recipe("dreambooth-lora", [*usual, *REFUSED[words]])
