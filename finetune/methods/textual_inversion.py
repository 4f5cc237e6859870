"""Textual inversion (arXiv:2208.01618): trains the embeddings of a new word, and keeps the base frozen.

`Inversion` is the base class of all methods with new words. It adds a word for the subject (`<subject>`) and a few
rows to the frozen embedding table of each CLIP encoder, and trains only those rows. T5 encoders get no rows, because
embedding files can't hold them: they read the initialiser's words instead.
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
    """Trains `vectors` embeddings for one new word.

    They start as copies of the embeddings of `init` (None: the class noun). Each word of `init` must be one token; the
    words repeat if there are more vectors. `norm: keep` fixes the vectors' norm at the mean of the base's table.
    """

    vectors: int = Field(default=1, ge=1, le=32)
    init: str | None = Field(default=None, min_length=1)
    norm: Literal["free", "keep"] = "free"

    @property
    def is_adapter(self) -> bool:
        return True

    def add_subject_token(self, family: Family, token: str, noun: str | None) -> str:
        """Adds tokens and rows for the new word, in place. Returns it: `<zwx>` for a token `zwx`.

        Raises:
            BadInput: there is no initialiser, one of its words is not a single token, or the token can't be used.
        """
        name, words = _name(token), self.init or noun
        if not family.tokenizers:  # on the meta device there are no tokenizers
            for part in family.trainable_text_encoders:
                encoder = cast(Any, family.parts[part])
                first = encoder.get_input_embeddings().num_embeddings
                extend_embeddings(encoder, first, [0] * self.vectors, self.norm)
            return f"<{name}>"
        if words is None:
            raise BadInput(
                "method.init is missing and there is no class noun: describe the subject with a word that the base "
                "knows, such as method.init=toy"
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
        """The ids of the tokens whose embeddings are the vectors' start values."""
        pieces = {word: tokenizer.tokenize(word) for word in words.split()}
        split = next((word for word, cut in pieces.items() if len(cut) != 1), None)
        if split is not None:
            shown = " + ".join(piece.removesuffix("</w>") for piece in pieces[split])
            raise BadInput(
                f"this base splits the initialiser {split!r} into {len(pieces[split])} tokens ({shown}): set "
                "method.init "
                "to a common word that is one token"
            )
        ids = tokenizer.convert_tokens_to_ids([pieces[word][0] for word in words.split()])
        if len(ids) > self.vectors:
            raise BadInput(
                f"the initialiser {words!r} has {len(ids)} words but method.vectors is {self.vectors}: set "
                f"method.init to fewer words, or method.vectors={len(ids)}"
            )
        return [ids[k % len(ids)] for k in range(self.vectors)]

    def attach_rows(self, family: Family) -> dict[str, nn.Parameter]:
        """Unfreezes the rows that `add_subject_token` added."""
        trained = {f"{part}.{path}.new.rows": table.new.rows for part, path, table in extensions(family)}
        if not trained:
            raise TypeError("this family has no new rows: call add_subject_token before attach")
        for parameter in trained.values():
            parameter.requires_grad_(True)
        return trained

    def adapted_modules(self, family: Family) -> int:
        return 0

    def new_vectors(self, family: Family) -> int:
        return sum(len(table.new.rows) for _, _, table in extensions(family))

    def rows(self, family: Family) -> dict[str, nn.Parameter]:
        """The rows by their names in `state_dict`: "text_encoder.embeddings.token_embedding.rows"."""
        return {f"{part}.{strip_text_model(path)}.rows": table.new.rows for part, path, table in extensions(family)}

    def load_rows(self, family: Family, state: dict[str, Tensor]) -> None:
        import torch

        own = self.rows(family)
        wrong = sorted(own.keys() ^ state.keys()) or [n for n, row in own.items() if row.shape != state[n].shape]
        if wrong:
            raise BadInput(
                f"the embeddings do not fit the recipe: {len(wrong)} weights are missing or unknown, such as "
                f"{wrong[0]!r}: "
                "use the run's own recipe"
            )
        with torch.no_grad():
            for name, parameter in own.items():
                parameter.copy_(state[name])


class TextualInversion(Inversion):
    """Trains only the new embeddings; the base does not change."""

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
