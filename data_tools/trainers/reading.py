"""Reads settings of other trainers from TOML, JSON, YAML, or a shell line with flags, and says whose they are."""

from __future__ import annotations

import re
import shlex
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune.core.errors import BadInput
from finetune.core.reading import parse_json, parse_yaml, read_utf8

KOHYA, DATASET = "kohya's flags", "kohya's dataset TOML"
ONE_TRAINER, AI_TOOLKIT, DIFFUSERS = "OneTrainer's JSON", "ai-toolkit's YAML", "diffusers' flags"
ADVICE = (
    "known are kohya's folders, dataset TOML and flags, OneTrainer's JSON, ai-toolkit's YAML and the flags of "
    "diffusers' scripts"
)
ENDINGS = (".toml", ".json", ".yaml", ".yml", ".sh", ".bash", ".bat", ".cmd", ".ps1", ".txt")
OF_KOHYA = ("network_module", "network_dim", "dataset_config", "train_data_dir", "shuffle_caption", "max_train_epochs")
OF_DIFFUSERS = ("instance_data_dir", "instance_prompt", "checkpointing_steps", "dataset_name", "validation_prompt")


@dataclass(frozen=True)
class ReadSettings:
    """A trainer's settings as plain data. `trainer`: one of the names above."""

    trainer: str
    values: dict[str, Any]


def read_settings(file: Path) -> ReadSettings:
    """Reads a settings file.

    Raises:
        BadInput: it can't be read, or is of no trainer that is known.
    """
    ending, text = file.suffix.lower(), read_utf8(file)
    if ending == ".toml":
        values = _toml(text, file)
        known = DATASET if "datasets" in values else KOHYA if set(values) & set(OF_KOHYA) else _kind(_flat(values))
        return ReadSettings(known or _refused(file), values if known == DATASET else _flat(values))
    if ending in (".json", ".yaml", ".yml"):
        whole = parse_json(text, str(file), dict) if ending == ".json" else parse_yaml(text, str(file))
        return _structured(whole, file)
    values = flags(text, file)
    return ReadSettings(_kind(values) or _refused(file), values)


def _structured(values: Any, file: Path) -> ReadSettings:
    if isinstance(values, dict) and "process" in (values.get("config") or {}):
        return ReadSettings(AI_TOOLKIT, values)
    if isinstance(values, dict) and {"training_method", "base_model_name", "concept_file_name"} & set(values):
        return ReadSettings(ONE_TRAINER, values)
    if isinstance(values, dict) and "datasets" in values and "general" in values:
        return ReadSettings(DATASET, values)
    if isinstance(values, dict) and _kind(values):
        return ReadSettings(_kind(values), values)
    _refused(file)
    raise AssertionError


def _refused(file: Path) -> str:
    raise BadInput(f"{file} holds no settings of a trainer that is known: {ADVICE}", path=file)


def _kind(values: dict[str, Any]) -> str:
    script = str(values.get("script", ""))
    if "instance_data_dir" in values or "dreambooth" in script or "text_to_image" in script:
        return DIFFUSERS
    if set(values) & set(OF_KOHYA):
        return KOHYA
    return DIFFUSERS if set(values) & set(OF_DIFFUSERS) else ""


def _toml(text: str, file: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(text)
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise BadInput(f"{file} is not valid TOML ({error}): correct that line", path=file) from error


def _flat(values: dict[str, Any]) -> dict[str, Any]:
    """kohya ignores the names of sections in a TOML of flags."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        found |= value if isinstance(value, dict) else {key: value}
    return found


def flags(text: str, file: Path) -> dict[str, Any]:
    """The flags of the command in a shell script, a batch file or a text: --name value, --name=value, --name.

    Variables that the same text sets (export NAME=value, NAME=value, set NAME=value) are filled in.

    Raises:
        BadInput: it holds no flags, or quotes without an end.
    """
    joined = re.sub(r"[ \t]*[\\^`][ \t]*\r?\n", " ", text)
    lines = [line for line in joined.splitlines() if not re.match(r"\s*(#|::|rem\b)", line, re.IGNORECASE)]
    variables = dict(found for line in lines for found in _assigned(line))
    line = next((each for each in lines if re.search(r"\.py\b", each)), None) or next(
        (each for each in lines if "--" in each), ""
    )
    for name, value in sorted(variables.items(), key=lambda pair: -len(pair[0])):
        place = rf"\$(?:env:)?\{{?{re.escape(name)}\}}?(?!\w)|%{re.escape(name)}%"
        line = re.sub(place, value.replace("\\", r"\\"), line)
    try:
        words = shlex.split(line, posix="\\" not in line)
    except ValueError as error:
        raise BadInput(f"the command in {file} can't be read ({error}): close its quotes", path=file) from error
    found = _pairs([word.strip("\"'") if "\\" in line else word for word in words])
    if not any(key != "script" for key in found):
        raise BadInput(f"{file} has no command with flags (--name value): {ADVICE}", path=file)
    return found


def _assigned(line: str) -> list[tuple[str, str]]:
    found = re.match(r"\s*(?:export\s+|set\s+|\$env:|\$)?(\w+)\s*=\s*(.*?)\s*$", line)
    return [(found[1], found[2].strip("\"'"))] if found and "--" not in line else []


def _pairs(words: list[str]) -> dict[str, Any]:
    """The flags behind the script; those before it are the launcher's."""
    script = next((number for number, word in enumerate(words) if word.endswith(".py")), None)
    found: dict[str, Any] = {} if script is None else {"script": words[script].replace("\\", "/").split("/")[-1]}
    name = ""
    for word in words[0 if script is None else script + 1 :]:
        if word.startswith("--"):
            name, _, value = word[2:].partition("=")
            found[name] = value if "=" in word else True
        elif name and found[name] is True:
            found[name] = word
        elif name:
            held = found[name]
            found[name] = [*held, word] if isinstance(held, list) else [held, word]
    for key in ("network_args", "optimizer_args"):
        if isinstance(found.get(key), str):
            found[key] = [found[key]]
    return found
