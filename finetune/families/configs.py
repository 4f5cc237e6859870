"""Reads the JSON configs of a diffusers folder, and refuses values that no real base has."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError

from finetune.core.errors import BadInput
from finetune.core.files import leads_out
from finetune.core.reading import read_json

AGAIN = "fetch the base again"
LARGEST = 2**24  # limit for any number in a part's config: the largest vocabulary has 2**18 words
LAYERS = 500  # limit for layers of any kind
BLOCKS = 2_000  # limit for a UNet's blocks x layers x transformer layers; SDXL's are 60
LIMITS = {
    "num_train_timesteps": 100_000,
    "sample_size": 4_096,
    "pos_embed_max_size": 4_096,
    "max_position_embeddings": 100_000,
    "extra_ids": 1_000,
    **dict.fromkeys(("size", "height", "width", "shortest_edge", "ensure_multiple_of", "size_divisor"), 4_096),
}
CHECKED = ("config.json", "scheduler_config.json", "tokenizer_config.json", "preprocessor_config.json")
# the libraries raise these if a config has a value of the wrong type
UNFIT = (ValueError, RuntimeError, TypeError, LookupError, AttributeError, ArithmeticError, AssertionError)
# settings that make transformers and diffusers download and run other code
CODE = ("attn_implementation", "_attn_implementation", "experts_implementation", "quantization_config")


def read_config(folder: Path, name: str) -> dict[str, Any]:
    file = folder / name
    if not file.is_file():
        raise BadInput(f"{folder} has no {name}: the base must be a diffusers folder")
    config = read_json(file, dict, AGAIN)
    if file.name in CHECKED:
        _check_values(file, config)
    return config


@contextmanager
def well_formed(folder: Path) -> Iterator[None]:
    """Turns errors that a library raises for wrong values in a config into BadInput."""
    try:
        yield
    except BadInput:
        raise
    except (*UNFIT, StrictDataclassError, ImportError) as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise BadInput(f"the base {folder} can't be read because its configs are wrong ({reason}): {AGAIN}") from error


def check_configs(folder: Path, parts: Sequence[str]) -> None:
    """Checks every JSON file of a base's parts before a library reads it: a library would follow any value in it.

    Raises:
        BadInput: a file is broken, exceeds the limits, or asks for foreign code; an index names files other than the
            weights beside it; a link leads out of a tokenizer's folder.
    """
    read_config(folder, "model_index.json")
    names = {*parts, *(path.name for path in folder.glob("tokenizer*"))}
    for file in sorted(file for name in names for file in (folder / name).glob("*.json")):
        if file.name.endswith(".index.json"):
            check_index(file)
        else:
            read_config(file.parent, file.name)
    refuse_links(folder)


def refuse_links(folder: Path) -> None:
    """Checks a tokenizer's files, which exports copy unchanged.

    Raises:
        BadInput: a file is a link to a file outside of the base.
    """
    for file in sorted(folder.glob("tokenizer*/*")):
        if leads_out(file, folder):
            raise BadInput(f"{file} is a link that leads out of {folder}: put the file itself there")


def check_index(file: Path) -> None:
    """Checks the index of a model that is stored in several files.

    Raises:
        BadInput: it names something else than a safetensors file in its own folder.
    """
    weights = read_json(file, dict, AGAIN).get("weight_map")
    named = list(weights.values()) if isinstance(weights, dict) else [weights]
    kind = r"\.bin" if file.name.endswith(".bin.index.json") else r"\.safetensors"
    for name in dict.fromkeys(map(str, named)):
        if not re.fullmatch(rf"[\w.-]+{kind}", name) or name.startswith("."):
            raise BadInput(
                f"{file} names {name[:80]!r}, which is not a {kind[2:]} file beside it: convert the base to "
                "safetensors, "
                "or fetch it again"
            )


def _check_values(file: Path, config: dict[str, Any]) -> None:
    """Raises BadInput as `check_configs` does, for one file."""
    chosen = next((key for key in CODE if config.get(key) is not None), None)
    if chosen is not None:
        raise BadInput(
            f"{file} has {chosen}, which may fetch and run code: remove it, or use the base as it was before it was "
            "quantised"
        )
    for key, value in _numbers(config):
        limit = LAYERS if "layers" in key else LIMITS.get(key, LARGEST)
        if file.name == "tokenizer_config.json" and key not in LIMITS:
            continue  # its lengths may be 10**30, for "no limit"
        if value > limit:
            raise BadInput(f"{file}: {key} is {value:.12g}, more than the limit of {limit:,}: {AGAIN}")
    values = dict(sorted(_numbers(config)))  # the largest of several values with one key
    blocks = values.get("len(block_out_channels)", 1)
    blocks *= values.get("layers_per_block", 1) * values.get("transformer_layers_per_block", 1)
    if blocks > BLOCKS:
        raise BadInput(
            f"{file}: the number of its blocks is {blocks:,.0f}, more than the limit of {BLOCKS:,}: {AGAIN}"
        )


def _numbers(config: dict[str, Any]) -> Iterator[tuple[str, float]]:
    """(key, number) for each number in a config, also inside lists and nested objects, and for each list's length."""
    left: list[tuple[str, Any]] = list(config.items())
    while left:
        key, value = left.pop()
        if isinstance(value, dict):
            left += value.items()
        elif isinstance(value, list):
            left += [(key, item) for item in value]
            yield f"len({key})", len(value)
        elif isinstance(value, int | float) and not isinstance(value, bool):
            yield key, value
