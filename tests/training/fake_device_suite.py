"""What would break on a GPU or on MPS, seen without one: the real code on a device that refuses what they refuse."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator, PartialState
from accelerate.state import AcceleratorState
from fake_device import FakeDevice, Generator, fake_device
from test_trainer import Memory
from torch import Tensor, nn

from finetune.cli import doctor
from finetune.core import devices
from finetune.core.batch import Batch
from finetune.data import tokens
from finetune.data.cache import LatentCache, PromptCache
from finetune.families.base import Family
from finetune.families.registry import FAMILIES
from finetune.families.source import load_family
from finetune.methods.base import Method
from finetune.methods.dora import DoRA
from finetune.methods.lora import LoRA
from finetune.methods.oft import OFT
from finetune.methods.peft_adapter import PeftAdapter
from finetune.methods.registry import METHODS
from finetune.objectives.registry import build_objective
from finetune.objectives.settings import ObjectiveSettings
from finetune.optim.adamw import AdamW
from finetune.training.checkpoint import Checkpoints
from finetune.training.ema import Ema
from finetune.training.priors.distance import Distance
from finetune.training.priors.frozen_base import FrozenBase
from finetune.training.priors.none import NoPrior
from finetune.training.priors.others import Others
from finetune.training.regularizers import PriorContext, Regularizer
from finetune.training.rounding import build_optimizer
from finetune.training.settings import Run
from finetune.training.step import Step, StepOptions, parts_of
from finetune.training.trainer import Trainable, Trainer
from finetune.training.whole import clip_in_fp32

ONLY = {"textual_inversion": ["text_encoders"]}
# a device meets a family's code and a method's: each family with the two usual methods, each method on a UNet and a
# transformer. Every family with every method is in tests/contract, on the CPU
CASES = [
    pytest.param(name, kind, marks=() if kind == "lora" or (name, kind) == ("sd1", "full") else pytest.mark.slow)
    for name in FAMILIES
    for kind in METHODS
    if kind in ("lora", "full") or name in ("sd1", "flux")
]
every_family = pytest.mark.parametrize("name", list(FAMILIES))


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeDevice]:
    with fake_device(monkeypatch) as device:
        yield device


@pytest.fixture
def mps(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeDevice]:
    """As Apple's: without float64."""
    with fake_device(monkeypatch, torch.float64) as device:
        monkeypatch.setattr(devices, "NO_FLOAT64", (device.device.type,))
        yield device


@pytest.fixture
def accelerator(gpu: FakeDevice) -> Iterator[Accelerator]:
    """Accelerate's own, told that its device is this one."""
    AcceleratorState._reset_state(reset_partial_state=True)
    made = Accelerator(cpu=True)
    AcceleratorState._shared_state["device"] = PartialState._shared_state["device"] = gpu.device
    assert made.device == gpu.device
    yield made
    AcceleratorState._reset_state(reset_partial_state=True)


class Rich(Memory):
    """Batches with masks, and with `extra` channels behind the latents."""

    def __init__(self, family: Family, extra: int = 0) -> None:
        super().__init__(2, channels=family.codec.channels)
        self.extra = extra

    def micro(self, step: int, index: int) -> Batch:
        batch = super().micro(step, index)
        extra = torch.ones(len(batch), self.extra, 16, 16) if self.extra else None
        return replace(batch, mask=torch.ones(len(batch), 1, 16, 16), extra=extra)


class Enough(Exception):
    """The second step is not of interest."""


class One(Memory):
    """The batch of one step; what is counted is counted from there, until the next one is asked for."""

    def __init__(self, gpu: FakeDevice, family: Family) -> None:
        super().__init__(2, channels=family.codec.channels)
        self.gpu = gpu

    def micro(self, step: int, index: int) -> Batch:
        if step:
            raise Enough
        self.gpu.copies.clear()
        self.gpu.reads.clear()
        return super().micro(step, index)


def attach(kind: str, family: Family, gpu: FakeDevice) -> tuple[Method, dict[str, torch.nn.Parameter]]:
    """As a job does: the subject is named, the base goes to the device, the method is attached there."""
    fields = METHODS[kind].model_fields
    chosen = {"dropout": 0.1} if "dropout" in fields else {}
    method = METHODS[kind](parts=ONLY.get(kind, ["denoiser", "text_encoders"]), **chosen)
    method.add_subject_token(family, "zwx", "zwx")
    family.parts.to(gpu.device)
    return method, method.attach(family, 0)


