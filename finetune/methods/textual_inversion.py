"""Textual inversion (arXiv:2208.01618): new words for the frozen base, one or several trained embeddings each.

`Inversion` is what every method with words of its own does: it names the subject (`<subject>`), puts a few rows
beside the frozen table of each CLIP encoder, and trains those rows only. T5 encoders get no rows (files of embeddings
have no place for them): they read the initialiser's words instead.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any, ClassVar, Literal, cast

import torch
from pydantic import Field, field_validator
from tokenizers import Regex, normalizers
from torch import Tensor, nn

from finetune.errors import BadInput
from finetune.families.base import Family
from finetune.families.layout import strip_text_model
from finetune.methods.base import Method, Part

SUBJECT = "subject"  # what data.token "auto" is called
LEGACY_EOS = 2  # in old configs of CLIP; transformers then takes the highest id for the end of the text


class Rows(nn.Module):
    """New embeddings [n, width]; the parameter is fp32."""

    def __init__(self, start: Tensor) -> None:
        super().__init__()
        self.rows = nn.Parameter(start.detach().float().clone(), requires_grad=False)

    def forward(self) -> Tensor:
        return self.rows


class Directions(Rows):
    """m v / |v| for a parameter v [n, width]: only the direction is learned (arXiv:2512.13672 fixes the norm, too, and
    steps on the sphere; here the sphere is in the parametrisation)."""

    def __init__(self, start: Tensor, norm: Tensor) -> None:
        super().__init__(start)
        self.norm: Tensor
        self.register_buffer("norm", norm.float(), persistent=False)

    def forward(self) -> Tensor:
        return self.norm * nn.functional.normalize(self.rows, dim=-1)


class Extended(nn.Module):
    """A frozen table of embeddings, and new rows for the ids from `first` on; dtype of the table."""

    def __init__(self, base_layer: nn.Embedding, first: int, new: Rows) -> None:
        super().__init__()
        self.base_layer, self.first, self.new = base_layer, first, new  # the base first: its dtype is the encoder's

    def forward(self, ids: Tensor) -> Tensor:
        """[B, length] -> [B, length, width]; the rows get a gradient (of zero) also where no prompt has them."""
        mine = ids >= self.first
        held = self.base_layer(ids.masked_fill(mine, 0))
        new = self.new().to(held.dtype)[(ids - self.first).clamp(min=0)]
        return torch.where(mine[..., None], new, held)


class Inversion(Method):
    """`vectors` embeddings for one placeholder; they begin as `init` (None: the class noun), whose words must each be
    one token, and are repeated where there are more vectors. `norm: keep` fixes their length at the base's mean.
    """

    vectors: int = Field(1, ge=1, le=32)
    init: str | None = Field(None, min_length=1)
    norm: Literal["free", "keep"] = "free"

    @property
    def is_adapter(self) -> bool:
        return True

    def name_subject(self, family: Family, token: str, noun: str | None) -> str:
        """New tokens and rows for the placeholder, in place; `<zwx>` for a token `zwx`.

        Raises:
            BadInput: no initialiser, one that is not made of whole tokens, or a name that can't be used.
        """
        name, words = _name(token), self.init or noun
        if words is None:
            raise BadInput(
                "method.init is missing and there is no class noun: say what the subject is like in a word that the "
                "base knows, such as method.init=toy"
            )
        for part, tokenizer in zip(family.text_encoders, family.tokenizers, strict=True):
            if part not in family.trainable_text_encoders:
                _rewrite(tokenizer, f"<{name}>", words)
                continue
            start = self._start(tokenizer, words)
            first = _add_tokens(tokenizer, name, self.vectors)
            _extend(cast(Any, family.parts[part]), first, start, self.norm)
            mend_end(family.parts[part], tokenizer)
        return f"<{name}>"

    def _start(self, tokenizer: Any, words: str) -> list[int]:
        """The ids whose embeddings the vectors begin as."""
        pieces = {word: tokenizer.tokenize(word) for word in words.split()}
        split = next((word for word, cut in pieces.items() if len(cut) != 1), None)
        if split is not None:
            shown = " + ".join(piece.removesuffix("</w>") for piece in pieces[split])
            raise BadInput(
                f"the initialiser {split!r} is {len(pieces[split])} pieces to this base ({shown}): set method.init to "
                "a plain word that the base knows"
            )
        ids = tokenizer.convert_tokens_to_ids([pieces[word][0] for word in words.split()])
        if len(ids) > self.vectors:
            raise BadInput(
                f"the initialiser {words!r} has {len(ids)} words but method.vectors is {self.vectors}: set "
                f"method.init to fewer words, or method.vectors={len(ids)}"
            )
        return [ids[k % len(ids)] for k in range(self.vectors)]

    def attach_rows(self, family: Family) -> dict[str, nn.Parameter]:
        """Unfreezes the rows; `name_subject` was there before."""
        trained = {f"{part}.{path}.new.rows": table.new.rows for part, path, table in extensions(family)}
        if not trained:
            raise TypeError("name_subject comes before attach: there are no new rows in this family")
        for parameter in trained.values():
            parameter.requires_grad_(True)
        return trained

    def rows(self, family: Family) -> dict[str, nn.Parameter]:
        """The rows by the names that leave the run: "text_encoder.embeddings.token_embedding.rows"."""
        return {f"{part}.{strip_text_model(path)}.rows": table.new.rows for part, path, table in extensions(family)}

    def load_rows(self, family: Family, state: dict[str, Tensor]) -> None:
        own = self.rows(family)
        wrong = sorted(own.keys() ^ state.keys()) or [n for n, row in own.items() if row.shape != state[n].shape]
        if wrong:
            raise BadInput(f"the embeddings and the recipe disagree on {len(wrong)} weights, such as {wrong[0]!r}")
        with torch.no_grad():
            for name, parameter in own.items():
                parameter.copy_(state[name])


class TextualInversion(Inversion):
    """Nothing but the new embeddings is trained; the base stays as it is."""

    kind: Literal["textual_inversion"] = "textual_inversion"
    parts: list[Part] = Field(["text_encoders"], min_length=1)
    leaves: ClassVar = ("embedding",)

    @field_validator("parts")
    @classmethod
    def _only_texts(cls, value: list[Part]) -> list[Part]:
        if value != ["text_encoders"]:
            raise ValueError("textual_inversion trains embeddings of text encoders only: leave it out, or use pivotal")
        return value

    def attach(self, family: Family, seed: int) -> dict[str, nn.Parameter]:
        return self.attach_rows(family)

    def state_dict(self, family: Family) -> dict[str, Tensor]:
        return {name: parameter.detach().clone() for name, parameter in self.rows(family).items()}

    def load_state_dict(self, family: Family, state: dict[str, Tensor]) -> None:
        self.load_rows(family, state)


def extensions(family: Family) -> Iterator[tuple[str, str, Extended]]:
    """(part, module path, table with new rows) of a family whose subject was named."""
    for part in family.trainable_text_encoders:
        for path, module in family.parts[part].named_modules():
            if isinstance(module, Extended):
                yield part, path, module


@torch.no_grad()
def embeddings(family: Family) -> dict[str, Tensor]:
    """Part -> its new embeddings [n, width], fp32, as the encoder reads them."""
    return {part: table.new().detach().clone() for part, _, table in extensions(family)}


@torch.no_grad()
def set_embeddings(family: Family, values: dict[str, Tensor]) -> None:
    """The new embeddings of a named family, whatever the method's norm was."""
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


