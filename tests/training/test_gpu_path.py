"""The parts of a step that are made for a GPU, on the CPU: late readings, inputs made ahead, one copy, checkpoints in
a thread, recordings of a step. What they count on a device is in `fake_device_suite.py`."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from ends import metrics
from test_trainer import Memory, run_fit
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx

from finetune.core.errors import BadInput, CheckFailed
from finetune.families.source import load_family
from finetune.methods.lora import LoRA
from finetune.objectives.registry import build_objective
from finetune.objectives.settings import ObjectiveSettings
from finetune.optim.adamw import AdamW
from finetune.optim.adamw8bit import AdamW8bit
from finetune.training import readings, speed
from finetune.training.ahead import Ahead
from finetune.training.checkpoint import Checkpoints, State
from finetune.training.graphs import Graphs, captured
from finetune.training.parcel import ALIGNED, RECORDING, Parcel
from finetune.training.settings import Run
from finetune.training.speed import apply_choices, compile_regions, tf32, why_not_graphs
from finetune.training.step import Step, StepInputs, StepOptions

THREADS = ("finetune-next-step", "finetune-checkpoint")


@pytest.fixture
def late(monkeypatch: pytest.MonkeyPatch) -> None:
    """The CPU is treated as a device whose numbers are waited for."""
    monkeypatch.setattr(readings, "reads_late", lambda device: True)


@pytest.fixture(autouse=True)
def _no_thread_is_left() -> Iterator[None]:
    yield
    assert not [thread.name for thread in threading.enumerate() if thread.name.startswith(THREADS)]


def folders(path: Path, *names: str) -> list[Path]:
    made = [path / name for name in names]
    for folder in made:
        folder.mkdir()
    return made


# --- readings


def test_a_gradient_that_no_loss_scale_mends_is_a_bad_step() -> None:
    """With fp16 each such step is skipped: without an end, the run would change no weight to its last step."""
    accelerator: Any = SimpleNamespace(device=torch.device("cpu"), num_processes=1, scaler=None)
    accelerator.scaler = scaler = torch.amp.GradScaler("cpu")
    scaler.scale(torch.ones(1))
    held, loss, broken = readings.Readings(accelerator), torch.tensor(0.5), torch.tensor(float("nan"))
    for step in range(1, 100):
        found = held.bad(held.rows(step, loss, broken, 0))
        if found is not None:
            break
        scaler.update(scaler.get_scale() / 2)
    assert found is not None
    assert (found.step, found.loss, math.isnan(found.norm or 0)) == (28, 0.5, True)
    assert held.bad(readings.Readings(accelerator).rows(1, loss, torch.tensor(1.0), 0)) is None
    lost = held.bad(readings.Readings(accelerator).rows(1, broken, torch.tensor(1.0), 0))
    assert lost is not None
    assert lost.norm is None


# --- ahead


def test_ahead_makes_the_next_one_and_no_more() -> None:
    made: list[tuple[int, str]] = []
    begun = threading.Event()

    def make(n: int) -> int:
        made.append((n, threading.current_thread().name))
        if n == 1:
            begun.set()
        return n * n

    with Ahead(make, 3, threaded=True) as ahead:
        assert ahead.take(0) == 0
        assert begun.wait(60)  # without being asked for
        assert [ahead.take(1), ahead.take(2)] == [1, 4]
    assert [n for n, _ in made] == [0, 1, 2]
    assert all(name.startswith(THREADS[0]) for _, name in made)


def test_an_error_of_the_thread_is_raised_in_its_own_step() -> None:
    def make(n: int) -> int:
        if n == 2:
            raise BadInput("the photo is gone: put it back")
        return n

    with Ahead(make, 9, threaded=True) as ahead:
        assert [ahead.take(0), ahead.take(1)] == [0, 1]
        with pytest.raises(BadInput, match=r"^the photo is gone: put it back$"):
            ahead.take(2)


# --- one copy


def test_a_parcel_holds_each_tensor_once_and_gives_back_its_bits() -> None:
    batch = replace(Memory(3).micro(1, 0), conditions={"flag": torch.tensor([True, False, True])})
    shared, odd = torch.arange(5), torch.randn(3).bfloat16()
    given = {"batch": batch, "one": shared, "two": shared, "odd": odd, "word": "mug", "nothing": None}
    parcel = Parcel.of(given, pinned=False)
    found = parcel.on(torch.device("cpu"))
    assert found["one"].data_ptr() == found["two"].data_ptr() != shared.data_ptr()
    assert (found["word"], found["nothing"], found["batch"].prompts) == ("mug", None, batch.prompts)
    pairs = [
        (found["one"], shared), (found["odd"], odd), (found["batch"].weight, batch.weight),
        (found["batch"].latents.mean, batch.latents.mean),
        (found["batch"].conditions["flag"], batch.conditions["flag"]),
    ]  # fmt: skip
    for got, wanted in pairs:
        assert got.dtype == wanted.dtype
        assert torch.equal(got, wanted)
        assert got.data_ptr() % 16 == 0
    bytes_of_all = [40, 6, 12, 3, *[batch.latents.mean.nbytes] * 2]
    assert parcel.buffer.nbytes == sum(-(-size // ALIGNED) * ALIGNED for size in bytes_of_all)


# --- the loop


@pytest.mark.usefixtures("late")
def test_a_loop_that_reads_late_gives_the_same_run(
    tiny_bases: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings: dict[str, Any] = {"accumulate": 2, "ema": 0.9, "steps": 5, "checkpoint_every": 2}
    method = LoRA(rank=2, dropout=0.1)
    late_one, rare, plain = folders(tmp_path, "late", "rare", "plain")
    found = run_fit(tiny_bases["sdxl"], late_one, method, **settings)
    run_fit(tiny_bases["sdxl"], rare, method, **settings, log_every=3)
    monkeypatch.setattr(readings, "reads_late", lambda device: False)
    wanted = run_fit(tiny_bases["sdxl"], plain, method, **settings)
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    assert metrics(late_one) == metrics(plain)
    assert metrics(rare) == [row for row in metrics(plain) if row["step"] in (3, 5)]
    assert Checkpoints(rare).steps() == Checkpoints(plain).steps() == [4, 5]


@pytest.mark.usefixtures("late")
@pytest.mark.parametrize(
    ("optim", "said"),
    [(AdamW(lr=1e-3), "the weights were not updated"), (AdamW8bit(lr=1e-3), "nothing of it was saved")],
    ids=["fused", "not fused"],
)
def test_a_bad_step_that_is_read_late_is_named_and_not_saved(
    optim: Any, said: str, tiny_bases: dict[str, Path], tmp_path: Path
) -> None:
    """Step 3 is bad, nothing is logged before step 100, and a checkpoint is due after step 4: it is not written."""
    with pytest.raises(CheckFailed, match=rf"^step 3 is not finite \(loss nan\) on 6\.png .*; {said} and the last"):
        run_fit(
            tiny_bases["sd1"], tmp_path, LoRA(rank=2), optim=optim, batches=Memory(bad_at=2), steps=200,
            log_every=100, checkpoint_every=2,
        )  # fmt: skip
    state = Checkpoints(tmp_path).latest()
    assert state is not None
    assert state.step == 2
    assert (tmp_path / "bad-step-000003" / "latents.safetensors").is_file()


@pytest.mark.usefixtures("late")
def test_a_fused_optimiser_leaves_a_bad_update_out(
    tiny_bases: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The weights in memory when the fault is read: those before the bad step, though another step came after it."""
    seen: list[list[Tensor]] = []
    update = torch.optim.AdamW.step

    def noted(self: torch.optim.AdamW, *given: Any) -> Any:
        out = update(self, *given)
        seen.append([value.detach().clone() for group in self.param_groups for value in group["params"]])
        return out

    monkeypatch.setattr(torch.optim.AdamW, "step", noted)
    with pytest.raises(CheckFailed, match="step 2 is not finite"):
        run_fit(tiny_bases["sd1"], tmp_path, LoRA(rank=2), batches=Memory(bad_at=1), log_every=3, checkpoint_every=9)
    assert len(seen) == 4
    assert all(torch.equal(a, b) for later in seen[1:] for a, b in zip(seen[0], later, strict=True))