def regularizers(family: Family, method: Method, trained: dict[str, torch.nn.Parameter]) -> list[Regularizer]:
    attached = PriorContext(family, method, trained, family.encode_prompts, "a mug")
    distance = Distance().regularizers(attached) if method.measures_distance else []
    return [*FrozenBase().regularizers(attached), *distance]


def places(values: dict[str, Tensor]) -> set[torch.device]:
    return {value.device for value in values.values()}


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_the_loop_runs_on_a_device(
    name: str, kind: str, tiny_bases: dict[str, Path], tmp_path: Path, gpu: FakeDevice, accelerator: Accelerator
) -> None:
    """Everything that a step can have, forward and backward, the fused optimiser, the EMA and the checkpoint."""
    family = load_family(str(tiny_bases[name]))
    method, trained = attach(kind, family, gpu)
    assert places(trained) == {gpu.device}
    settings = ObjectiveSettings(noise_offset=0.1, input_perturbation=0.1, loss="huber")
    options = StepOptions(0.3, regularizers(family, method, trained), stratify=2)
    objective = build_objective(settings, family.schedule)
    Trainer(
        Step(family, parts_of(trained), objective, family.encode_prompts, options),
        Trainable(trained, method.windows(trained)),
        AdamW(),
        Run(steps=1, batch_size=2, ema=0.9),
        accelerator,
        Checkpoints(tmp_path),
    ).fit(Rich(family))
    assert places(trained) == {gpu.device}
    assert Checkpoints(tmp_path).latest() is not None


COPIES = {"training.parcel.Parcel.on": 1}  # all that a micro-batch needs, from pinned memory under CUDA


@every_family
def test_a_step_copies_once_and_reads_nothing(
    name: str, tiny_bases: dict[str, Path], tmp_path: Path, gpu: FakeDevice, accelerator: Accelerator
) -> None:
    """A LoRA with cached prompts, in a step that is not logged: one copy for a micro-batch, and no read, which would
    make the CPU wait for the GPU."""
    family = load_family(str(tiny_bases[name]))
    family.parts.to(gpu.device)
    prompts = PromptCache(family, "hash", tmp_path / "cache")
    prompts.fill(["", "a mug", "a photo of a zwx mug"])
    family.parts.place(["denoiser"])
    trained = LoRA(rank=2, dropout=0.1).attach(family, 0)
    trainer = Trainer(
        Step(family, parts_of(trained), build_objective(ObjectiveSettings(), family.schedule), prompts),
        Trainable(trained),
        AdamW(),
        Run(steps=2, batch_size=2, ema=0.9, log_every=2),
        accelerator,
        Checkpoints(tmp_path),
    )
    with pytest.raises(Enough):
        trainer.fit(One(gpu, family))
    assert dict(gpu.copies) == COPIES
    assert dict(gpu.reads) == {}


def test_weights_in_bf16_are_rounded_without_a_read(gpu: FakeDevice) -> None:
    """Two updates, the first of which makes the state: clipped, in fp32, rounded with noise that is drawn there, and
    perhaps left out as the loop says where it does not look."""
    shapes = {"denoiser.w": (80, 80), "denoiser.b": (5,)}
    held = {name: nn.Parameter(torch.ones(shape, device=gpu.device).bfloat16()) for name, shape in shapes.items()}
    rounded: Any = build_optimizer(AdamW(), held, {}, Run(weights="bf16"))
    ema = Ema(held, 0.9)
    rounded.found_inf = torch.zeros((), device=gpu.device)
    gpu.copies.clear()
    gpu.reads.clear()
    for number in range(2):
        for value in held.values():
            value.grad = torch.ones_like(value)
        rounded.number = number
        clip_in_fp32(list(held.values()), 1.0)
        rounded.step()
        ema.update(number)
    assert len(rounded.state) == len(held)
    assert {(value.dtype, value.device) for value in held.values()} == {(torch.bfloat16, gpu.device)}
    assert dict(gpu.copies) == {}
    assert dict(gpu.reads) == {}