def _add_tokens(tokenizer: Any, name: str, count: int) -> int:
    """Adds `<name_0>`, `<name_1>`, ..., for which `<name>` stands in prompts; returns the first one's id.

    They are spelled unlike diffusers' `<name>`, `<name>_1`, so that its pipelines do not expand prompts once more.
    """
    new = [f"<{name.lower()}_{k}>" for k in range(count)]
    taken = next((text for text in new if text in tokenizer.get_vocab()), None)
    if taken is not None:
        raise BadInput(f"the base's tokenizer has {taken!r} already: give another name with data.token=NAME")
    tokenizer.add_tokens(new)
    ids = tokenizer.convert_tokens_to_ids(new)
    assert ids == list(range(ids[0], ids[0] + count))
    _rewrite(tokenizer, f"<{name}>", " ".join(new))
    return ids[0]


def _rewrite(tokenizer: Any, placeholder: str, text: str) -> None:
    """A tokenizer that reads `text` where a prompt has the placeholder: so does every pipeline that is given it."""
    backend = tokenizer.backend_tokenizer
    before = [] if backend.normalizer is None else [backend.normalizer]
    replace = normalizers.Replace(Regex(f"(?i){re.escape(placeholder)}"), text)
    backend.normalizer = normalizers.Sequence([*before, replace])


@torch.no_grad()
def _extend(encoder: Any, first: int, start: list[int], norm: str) -> None:
    table = encoder.get_input_embeddings()
    begin = table.weight[start]
    # both norms, for a recipe's `free` and `keep`
    new = Rows(begin) if norm == "free" else Directions(begin, table.weight.float().norm(dim=-1).mean())
    encoder.set_input_embeddings(Extended(table, first, new).train(encoder.training))


def mend_end(encoder: nn.Module, tokenizer: Any) -> bool:
    """The pooled vector is the end of the text's. Where a config says that its id is 2, transformers looks for the
    highest id, which is a new token's now; ordinary prompts are not changed by looking for the true one. Returns
    whether it was so."""
    legacy = [module for module in encoder.modules() if getattr(module, "eos_token_id", None) == LEGACY_EOS]
    for module in legacy:
        cast(Any, module).eos_token_id = int(tokenizer.eos_token_id)
    return bool(legacy)
