"""Textual-inversion files, which UIs and diffusers read: one tensor [n, width] for each CLIP encoder.

The file's name is the word for prompts: `mug.safetensors` is "mug" in A1111 and Forge, and "embedding:mug" in ComfyUI.
The initialiser's words, which T5 reads instead of the new word, are not in the file.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from finetune.core.devices import DTYPES
from finetune.core.errors import BadInput
from finetune.core.files import save_tensors
from finetune.core.records import Check
from finetune.export.base import EmbeddingExport, Exported, NewWords, Request, unchecked
from finetune.export.bench import Bench
from finetune.export.metadata import checkpoint_metadata
from finetune.export.verify import BOUNDS, predicted, same_prediction
from finetune.families.base import Family
from finetune.families.registry import FAMILIES
from finetune.methods.embeddings import fix_eos_token_id, set_embeddings
from finetune.methods.textual_inversion import Inversion

# the encoder's prefix in kohya's files -> its key in embedding files
KEYS = {"lora_te": "emb_params", "lora_te1": "clip_l", "lora_te2": "clip_g"}
PROMPT = "a photo of {} on the beach"
OURS, THEIRS = "first-reader", "<second-reader>"


def keys(family: str) -> dict[str, str]:
    """Text encoder -> the name of its tensor in a file."""
    prefixes = FAMILIES[family].naming.prefixes
    return {part: KEYS[prefix] for part, prefix in prefixes.items() if prefix in KEYS}


class Embedding(EmbeddingExport):
    name = "embedding"

    def path(self, folder: Path, name: str, family: str) -> Path:
        return folder / f"{name}.safetensors"

    def readers(self, family: str) -> tuple[str, ...]:
        return readers(family)

    def export(self, words: NewWords, family: Family, request: Request, bench: Bench) -> Exported:
        return export_embedding(words, family, request, bench)

    def read(self, path: Path, family: str) -> dict[str, Tensor]:
        return read_embedding(path, family)

    def usage(self, family: str, file: str, token: str) -> list[str]:
        return usage(family, file, token)


def export_embedding(words: NewWords, family: Family, request: Request, bench: Bench) -> Exported:
    """Writes new embeddings, reads them back with our reader and with diffusers, and compares. `family` is the trained
    one; its parts may already be released."""
    names, trained, dtype = keys(family.name), words.rows, DTYPES[request.dtype]
    path = request.folder / f"{request.name}.safetensors"
    metadata = checkpoint_metadata(family.name, request.about, request.v_prediction, kind="/textual-inversion")
    save_tensors(path, {names[part]: value.to(dtype) for part, value in trained.items()}, metadata)
    if bench.verify == "off":
        return unchecked(Embedding.name, path, sum(len(value) for value in trained.values()))
    rows, size = sum(len(value) for value in trained.values()), path.stat().st_size
    try:
        again = read_embedding(path, family.name)
    except BadInput as fault:
        return Exported(Embedding.name, path, size, 0, float("inf"), [], [Check("file", False, str(fault))])
    error, check = _compare(trained, again, BOUNDS[dtype])
    checks = [check]
    theirs = bench.verify == "full" and "diffusers" in readers(family.name)
    if theirs and check.passed:
        checks.append(read_by_diffusers(words.method, again, path, words.initial, bench))
    ok = all(check.passed for check in checks)
    return Exported(Embedding.name, path, size, rows, error, list(readers(family.name)) if ok else [], checks)


def readers(family: str) -> tuple[str, ...]:
    """The programs that are known to read an embedding file of this family."""
    return FAMILIES[family].naming.known_readers.embedding


def read_embedding(path: Path, family: str) -> dict[str, Tensor]:
    """Reads the embeddings from a file: text encoder -> [n, width], fp32.

    Raises:
        BadInput: the file is damaged, or belongs to another kind of base.
    """
    try:
        held = load_file(path)
    except (SafetensorError, OSError) as error:
        raise BadInput(f"{path} is not a complete safetensors file ({error}): export it again") from error
    names = keys(family)
    if held.keys() != set(names.values()):
        raise BadInput(
            f"{path} holds {', '.join(sorted(held))} but an embedding for {family} holds "
            f"{' and '.join(names.values())}: give an embedding for this base"
        )
    return {part: held[key].float() for part, key in names.items()}


def _compare(trained: dict[str, Tensor], again: dict[str, Tensor], bound: float) -> tuple[float, Check]:
    shapes = {part: tuple(value.shape) for part, value in trained.items()}
    if shapes != {part: tuple(value.shape) for part, value in again.items()}:
        return float("inf"), Check("weights", False, f"the embeddings do not have the shape {shapes}")
    pairs = [pair for part, values in trained.items() for pair in zip(again[part], values, strict=True)]
    error = max(_relative(found, value) for found, value in pairs)
    line = f"{len(pairs)} embeddings re-read, largest relative error {error:.1e}"
    passed = error <= bound
    return error, Check("weights", passed, line if passed else f"{line} (bound {bound:.0e})", error)


@torch.no_grad()
def read_by_diffusers(method: Inversion, values: dict[str, Tensor], path: Path, words: str, bench: Bench) -> Check:
    """Loads the file into a clean base with diffusers' load_textual_inversion, and compares two things.

    The rows that a prompt then reads must equal `values` in the base's precision. The prediction must equal that of
    our own reader. T5, which is not in the file, reads the same words in both. Both predictions use the same modules
    and rows, so the error bound holds in every precision.
    """
    with bench.clean() as family:
        legacy = [fix_eos_token_id(family.parts[part], tokenizer) for part, tokenizer in _clip(family)]
        before = _probe(family, dict.fromkeys(family.text_encoders, words))
        pipeline = family.drawing.pipeline()
        with torch.random.fork_rng(devices=[]):  # diffusers draws random rows before it fills them
            _load_with_diffusers(pipeline, family, path)
        converted = {part: pipeline.maybe_convert_prompt(THEIRS, tokenizer) for part, tokenizer in _clip(family)}
        fault = _other_rows(family, converted, values)
        theirs = _probe(family, dict.fromkeys(family.text_encoders, words) | converted)
        placeholder = method.add_subject_token(family, OURS, words)
        set_embeddings(family, values)
        own = {part: placeholder for part, _ in _clip(family)}
        ours = _probe(family, dict.fromkeys(family.text_encoders, words) | own)
    if fault:
        return Check("diffusers", False, f"diffusers reads other embeddings: {fault}")
    moved, error = _relative(before, ours), _relative(theirs, ours)
    fixed = " after a fix of its text encoder's eos_token_id, which is 2 in this base's config" if any(legacy) else ""
    line = f"diffusers reads it back{fixed}: error {error:.1e} (the embedding itself moves it by {moved:.1e})"
    return Check("diffusers", same_prediction(error, moved), line, error)


def _other_rows(family: Family, prompts: dict[str, str], values: dict[str, Tensor]) -> str:
    """What is wrong with the rows that diffusers' tokens read from each embedding table; "" if nothing."""
    for part, tokenizer in _clip(family):
        ids = tokenizer(prompts[part], add_special_tokens=False)["input_ids"]
        encoder: Any = family.parts[part]
        rows = encoder.get_input_embeddings().weight[ids]
        if not torch.equal(rows, values[part].to(rows)):
            return f"the {len(ids)} rows that {part} reads differ from those in the file"
    return ""


