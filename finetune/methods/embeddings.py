"""Adds tokens to CLIP tokenizers, and trainable rows to their frozen embedding tables (arXiv:2208.01618)."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, cast

from finetune.core.errors import BadInput

if TYPE_CHECKING:
    from torch import Tensor, nn

    from finetune.families.base import Family
    from finetune.methods.layers.extended_embedding import ExtendedEmbedding

SUBJECT = "subject"  # the name of the new token if data.token is "auto"
LEGACY_EOS = 2  # eos_token_id in old CLIP configs: transformers then takes the highest token id as the text's end


def extensions(family: Family) -> Iterator[tuple[str, str, ExtendedEmbedding]]:
    """(part, module path, extended table) for each text encoder with new rows."""
    from finetune.methods.layers.extended_embedding import ExtendedEmbedding

    for part in family.trainable_text_encoders:
        for path, module in family.parts[part].named_modules():
            if isinstance(module, ExtendedEmbedding):
                yield part, path, module


def embeddings(family: Family) -> dict[str, Tensor]:
    """Part -> its new embeddings [n, width], fp32, as the encoder reads them."""
    import torch

    with torch.no_grad():
        return {part: table.new().detach().clone() for part, _, table in extensions(family)}


def set_embeddings(family: Family, values: dict[str, Tensor]) -> None:
    """Sets the new embeddings, whatever `norm` the method uses."""
    from finetune.methods.layers.extended_embedding import Rows

    for part, _, table in extensions(family):
        table.new = Rows(values[part].to(table.new.rows.device))


def _name(token: str) -> str:
    """ "zwx" for `zwx` and `<zwx>`, "subject" for `auto`."""
    if token == "auto":
        return SUBJECT
    found = re.fullmatch(r"<?([\w-]+)>?", token)
    if found is None:
        raise BadInput(
            f"the token {token!r} can't name new embeddings: use letters and digits, such as data.token=zwx"
        )
    return found[1]


def add_tokens(tokenizer: Any, name: str, count: int) -> int:
    """Adds the tokens `<name_0>`, `<name_1>`, ..., for which `<name>` stands in prompts. Returns the first one's id.

    diffusers' own names would be `<name>`, `<name>_1`. Other names keep its pipelines from expanding prompts again.

    Raises:
        BadInput: the tokenizer already has one of these tokens.
    """
    new = [f"<{name.lower()}_{k}>" for k in range(count)]
    taken = next((text for text in new if text in tokenizer.get_vocab()), None)
    if taken is not None:
        raise BadInput(f"the base's tokenizer has {taken!r} already: give another name with data.token=NAME")
    tokenizer.add_tokens(new)
    ids: list[int] = tokenizer.convert_tokens_to_ids(new)
    assert ids == list(range(ids[0], ids[0] + count))
    rewrite_prompt(tokenizer, f"<{name}>", " ".join(new))
    return ids[0]


def rewrite_prompt(tokenizer: Any, placeholder: str, text: str) -> None:
    """Makes the tokenizer read `text` in place of the placeholder, also inside pipelines."""
    from tokenizers import Regex, normalizers

    backend = tokenizer.backend_tokenizer
    before = [] if backend.normalizer is None else [backend.normalizer]
    replace = normalizers.Replace(Regex(f"(?i){re.escape(placeholder)}"), text)
    backend.normalizer = normalizers.Sequence([*before, replace])


def extend_embeddings(encoder: Any, first: int, start: list[int], norm: str) -> None:
    from finetune.methods.layers.extended_embedding import Directions, ExtendedEmbedding, Rows

    table = encoder.get_input_embeddings()
    weight = table.weight.detach()
    begin = weight[start]
    # the recipe's `norm` is `free` or `keep`
    new = Rows(begin) if norm == "free" else Directions(begin, weight.float().norm(dim=-1).mean())
    encoder.set_input_embeddings(ExtendedEmbedding(table, first, new).train(encoder.training))


def fix_eos_token_id(encoder: nn.Module, tokenizer: Any) -> bool:
    """Sets eos_token_id to the true id if the config has the old value 2. Returns whether it did.

    The pooled vector is read at the end-of-text token. With the value 2, transformers reads it at the highest token id
    instead, which now belongs to a new token. Other prompts give the same result with the true id.
    """
    legacy = [module for module in encoder.modules() if getattr(module, "eos_token_id", None) == LEGACY_EOS]
    for module in legacy:
        cast(Any, module).eos_token_id = int(tokenizer.eos_token_id)
    return bool(legacy)