# --- checkpoints in a thread


class Slow(Checkpoints):
    """Its first write ends when it is told to."""

    def __init__(self, run: Path) -> None:
        super().__init__(run)
        self.go_on = threading.Event()

    def save(self, state: State, keep: int) -> Path:
        assert self.go_on.wait(60)
        return super().save(state, keep)


class Full(Checkpoints):
    """Its disk is full after the first checkpoint, which shows when it is told to go on."""

    def __init__(self, run: Path, waits: bool = False) -> None:
        super().__init__(run)
        self.go_on = threading.Event()
        if not waits:
            self.go_on.set()

    def save(self, state: State, keep: int) -> Path:
        if state.step > 1:
            assert self.go_on.wait(60)
            raise BadInput(f"the checkpoint of step {state.step} could not be written: free some space")
        return super().save(state, keep)


def fit_with(
    checkpoints: Checkpoints, base: Path, after_step: Callable[[int], None] = lambda step: None, **settings: Any
) -> dict[str, nn.Parameter]:
    from finetune.training.accelerate import make_accelerator
    from finetune.training.trainer import Trainable, Trainer

    family = load_family(str(base))
    trained = LoRA(rank=2).attach(family, 0)
    run = Run(batch_size=4, **settings)
    step = Step(family, ["denoiser"], build_objective(ObjectiveSettings(), family.schedule), family.encode_prompts)
    trainer = Trainer(step, Trainable(trained), AdamW(lr=1e-3), run, make_accelerator(run, True), checkpoints)
    trainer.fit(Memory(), after_step)
    return trained


