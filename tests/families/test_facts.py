"""What is told of a base against the loaded base, and against the published sizes."""

from __future__ import annotations

from pathlib import Path

import pytest
from test_export import NAMES

from finetune.cli.main import run
from finetune.families.facts import facts
from finetune.families.source import load_family
from finetune.testing.published import write as write_published


@pytest.mark.parametrize("name", NAMES)
def test_facts_are_those_of_the_loaded_base(name: str, tiny_bases: dict[str, Path]) -> None:
    told, family = facts(tiny_bases[name]), load_family(str(tiny_bases[name]))
    assert told["family"].startswith(f"{name} (")
    assert told["predicts"] == family.schedule.prediction
    assert told["resolution"] == f"{family.resolution} pixels"
    for part, module in family.parts.items():
        assert f"{part} {sum(p.numel() for p in module.parameters()) / 1e6:.1f}M" in told["parameters"]
    assert told[family.text_encoders[0]].endswith(f"{family.text_length(0)} tokens")
    assert told["weights"].startswith("safetensors")


def test_published_sizes_without_any_weights(tmp_path: Path) -> None:
    """SD 2.1: 866M in the UNet, 340M in the encoder, 84M in the VAE (arXiv:2112.10752's code and the model card)."""
    write_published("SD 2.1", tmp_path)
    told = facts(tmp_path)
    assert told["family"].startswith("sd2")
    assert told["parameters"] == "denoiser 866M, vae 84M, text_encoder 340M"
    assert told["resolution"] == "768 pixels"
    assert told["schedule"].startswith("scaled_linear 0.00085 to 0.012, 1000 timesteps, terminal SNR 0.0047")
    assert told["weights"] == "none here"


def test_the_command(tiny_bases: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["inspect", "tiny"]) == (0, "")
    said = capsys.readouterr().out
    for words in ("sd1", "v_prediction", "128 pixels", "licence"):
        assert words in said
    code, message = run(["inspect", "/nowhere"])
    assert code == 2
    assert "/nowhere" in message
