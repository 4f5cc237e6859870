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
    """CLIP's tokenizer from a folder with its vocabulary. The file of merges has a first line that is none."""
    from transformers import CLIPTokenizer

    vocab = json.loads((folder / "vocab.json").read_text(encoding="utf-8"))
    lines = (folder / "merges.txt").read_text(encoding="utf-8").splitlines()
    merges = [tuple(line.split()) for line in lines[1:48895]]
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

- `finetune/data/known.txt` lists {known} tokens with a meaning. They are never chosen. Whoever gives one gets a line
  in the plan. Plurals of listed tokens count as listed, and so do weather hashtags, clubs and channels by endings.
- `finetune/data/pieces.txt` lists {all} that mean nothing alone. They are ends of longer words, so the tokenizer makes
  one piece of them. The {shown} rarest are below, with words that end so.

Still, this is one reader's knowledge, in a few languages. An end may recall the words it ends, and somebody may have
such a name.

**The order below is that of the vocabulary alone** (an id is a rank by frequency: a high one is rare). How a base
reacts to a token needs its weights. So each run measures it on its own base, and
`finetune tokens suggest --base BASE` shows it:

1. Tokens that lie nearer to words with a meaning, in the embedding table, than half of the listed ones are left out.
2. So are tokens that move the text encoders' output, in any of three prompts, further than the median listed one does.
3. Of at most 24 others, the third that moves every prompt furthest stays. If the encoders hardly notice a token, the
   class becomes the subject ([measured](results.md#what-was-tried) on the tiny base).
4. Of these, the one that changes what the denoiser draws least is chosen.

Nobody has run this rule on real weights yet ([status](status.md)).

| token | id | words that end so |
|---|---|---|
"""

if __name__ == "__main__":
    main()