def test_the_loop_goes_on_while_a_checkpoint_is_written(tiny_bases: dict[str, Path], tmp_path: Path) -> None:
    slow, (plain,) = Slow(tmp_path), folders(tmp_path, "plain")

    def after_step(step: int) -> None:
        if step == 3:
            assert slow.steps() == []  # that of step 2 is still being written
            slow.go_on.set()

    trained = fit_with(slow, tiny_bases["sd1"], after_step, steps=4, checkpoint_every=2)
    fit_with(Checkpoints(plain), tiny_bases["sd1"], steps=4, checkpoint_every=2)
    for step in (2, 4):  # later steps changed the weights, and not what was being written
        kept = [place.state(step).trained for place in (slow, Checkpoints(plain))]
        assert all(torch.equal(kept[0][name], kept[1][name]) for name in trained)
    assert any(not torch.equal(slow.state(2).trained[name], value) for name, value in trained.items())


@pytest.mark.parametrize("steps", [2, 3])
def test_an_error_of_writing_reaches_the_user(steps: int, tiny_bases: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"^the checkpoint of step 2 could not be written: free some space$"):
        fit_with(Full(tmp_path), tiny_bases["sd1"], steps=steps, checkpoint_every=1)
    assert Checkpoints(tmp_path).steps() == [1]


def test_an_error_of_writing_does_not_hide_another_one(tiny_bases: dict[str, Path], tmp_path: Path) -> None:
    full = Full(tmp_path, waits=True)

    def after_step(step: int) -> None:
        if step == 2:
            full.go_on.set()
            raise CheckFailed("something else")

    with pytest.warns(UserWarning, match="step 2 could not be written"), pytest.raises(CheckFailed, match="else"):
        fit_with(full, tiny_bases["sd1"], after_step, steps=3, checkpoint_every=2)


# --- recordings


