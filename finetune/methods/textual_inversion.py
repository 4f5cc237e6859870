"""Textual inversion (arXiv:2208.01618): new words for the frozen base, one or several trained embeddings each.

`Inversion` is what every method with words of its own does: it names the subject (`<subject>`), puts a few rows
beside the frozen table of each CLIP encoder, and trains those rows only. T5 encoders get no rows (files of embeddings
have no place for them): they read the initialiser's words instead.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal, cast

from pydantic import Field, field_validator

from finetune.core.errors import BadInput
from finetune.families.naming.clip import strip_text_model
from finetune.methods.base import Method, Part
from finetune.methods.embeddings import (
    _name,
    add_tokens,
    extend_embeddings,
    extensions,
    fix_eos_token_id,
    rewrite_prompt,
)

if TYPE_CHECKING:
    from torch import Tensor, nn

    from finetune.families.base import Family


class Inversion(Method):
    """`vectors` embeddings for one placeholder; they begin as `init` (None: the class noun), whose words must each be
    one token, and are repeated where there are more vectors. `norm: keep` fixes their length at the base's mean.
    """

    vectors: int = Field(default=1, ge=1, le=32)
    init: str | None = Field(default=None, min_length=1)
    norm: Literal["free", "keep"] = "free"

    @property
    def is_adapter(self) -> bool:
        return True

    def add_subject_token(self, family: Family, token: str, noun: str | None) -> str:
        """New tokens and rows for the placeholder, in place; `<zwx>` for a token `zwx`.

        Raises:
            BadInput: no initialiser, one that is not made of whole tokens, or a name that can't be used.
        """
        name, words = _name(token), self.init or noun
        if not family.tokenizers:  # on the meta device, where nothing is read
            for part in family.trainable_text_encoders:
                encoder = cast(Any, family.parts[part])
                first = encoder.get_input_embeddings().num_embeddings
                extend_embeddings(encoder, first, [0] * self.vectors, self.norm)
            return f"<{name}>"
        if words is None:
            raise BadInput(
                "method.init is missing and there is no class noun: say what the subject is like in a word that the "
                "base knows, such as method.init=toy"
            )
        for part, tokenizer in zip(family.text_encoders, family.tokenizers, strict=True):
            if part not in family.trainable_text_encoders:
                rewrite_prompt(tokenizer, f"<{name}>", words)
                continue
            start = self._start(tokenizer, words)
            first = add_tokens(tokenizer, name, self.vectors)
            extend_embeddings(cast(Any, family.parts[part]), first, start, self.norm)
            fix_eos_token_id(family.parts[part], tokenizer)
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

    def adapted_modules(self, family: Family) -> int:
        return 0

    def new_vectors(self, family: Family) -> int:
        return sum(len(table.new.rows) for _, _, table in extensions(family))

    def rows(self, family: Family) -> dict[str, nn.Parameter]:
        """The rows by the names that leave the run: "text_encoder.embeddings.token_embedding.rows"."""
        return {f"{part}.{strip_text_model(path)}.rows": table.new.rows for part, path, table in extensions(family)}

    def load_rows(self, family: Family, state: dict[str, Tensor]) -> None:
        import torch

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
    parts: list[Part] = Field(default=["text_encoders"], min_length=1)
    artifacts: ClassVar = ("embedding",)

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
