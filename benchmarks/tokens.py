"""Writes docs/tokens.md: the rare tokens of CLIP's vocabulary, from the vocabulary alone.

    python benchmarks/tokens.py ../shared/clip-vocab

The folder holds vocab.json and merges.txt of CLIP's tokenizer, which Stable Diffusion 1.x, 2.x, SDXL, SD3 and Flux
use.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
COUNT = 50


def main() -> None:
    """Writes the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("vocabulary", type=Path, help="a folder with vocab.json and merges.txt")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "tokens.md")
    options = parser.parse_args()
    options.out.write_text(page(clip_tokenizer(options.vocabulary)), encoding="utf-8", newline="\n")


def clip_tokenizer(folder: Path) -> Any:
    """CLIP's tokenizer from a folder with its vocabulary. The first line of merges.txt is a comment.

    Returns:
        transformers' CLIPTokenizer, as the bases have it: 49,408 pieces, prompts of 77.
    """
    from transformers import CLIPTokenizer

    vocab = json.loads((folder / "vocab.json").read_text(encoding="utf-8"))
    lines = (folder / "merges.txt").read_text(encoding="utf-8").splitlines()
    merges: Any = [tuple(line.split()) for line in lines[1:48895]]  # transformers' types lack pairs
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=77)


def page(tokenizer: Any) -> str:
    """The page, with the `COUNT` rarest candidates."""
    from finetune.data import meanings
    from finetune.data.tokens import rare_tokens

    found = rare_tokens([tokenizer])
    ends, vocab = meanings.pieces(), tokenizer.get_vocab()
    rows = [f"| `{text}` | {vocab[text + '</w>']} | {ends[text]} |" for text in found[:COUNT]]
    return HEAD.format(all=len(found), known=len(meanings.explained()), shown=len(rows)) + "\n".join(rows) + "\n"


HEAD = """# Rare tokens of CLIP's vocabulary

Made by `python benchmarks/tokens.py ../shared/clip-vocab`. Stable Diffusion 1.x, 2.x, SDXL, SD3 and Flux share this
vocabulary, but not the weights.

A rare token should mean nothing to the base. Short tokens from the rare end of the vocabulary mostly do mean
something: they are abbreviations, names, brands and teams. All those of 3 and 4 letters were looked at, and those of 5
in part.

- `finetune/data/known.txt` lists {known} tokens with a meaning. They are never chosen. If you give one, the plan
  says what it means. Their plurals count as listed too, and so does what ends as a weather hashtag, a football club or
  a TV channel does (`wx`, `fc`, `tv`).
- `finetune/data/pieces.txt` lists {all} that mean nothing alone. They are the ends of longer words, and the tokenizer
  has a piece for each. The {shown} rarest are below, with words that have this end.

Still, this is one reader's knowledge, in a few languages. Such an end may recall the words it ends, and may be
somebody's name.

**The order below is that of the vocabulary alone** (an id is a rank by frequency: a high one is rare). How a base
reacts to a token depends on its weights. So each run measures it on its own base, and
`finetune tokens suggest --base BASE` shows the result:

1. Candidates that lie nearer to words with a meaning, in the embedding table, than half of the rare tokens of
   `known.txt` do are left out. At least 8 stay, here and in step 2.
2. At most 24 of the rest are tried in three prompts. Those that move the text encoders' output, in any prompt, further
   than the median of the tokens of `known.txt` does are left out.
3. Of the rest, the third that moves every prompt furthest stays. If the encoders hardly notice a token, the class
   becomes the subject ([measured](results.md#what-was-tried-on-version-1-of-the-tiny-base) on the tiny base).
4. Of these, the one that changes the denoiser's prediction least is chosen.

Nobody has run this rule on real weights yet ([status](status.md)).

| token | id | words with this end |
|---|---|---|
"""

if __name__ == "__main__":
    main()