def recorded(loss: nn.Module, example: tuple[Tensor, ...], pool: Any) -> Callable[..., Tensor]:
    """The operators of one call, with everything that was not given as an input fixed: what a CUDA graph replays."""
    return make_fx(loss, pre_dispatch=False)(*example)


@pytest.mark.parametrize("name", ["sdxl", "flux"])
def test_a_recording_of_one_step_serves_another(name: str, tiny_bases: dict[str, Path]) -> None:
    """Two steps with other images, sizes, noise, timesteps, prompts and trained weights."""
    family = load_family(str(tiny_bases[name]))
    trained = LoRA(rank=2).attach(family, 0)
    objective = build_objective(ObjectiveSettings(weighting="min_snr" if name == "sdxl" else "none"), family.schedule)
    step = Step(family, ["denoiser"], objective, family.encode_prompts).train()
    graphs = Graphs(step, accumulates=True, capture=recorded)
    batches = Memory(2, channels=family.codec.channels)
    losses = []
    for number in (0, 1, 2):
        batch = batches.micro(number, 0)
        geometry = [replace(item, crop=(number, 3)) for item in batch.geometry]
        inputs = step.inputs(replace(batch, geometry=geometry))
        with torch.no_grad():
            cond = family.encode_prompts(batch.prompts) | inputs.batch.conditions
            losses.append((float(graphs(inputs, cond)), float(step.loss(inputs, cond))))
            for parameter in trained.values():
                parameter += 0.05
    assert len(graphs.made) == 1
    assert [a for a, _ in losses] == pytest.approx([b for _, b in losses], rel=1e-5)
    assert len({round(a, 4) for a, _ in losses}) == 3
    assert all(parameter.grad is not None for parameter in trained.values())  # memory of their own


@pytest.mark.parametrize(
    "error", [RuntimeError("CUDA error: operation not permitted"), torch.OutOfMemoryError("full")]
)
def test_a_step_that_cant_be_recorded_is_computed(
    error: RuntimeError, tiny_bases: dict[str, Path], caplog: pytest.LogCaptureFixture
) -> None:
    family = load_family(str(tiny_bases["sd1"]))
    LoRA(rank=2).attach(family, 0)
    step = Step(family, ["denoiser"], build_objective(ObjectiveSettings(), family.schedule), family.encode_prompts)

    def capture(loss: nn.Module, example: tuple[Tensor, ...], pool: Any) -> Callable[..., Tensor]:
        raise error

    step.computed = Graphs(step, accumulates=False, capture=capture)
    batch = Memory(2).micro(0, 0)
    with caplog.at_level("INFO", "finetune"):
        assert torch.equal(step(batch), step.loss(step.inputs(batch), family.encode_prompts(batch.prompts)))
    assert f"can't be recorded ({error}): this run goes on without" in caplog.text
    assert step.computed == step.loss


def test_each_shape_has_a_recording_of_its_own(tiny_bases: dict[str, Path]) -> None:
    family = load_family(str(tiny_bases["sd1"]))
    LoRA(rank=2).attach(family, 0)
    step = Step(family, ["denoiser"], build_objective(ObjectiveSettings(), family.schedule), family.encode_prompts)
    asked: list[tuple[int, ...]] = []

    def capture(loss: nn.Module, example: tuple[Tensor, ...], pool: Any) -> Callable[..., Tensor]:
        asked.append(tuple(example[0].shape))
        return loss

    graphs = Graphs(step, accumulates=False, capture=capture)
    for size, number in ((2, 0), (4, 0), (2, 1)):
        inputs: StepInputs = step.inputs(Memory(size).micro(number, 0))
        cond = family.encode_prompts(inputs.batch.prompts)
        assert torch.equal(graphs(inputs, cond), step.loss(inputs, cond))
    assert asked == [(2, 4, 16, 16), (4, 4, 16, 16)]


