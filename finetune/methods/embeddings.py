"""New rows beside the frozen embedding tables of CLIP encoders, and tokens for them (arXiv:2208.01618)."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, cast

from finetune.core.errors import BadInput

if TYPE_CHECKING:
    from torch import Tensor, nn

    from finetune.families.base import Family
    from finetune.methods.layers.embedding import ExtendedEmbedding

SUBJECT = "subject"  # what data.token "auto" is called
LEGACY_EOS = 2  # in old configs of CLIP; transformers then takes the highest id for the end of the text


def extensions(family: Family) -> Iterator[tuple[str, str, ExtendedEmbedding]]:
    """(part, module path, table with new rows) of a family whose subject was named."""
    from finetune.methods.layers.embedding import ExtendedEmbedding

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
    """The new embeddings of a named family, whatever the method's norm was."""
    from finetune.methods.layers.embedding import Rows

    for part, _, table in extensions(family):
        table.new = Rows(values[part].to(table.new.rows.device))


def _name(token: str) -> str:
    """ "zwx" for `zwx` and `<zwx>`, "subject" for `auto`."""
    if token == "auto":
        return SUBJECT
    found = re.fullmatch(r"<?([\w-]+)>?", token)
    if found is None:
        raise BadInput(
            f"the token {token!r} can't name new embeddings: give a name of letters and digits, such as data.token=zwx"
        )
    return found[1]


def add_tokens(tokenizer: Any, name: str, count: int) -> int:
    """Adds `<name_0>`, `<name_1>`, ..., for which `<name>` stands in prompts; returns the first one's id.

    They are spelled unlike diffusers' `<name>`, `<name>_1`, so that its pipelines do not expand prompts once more.
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
    """A tokenizer that reads `text` where a prompt has the placeholder: so does every pipeline that is given it."""
    from tokenizers import Regex, normalizers

    backend = tokenizer.backend_tokenizer
    before = [] if backend.normalizer is None else [backend.normalizer]
    replace = normalizers.Replace(Regex(f"(?i){re.escape(placeholder)}"), text)
    backend.normalizer = normalizers.Sequence([*before, replace])


def extend_embeddings(encoder: Any, first: int, start: list[int], norm: str) -> None:
    from finetune.methods.layers.embedding import Directions, ExtendedEmbedding, Rows

    table = encoder.get_input_embeddings()
    weight = table.weight.detach()
    begin = weight[start]
    # both norms, for a recipe's `free` and `keep`
    new = Rows(begin) if norm == "free" else Directions(begin, weight.float().norm(dim=-1).mean())
    encoder.set_input_embeddings(ExtendedEmbedding(table, first, new).train(encoder.training))


def fix_eos_token_id(encoder: nn.Module, tokenizer: Any) -> bool:
    """The pooled vector is the end of the text's. Where a config says that its id is 2, transformers looks for the
    highest id, which is a new token's now; ordinary prompts are not changed by looking for the true one. Returns
    whether it was so."""
    legacy = [module for module in encoder.modules() if getattr(module, "eos_token_id", None) == LEGACY_EOS]
    for module in legacy:
        cast(Any, module).eos_token_id = int(tokenizer.eos_token_id)
    return bool(legacy)
