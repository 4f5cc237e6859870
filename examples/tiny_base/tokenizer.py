"""Writes the tiny base's tokenizer: CLIP's byte-pair scheme with its own vocabulary.

    python examples/tiny_base/tokenizer.py --out build/tokenizer

The captions' words and the named things come first, then common English words, then rare tokens that no caption
uses. So a high id means a rare token, as in CLIP's vocabulary.
"""

from __future__ import annotations

import argparse
import itertools
import json
from pathlib import Path
from typing import Any, cast

from captions import PLACE_PHRASES, TEMPLATES
from looks import COLOURS, NAMES, PATTERNS
from shapes import CLASSES, LOGOS, WORN

LENGTH = 32
RARE_TEXT = """
sks ohwx zwx vtx qbv xjy rpz kwg fzq hjk bxv gqz jvw pzk wqx dvk mzx nqj tzb ykv cvj zqf uxz lqr kvz
xqh zjt vqp wzd bqk jxr qmz fvx gzk hvq pxj rqw tvz xkd zbn vkqz xwvt qzjk bvxq
"""
ENGLISH_TEXT = """
a an the of in on at by to and or with without from for is are was be it this that one two three
four five photo picture image drawing painting sketch style small big large little old new red
orange yellow green blue purple pink brown black white grey dark light bright striped dotted plain
spotted checked shiny soft hard wooden plastic metal cup mug ball house car fish backpack dog cat
bird horse toy teapot vase candle clock duck boot shoe sneaker bag box bowl bottle can chair table
desk lamp book plant flower tree leaf grass beach sand sea water river lake mountain hill forest
snow ice rain sun moon star sky cloud night day morning evening city street road building bridge
park garden field farm room kitchen window door wall floor roof home person man woman boy girl child
face hand eye hair hat shirt dress coat food fruit apple banana cake bread cheese coffee tea milk
egg fire stone glass paper cloth wood gold silver left right top bottom front back side under over
near behind beside inside outside up down high low long short round square flat standing sitting
running walking sleeping eating playing wearing holding looking open closed full empty first last
good bad best nice beautiful cute happy sad hot cold warm cool fast slow early late young real art
film camera close view scene background portrait landscape detail sharp blurry simple colorful
colour color robot monster stuffed animal wolf plushie sunglasses rc cartoon devil bear berry fancy
colorful poop emoji jungle eiffel tower wheat purple rug cube shaped santa outfit chef police
rainbow scarf tree autumn leaves floating mirror pond some any many few more most very much not no
yes all his her its their our your my you we they he she them what which who where when how why
there here
"""
RARE, ENGLISH = RARE_TEXT.split(), ENGLISH_TEXT.split()


def byte_symbols() -> list[str]:
    """The 256 printable characters that stand for bytes in CLIP (the GPT-2 table), in CLIP's order."""
    plain = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in plain]
    return [chr(byte) for byte in plain] + [chr(256 + k) for k in range(len(others))]


class Pairs:
    """A byte-pair vocabulary that grows word by word; a later merge never changes an earlier word."""

    def __init__(self) -> None:
        symbols = byte_symbols()
        self.vocab = [*symbols, *[symbol + "</w>" for symbol in symbols]]
        self.ranks: dict[tuple[str, str], int] = {}

    def split(self, word: str) -> list[str]:
        pieces = [*word[:-1], word[-1] + "</w>"]
        while True:
            pairs = [(self.ranks[pair], k) for k, pair in enumerate(itertools.pairwise(pieces)) if pair in self.ranks]
            if not pairs:
                return pieces
            k = min(pairs)[1]
            pieces[k : k + 2] = [pieces[k] + pieces[k + 1]]

    def add(self, word: str) -> None:
        pieces = self.split(word)
        while len(pieces) > 1:
            self.ranks[(pieces[0], pieces[1])] = len(self.ranks)
            self.vocab.append(pieces[0] + pieces[1])
            pieces = self.split(word)


def build() -> Pairs:
    pairs = Pairs()
    words = [
        *CLASSES,
        *COLOURS,
        *PATTERNS,
        *LOGOS,
        *WORN,
        "with",
        "and",
        "wearing",
        *PLACE_PHRASES.values(),
        *TEMPLATES,
    ]
    world = " ".join([*words, *NAMES]).replace("{thing}", "")
    for word in dict.fromkeys([*world.split(), *ENGLISH, *RARE]):
        pairs.add(word)
    pairs.vocab += ["<|startoftext|>", "<|endoftext|>"]
    return pairs


def write(folder: Path) -> None:
    """Writes vocab.json and merges.txt (for older versions) and tokenizer.json, and loads it as a check."""
    from transformers import CLIPTokenizer

    folder.mkdir(parents=True, exist_ok=True)
    pairs = build()
    vocab = {text: index for index, text in enumerate(pairs.vocab)}
    assert len(vocab) == len(pairs.vocab), "a piece was added twice"
    merges = list(pairs.ranks)
    pairs_of = cast("Any", merges)  # transformers' types lack pairs
    tokenizer = CLIPTokenizer(vocab=vocab, merges=pairs_of, model_max_length=LENGTH, pad_token="<|endoftext|>")
    assert len(tokenizer) == len(vocab)
    for word in (*RARE, *CLASSES, *COLOURS, *NAMES, *LOGOS, *WORN):
        assert len(tokenizer(word)["input_ids"]) == 3, word
    tokenizer.save_pretrained(folder)
    (folder / "vocab.json").write_text(json.dumps(vocab, ensure_ascii=False), encoding="utf-8")
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    again = CLIPTokenizer.from_pretrained(folder)
    assert len(again) == len(vocab)
    assert again.model_max_length == LENGTH
    assert again("a photo of sks mug")["input_ids"] == tokenizer("a photo of sks mug")["input_ids"]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("build/tokenizer"))
    write(parser.parse_args().out)