def test_weights_that_were_moved_are_recorded_anew(tiny_bases: dict[str, Path]) -> None:
    """A preview on a small GPU sends the denoiser to the CPU and back. A recording would go on with the old memory."""
    family = load_family(str(tiny_bases["sd1"]))
    LoRA(rank=2).attach(family, 0)
    step = Step(family, ["denoiser"], build_objective(ObjectiveSettings(), family.schedule), family.encode_prompts)
    asked: list[nn.Module] = []

    def capture(loss: nn.Module, example: tuple[Tensor, ...], pool: Any) -> Callable[..., Tensor]:
        asked.append(loss)
        return loss

    graphs = Graphs(step, accumulates=False, capture=capture)
    inputs = step.inputs(Memory(2).micro(0, 0))
    cond = family.encode_prompts(inputs.batch.prompts)
    for moves in (False, False, True, False):
        if moves:
            last = list(family.parts["denoiser"].parameters())[-1]
            last.data = last.data.clone()
        graphs(inputs, cond)
    assert len(asked) == 2


def test_no_other_thread_asks_for_memory_during_a_recording(monkeypatch: pytest.MonkeyPatch) -> None:
    """CUDA ends a recording with an error if one does: the next step's pinned buffer waits for its end."""
    held: dict[str, bool] = {}
    empty = torch.empty

    def noted(*size: int, **options: Any) -> Tensor:
        held["buffer"] = RECORDING.locked()
        return empty(*size, **options)

    def recording(loss: nn.Module, *example: Any, **options: Any) -> nn.Module:
        held["recording"] = RECORDING.locked()
        return loss

    monkeypatch.setattr(torch, "empty", noted)
    monkeypatch.setattr(torch.cuda, "make_graphed_callables", recording)
    Parcel.of(torch.ones(3), pinned=False)
    captured(nn.Identity(), (torch.ones(3),), None)
    assert held == {"buffer": True, "recording": True}
    assert not RECORDING.locked()


def test_what_cannot_be_compiled_is_said_and_trained_without(
    tiny_bases: dict[str, Path], caplog: pytest.LogCaptureFixture
) -> None:
    family = load_family(str(tiny_bases["sd1"]))
    LoRA(rank=2).attach(family, 0)
    objective = build_objective(ObjectiveSettings(), family.schedule)
    plain = Step(family, ["denoiser"], objective, family.encode_prompts)
    gpu = torch.device("cuda")
    assert why_not_graphs(plain, gpu, 1) == ""
    assert "several processes" in why_not_graphs(plain, gpu, 2)
    assert "need a CUDA GPU" in why_not_graphs(plain, torch.device("mps"), 1)
    penalty = StepOptions(regularizers=[lambda at: at.t.sum()])
    assert "penalty" in why_not_graphs(Step(family, ["denoiser"], objective, family.encode_prompts, penalty), gpu, 1)
    texts = Step(family, ["denoiser", "text_encoder"], objective, family.encode_prompts)
    assert "text encoders" in why_not_graphs(texts, gpu, 1)
    with caplog.at_level("INFO", "finetune"):
        apply_choices(plain, Run(compile="graphs"), torch.device("cpu"), 1)
    assert plain.computed == plain.loss
    assert "run.compile is 'graphs', but CUDA graphs need a CUDA GPU: this run trains without it" in caplog.text
    family.enable_gradient_checkpointing(["denoiser"])
    assert "checkpointing" in why_not_graphs(plain, gpu, 1)
    other = load_family(str(tiny_bases["sd1"]))
    LoRA(rank=2, dropout=0.1).attach(other, 0)
    with caplog.at_level("INFO", "finetune"):
        apply_choices(Step(other, ["denoiser"], objective, other.encode_prompts), Run(compile="regional"), gpu, 1)
    assert "run.compile is 'regional', but dropout" in caplog.text


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sd1", "sd3"])
def test_compiled_blocks_give_the_same_loss_and_gradients(name: str, tiny_bases: dict[str, Path]) -> None:
    """What torch.compile traces, run by torch itself: generating code would take minutes here."""
    family = load_family(str(tiny_bases[name]))
    trained = LoRA(rank=2).attach(family, 0)
    step = Step(family, ["denoiser"], build_objective(ObjectiveSettings(), family.schedule), family.encode_prompts)
    batch = Memory(2, channels=family.codec.channels).micro(0, 0)
    found = []
    for compiled in (False, True):
        if compiled:
            torch._dynamo.reset()
            compile_regions(step.train(), backend="aot_eager")
        loss = step(batch)
        loss.backward()
        found.append((loss.detach(), [value.grad for value in trained.values()]))
        step.zero_grad()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
    assert torch.allclose(found[0][0], found[1][0], rtol=1e-5)
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(found[0][1], found[1][1], strict=True))