def _clip(family: Family) -> list[tuple[str, Any]]:
    """(text encoder, its tokenizer) of the encoders with new embeddings."""
    both = zip(family.text_encoders, family.tokenizers, strict=True)
    return [(part, tokenizer) for part, tokenizer in both if part in keys(family.name)]


def _load_with_diffusers(pipeline: Any, family: Family, path: Path) -> None:
    """Loads by file if the pipeline's first encoder is the only one, otherwise one tensor for each encoder, as
    diffusers documents it."""
    if list(keys(family.name)) == ["text_encoder"]:
        pipeline.load_textual_inversion(str(path.parent), weight_name=path.name, token=THEIRS)
        return
    held = load_file(path)
    for part, tokenizer in _clip(family):
        pipeline.load_textual_inversion(
            held[keys(family.name)[part]], token=THEIRS, text_encoder=family.parts[part], tokenizer=tokenizer
        )


def usage(family: str, file: str, token: str) -> list[str]:
    """Lines of Python that load the file with diffusers; empty if diffusers has no reader for it."""
    if "diffusers" not in readers(family):
        return []
    if list(keys(family)) == ["text_encoder"]:
        return [f'pipeline.load_textual_inversion(".", weight_name="{file}", token={json.dumps(token)})']
    each = [
        f'pipeline.load_textual_inversion(rows["{key}"], token={json.dumps(token)}, text_encoder=pipeline.{part}, '
        f"tokenizer=pipeline.{part.replace('text_encoder', 'tokenizer')})"
        for part, key in keys(family).items()
    ]
    return ["from safetensors.torch import load_file", "", f'rows = load_file("{file}")', *each]


def _probe(family: Family, subject: dict[str, str]) -> Tensor:
    """The conditions and the prediction for one text for each encoder, as one vector."""
    texts = [PROMPT.format(subject[part]) for part in family.text_encoders]
    return predicted(
        family, family.join_texts([family.encode_text(index, [text]) for index, text in enumerate(texts)])
    )


def _relative(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm().clamp(min=1e-30))
