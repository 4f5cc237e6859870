"""Files that hold a part of a text encoder: what diffusers' loader makes of them, and what no LoRA can hold."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from adapter_files import Tensors, pair, saved

from finetune.adapters.inspection import open_adapter
from finetune.adapters.operations import merged_files, verify_file, write
from finetune.core.errors import BadInput
from finetune.families.configs import read_config
from finetune.families.source import resolve_base

LAYER = "lora_te_text_model_encoder_layers_0_"


def kohya(folder: Path, name: str, modules: list[str], shape: tuple[int, int]) -> Path:
    """A kohya file of rank 2 with modules of the given names, all of one shape."""
    made = torch.Generator().manual_seed(0)
    tensors: Tensors = {}
    for module in modules:
        down, up = pair(torch.Size(shape), 2, made)
        tensors |= {f"{module}.lora_down.weight": down, f"{module}.lora_up.weight": up}
        tensors[f"{module}.alpha"] = torch.tensor(2.0)
    return saved(tensors, folder / f"{name}.safetensors")


@pytest.fixture(scope="module")
def tables() -> dict[str, tuple[int, int]]:
    """The sizes of the tiny base's text encoder, from its own config."""
    config = read_config(resolve_base("tiny"), "text_encoder/config.json")
    return {
        "square": (config["hidden_size"],) * 2,
        "table": (config["vocab_size"], config["hidden_size"]),
    }


def test_a_lora_of_a_table_of_words_is_not_taken_for_a_layer(
    tables: dict[str, tuple[int, int]], tmp_path: Path
) -> None:
    """No program has a module of that name: it is told, and not merged and then lost."""
    name = "lora_te_text_model_embeddings_token_embedding"
    file = kohya(tmp_path, "table", [name], tables["table"])
    assert [problem.name for problem in verify_file(file, "tiny").problems] == ["unknown-keys", "nothing-fits"]
    with pytest.raises(BadInput, match=f"keys that fit nothing in sd1.*{name}"):
        open_adapter(file, "tiny")


@pytest.mark.parametrize(
    ("modules", "read"),
    [
        (["self_attn_q_proj", "self_attn_v_proj"], False),
        (["self_attn_k_proj", "self_attn_out_proj"], True),
    ],
)
def test_what_diffusers_reads_of_an_attention_is_known_before_a_file_is_written(
    modules: list[str], read: bool, tables: dict[str, tuple[int, int]], tmp_path: Path
) -> None:
    """Its reader of kohya's files knows the attention of a text encoder by its out_proj alone."""
    names = [f"{LAYER}{module}" for module in modules]
    files = [(kohya(tmp_path, name, names, tables["square"]), 0.5) for name in ("one", "two")]
    state, why = verify_file(files[0][0], "tiny").verdicts["diffusers"]
    assert (state == "fully") is read, why
    merged, _ = merged_files(files, "tiny", None)
    ours, theirs = (write(merged, tmp_path / form, [form], "fp32", True, {})[0] for form in ("kohya", "diffusers"))
    assert all(check.passed for check in (*ours.checks, *theirs.checks)), ours.checks
    assert "diffusers" in theirs.read_by
    assert ("diffusers" in ours.read_by) is read
    said = [line for line in (why, *ours.limits) if "out_proj" in line]
    assert len(said) == (0 if read else 2)