@pytest.mark.slow
def test_blocks_are_compiled_for_every_bucket(tiny_bases: dict[str, Path]) -> None:
    """torch gives up at 8 forms of one block, without a word to the user."""
    family = load_family(str(tiny_bases["sd1"]))
    LoRA(rank=2).attach(family, 0)
    step = Step(family, ["denoiser"], build_objective(ObjectiveSettings(), family.schedule), family.encode_prompts)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compile_regions(step.train(), backend="eager")
    cond = family.encode_prompts(["a mug"])
    sides = [(8 * height, 8 * width) for height in (1, 2) for width in range(1, 8)]
    with torch.no_grad():
        for height, width in sides:
            family.predict(torch.zeros(1, 4, height, width), torch.zeros(1), cond, [])
    areas = {height * width for height, width in sides}  # a block sees tokens
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] >= len(areas) > 8


@pytest.mark.parametrize("lacking", ["Triton", "a C compiler", ""])
def test_without_a_compiler_a_run_trains_as_it_is(
    lacking: str, tiny_bases: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    family = load_family(str(tiny_bases["sd1"]))
    LoRA(rank=2).attach(family, 0)
    step = Step(family, ["denoiser"], build_objective(ObjectiveSettings(), family.schedule), family.encode_prompts)
    monkeypatch.setattr(speed, "has_triton", lambda: lacking != "Triton")
    monkeypatch.setattr(speed.shutil, "which", lambda name: None if lacking == "a C compiler" else f"/usr/bin/{name}")
    why = speed.why_not_regional(step, torch.device("cuda"))
    assert (lacking in why) if lacking else why == ""
    assert speed.why_not_regional(step, torch.device("cpu")) == ""


def test_channels_last_is_another_order_of_the_same_numbers(tiny_bases: dict[str, Path], tmp_path: Path) -> None:
    plain, other = folders(tmp_path, "plain", "other")
    wanted = run_fit(tiny_bases["sd1"], plain, LoRA(rank=2), steps=2)
    found = run_fit(tiny_bases["sd1"], other, LoRA(rank=2), steps=2, channels_last=True)
    assert all(torch.allclose(found[name], wanted[name], atol=1e-5) for name in wanted)
    family = load_family(str(tiny_bases["sd1"]))
    LoRA(rank=2).attach(family, 0)
    step = Step(family, ["denoiser"], build_objective(ObjectiveSettings(), family.schedule), family.encode_prompts)
    apply_choices(step, Run(channels_last=True), torch.device("cpu"), 1)
    weight = family.parts["denoiser"].conv_in.weight
    assert weight.is_contiguous(memory_format=torch.channels_last)
    assert not weight.is_contiguous()


def test_tf32_holds_in_the_block_alone() -> None:
    """Without it convolutions do not round either: torch's own default lets them, and fp32 would be none."""
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.allow_tf32
    assert before == (False, True)
    for wanted in (False, True):
        with tf32(wanted):
            assert (matmul.allow_tf32, cudnn.allow_tf32) == (wanted, wanted)
        assert (matmul.allow_tf32, cudnn.allow_tf32) == before