class Mixed(One):
    """Half of the samples are of everything else."""

    def micro(self, step: int, index: int) -> Batch:
        batch = super().micro(step, index)
        return replace(batch, roles=["photo", "other"] * (len(batch) // 2))


def test_many_prompts_and_a_teacher_make_no_step_wait(
    tiny_bases: dict[str, Path],
    tmp_path: Path,
    gpu: FakeDevice,
    accelerator: Accelerator,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """More prompts than the device's memory is given for come with the step's other inputs, in one copy."""
    monkeypatch.setattr("finetune.data.cache.IN_MEMORY", 0)
    family = load_family(str(tiny_bases["sdxl"]))
    family.parts.to(gpu.device)
    prompts = PromptCache(family, "hash", tmp_path / "cache")
    prompts.fill(["a mug", "", "a photo of a zwx mug"])
    family.parts.place(["denoiser"])
    method = LoRA(rank=2)
    trained = method.attach(family, 0)
    context = PriorContext(family, method, trained, prompts, "a mug")
    options = StepOptions(0.3, teacher=NoPrior(others=Others(target="base")).teacher(context))
    trainer = Trainer(
        Step(family, parts_of(trained), build_objective(ObjectiveSettings(), family.schedule), prompts, options),
        Trainable(trained),
        AdamW(),
        Run(steps=2, batch_size=2, log_every=2),
        accelerator,
        Checkpoints(tmp_path),
    )
    with pytest.raises(Enough):
        trainer.fit(Mixed(gpu, family))
    assert dict(gpu.copies) == COPIES
    assert dict(gpu.reads) == {}


INPUTS = [(name, inputs) for name, kind in FAMILIES.items() for inputs in getattr(kind, "pipelines", {}) if inputs]


@pytest.mark.parametrize(("name", "inputs"), INPUTS)
def test_extra_inputs_on_a_device(name: str, inputs: str, tiny_bases: dict[str, Path], gpu: FakeDevice) -> None:
    from finetune.families.conditioning import channels

    family = load_family(str(tiny_bases[name]))
    family.parts.to(gpu.device)
    family.widen(inputs)
    method = LoRA(rank=2)
    trained = method.attach(family, 0)
    objective = build_objective(ObjectiveSettings(weighting="min_snr"), family.schedule).to(gpu.device)
    step = Step(family, ["denoiser"], objective, family.encode_prompts).train()
    batches = Rich(family, channels(inputs))
    loss = step(batches.micro(0, 0).to(gpu.device))
    loss.backward()
    assert loss.device == gpu.device
    assert {parameter.grad.device for parameter in trained.values() if parameter.grad is not None} == {gpu.device}


class Crop:
    key = "a view"

    def pixels(self) -> Tensor:
        return torch.zeros(3, 32, 32)


@every_family
def test_the_work_before_training_on_a_device(
    name: str, tiny_bases: dict[str, Path], tmp_path: Path, gpu: FakeDevice
) -> None:
    """Latents, prompts, the probes of a token, and parts that leave and come back."""
    family = load_family(str(tiny_bases[name]))
    family.parts.to(gpu.device)
    cache = LatentCache(tmp_path, "hash")
    cache.fill(family, [Crop()])
    held = cache.latents(Crop())
    assert (held.mean.device.type, held.std.device.type) == ("cpu", "cpu")
    assert family.codec.decode(held.mean[None].to(gpu.device)).device == gpu.device
    prompts = PromptCache(family, "hash", tmp_path)
    prompts.fill(["a mug", ""])
    family.parts.place(family.text_encoders)
    assert places(prompts(["a mug", ""])) == places(family.encode_prompts(["a mug", ""])) == {gpu.device}
    again = PromptCache(family, "hash", tmp_path)
    again.fill(["a mug"])
    assert places(again(["a mug"], torch.ones(len(family.text_encoders), 1))) == {gpu.device}
    assert tokens.check(family, "zwx", "mug").strength is not None
    family.parts.release(["vae"])
    family.drawing.pipeline()
    assert family.parts["vae"].device == gpu.device


@pytest.mark.parametrize("kind", [k for k, method in METHODS.items() if issubclass(method, PeftAdapter)])
def test_deltas_need_no_float64_of_the_device(kind: str, tiny_bases: dict[str, Path], mps: FakeDevice) -> None:
    family = load_family(str(tiny_bases["sd1"]))
    family.parts.to(mps.device)
    method = METHODS[kind](targets="attention")
    method.attach(family, 0)
    shapes = [layer.get_base_layer().weight.shape for _, _, layer in method.layers(family)]
    before = places(dict(family.parts["denoiser"].named_parameters()))
    assert [change.shape for _, _, change in method.deltas(family)] == shapes
    assert places(dict(family.parts["denoiser"].named_parameters())) == before == {mps.device}


@pytest.mark.parametrize("method", [DoRA(targets="attention"), OFT(targets="attention")], ids=["dora", "oft"])
def test_deltas_are_the_same_wherever_float64_is_had(
    method: PeftAdapter, tiny_bases: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A layer that is copied to be computed elsewhere gives the same bits, and is left as it was."""
    family = load_family(str(tiny_bases["sd1"]))
    trained = method.attach(family, 0)
    made = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in trained.values():
            parameter += 0.02 * torch.randn(parameter.shape, generator=made)
    here = [change for _, _, change in method.deltas(family)]
    kept = {name: value.clone() for name, value in family.parts["denoiser"].state_dict().items()}
    elsewhere = torch.device("cpu", 0)  # another device to whoever compares them, and the same memory
    monkeypatch.setattr("finetune.core.devices.exact_device", lambda device: elsewhere)
    moved = [change for _, _, change in method.deltas(family)]
    assert all(torch.equal(a, b) for a, b in zip(here, moved, strict=True))
    assert all(bool(change.any()) for change in here)
    assert all(torch.equal(value, kept[name]) for name, value in family.parts["denoiser"].state_dict().items())


def test_the_matrices_of_an_export_need_no_float64_of_the_device(mps: FakeDevice) -> None:
    from finetune.export.decompose import _svd, svd_of_product

    b, a = (torch.ones(shape).to(mps.device) for shape in ((6, 2), (2, 5)))
    assert {part.device.type for part in (*svd_of_product(b, a), *_svd(b))} == {"cpu"}


@pytest.mark.parametrize(
    ("cuda", "metal", "wanted"),
    [(True, True, "cuda"), (True, False, "cuda"), (False, True, "mps"), (False, False, "cpu")],
)
def test_the_best_device(cuda: bool, metal: bool, wanted: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: metal)
    freed: list[str] = []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: freed.append("cuda"))
    monkeypatch.setattr(torch.mps, "empty_cache", lambda: freed.append("mps"))
    assert devices.best_device().type == wanted
    devices.empty_cache()
    assert freed == ([] if wanted == "cpu" else [wanted])


@pytest.mark.parametrize(("generation", "said"), [(7, "emulated"), (8, "16 GiB, bf16")])
def test_doctor_tells_native_bf16_from_emulated(generation: int, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's own rule, for GPUs of compute capability 7.5 (T4) and 8.0 (A100)."""
    about = SimpleNamespace(name="a GPU", total_memory=2**34, major=generation)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "device", nullcontext)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: about)
    found = doctor._gpu(0)
    assert said in found.value
    assert ("run.precision=fp16" in found.advice) == (generation < 8)


def test_the_device_refuses_what_a_gpu_refuses(gpu: FakeDevice) -> None:
    """The test of the test: a tensor left on the CPU, a generator of another device, and both ways of looking."""
    there, here = torch.ones(2, 3).to(gpu.device), torch.ones(2, 3)
    with pytest.raises(RuntimeError, match="same device"):
        there + here
    with pytest.raises(RuntimeError, match="generator"):
        torch.rand(2, generator=Generator("cpu"), device=gpu.device)
    with pytest.raises(RuntimeError, match="generator"):
        torch.rand(2, generator=Generator(gpu.device))
    assert torch.rand(2, generator=Generator(gpu.device), device=gpu.device).device == gpu.device
    assert (sum(gpu.copies.values()), sum(gpu.reads.values())) == (1, 0)
    assert there.sum().item() == 1
    assert not isinstance(there.cpu(), type(there))
    assert (sum(gpu.copies.values()), sum(gpu.reads.values())) == (1, 2)
    with fake_device(pytest.MonkeyPatch(), torch.float64) as mps, pytest.raises(TypeError, match="float64"):
        torch.ones(2).to(mps.device).double()
