"""Precision by what the device computes in, deterministic mode, and what is claimed of a resumed run."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch

from finetune.core import determinism
from finetune.core.determinism import deterministic, is_repeatable
from finetune.core.errors import BadInput
from finetune.training.accelerate import resolve_precision
from finetune.training.settings import Run


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")


def _gpu(monkeypatch: pytest.MonkeyPatch, native: bool, initialised: bool = False) -> None:
    """A CUDA GPU as torch tells of it: an old one says that it supports bf16, by emulation."""

    def is_bf16_supported(including_emulation: bool = True) -> bool:
        return native or including_emulation

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: initialised)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", is_bf16_supported)


@pytest.mark.parametrize(("native", "precision"), [(True, "bf16"), (False, "fp16")])
def test_auto_is_what_the_gpu_computes_in(monkeypatch: pytest.MonkeyPatch, native: bool, precision: str) -> None:
    _gpu(monkeypatch, native)
    assert resolve_precision(Run()) == precision
    assert resolve_precision(Run(precision="fp32")) == "fp32"


def test_auto_is_fp32_without_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert resolve_precision(Run()) == "fp32"


def _state() -> tuple[Any, ...]:
    cuda = torch.backends.cuda
    return (
        torch.are_deterministic_algorithms_enabled(),
        torch.backends.cudnn.benchmark,
        cuda.flash_sdp_enabled(),
        cuda.mem_efficient_sdp_enabled(),
        cuda.math_sdp_enabled(),
        cuda.cudnn_sdp_enabled(),
    )


def test_the_mode_is_on_inside_and_gone_afterwards() -> None:
    before = _state()
    with deterministic(True):
        assert _state() == (True, False, True, True, True, False)
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    assert _state() == before
    with pytest.raises(KeyError), deterministic(True):
        raise KeyError("x")
    assert _state() == before
    with deterministic(False):
        assert _state() == before


def test_an_operation_without_a_deterministic_form_is_named() -> None:
    with (
        pytest.raises(BadInput, match=r"put_ has no deterministic implementation.*run\.deterministic=false"),
        deterministic(True),
    ):
        torch.zeros(4).put_(torch.tensor([0, 0]), torch.ones(2), accumulate=False)


def test_other_errors_pass_through() -> None:
    with pytest.raises(RuntimeError, match="size of tensor"), deterministic(True):
        torch.zeros(2) + torch.zeros(3)


def test_cuda_that_runs_without_its_workspace_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    _gpu(monkeypatch, native=True, initialised=True)
    with pytest.raises(BadInput, match="CUBLAS_WORKSPACE_CONFIG=:4096:8"), deterministic(True):
        pass
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    with deterministic(True):
        assert determinism.SIZES[1] == os.environ["CUBLAS_WORKSPACE_CONFIG"]


def test_what_is_claimed() -> None:
    assert is_repeatable("cpu", False)
    assert is_repeatable("cuda", True)
    assert not is_repeatable("cuda:1", False)
    assert not is_repeatable("mps", False)
