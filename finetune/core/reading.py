"""JSON and YAML that somebody else may have written: read within limits, or refused in a sentence.

One policy for all of it: UTF-8 (with or without a mark), at most `MAX_BYTES`, `MAX_DEPTH` deep, whole numbers of at
most `MAX_DIGITS` digits, no key twice, no NaN and no infinity, which JSON does not have.
"""

from __future__ import annotations

import json
import math
from collections.abc import Hashable
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import yaml

from finetune.core.errors import BadInput

MAX_BYTES = 64_000_000  # the largest tokenizer.json has 20 MB
MAX_DEPTH = 64
MAX_DIGITS = 40  # tokenizer_config.json holds 10**30 for "no limit"
MAX_VALUES = 100_000  # of a recipe, with what its aliases repeat

T = TypeVar("T", dict[str, Any], list[Any])


class BadText(BadInput):
    """`reason`: what is wrong, without the file and what to do."""

    def __init__(self, where: str, reason: str, advice: str) -> None:
        super().__init__(f"{where} {reason}: {advice}")
        self.reason = reason


def read_bytes(file: Path, limit: int = MAX_BYTES) -> bytes:
    """A plain file's content.

    Raises:
        BadInput: it is no plain file, or larger than `limit`.
        OSError: it can't be read.
    """
    if file.exists() and not file.is_file():  # a pipe or a device would be read for ever
        raise BadText(str(file), "is no plain file", "put the file itself there")
    with file.open("rb") as opened:
        content = opened.read(limit + 1)
    if len(content) > limit:
        raise BadText(str(file), f"is larger than {limit / 1e6:g} MB, which no such file is", "give the right file")
    return content


def read_utf8(file: Path, limit: int = MAX_BYTES) -> str:
    """Raises: BadInput: as `read_bytes`, or it is not UTF-8."""
    try:
        return read_bytes(file, limit).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise BadText(str(file), f"is not UTF-8 text (byte {error.start} is wrong)", "save it as UTF-8") from error


def read_json(file: Path, kind: type[T], advice: str = "give the right file") -> T:
    """What a JSON file holds: an object (`dict`) or a list.

    Raises:
        BadInput: it is damaged, too large, or holds something else; `advice` says what to do.
    """
    return parse_json(read_utf8(file), str(file), kind, advice)


def parse_json(text: str, where: str, kind: type[T], advice: str = "give the right file", finite: bool = True) -> T:
    """As `read_json`, of a text; `where` it comes from, for the sentence. Not `finite`: with NaN and infinity, which
    Python writes."""
    numbers: dict[str, Any] = {"parse_float": _number, "parse_constant": _refused} if finite else {}
    try:
        value = json.loads(text, object_pairs_hook=_object, parse_int=_whole_number, **numbers)
    except RecursionError as error:
        raise BadText(where, "is nested too deeply to be read", advice) from error
    except ValueError as error:
        raise BadText(where, f"is no JSON ({error})", advice) from error
    if not isinstance(value, kind):
        names = {"dict": "an object", "list": "a list", "str": "a text", "NoneType": "null"}
        found, wanted = (names.get(name, "a number") for name in (type(value).__name__, kind.__name__))
        raise BadText(where, f"holds {found} where {wanted} belongs", advice)
    if _depth(value) > MAX_DEPTH:
        raise BadText(where, f"is nested more than {MAX_DEPTH} deep", advice)
    return value


def parse_yaml(text: str, where: str, loader: type[yaml.SafeLoader] = yaml.SafeLoader) -> Any:
    """Plain data from YAML, by a SafeLoader.

    Raises:
        BadInput: it is no YAML, too deep, or its aliases make it larger than anything that a person writes.
    """
    try:
        value = yaml.load(text, loader)
        fault = "holds more values than a recipe has" if _size(value) > MAX_VALUES else ""
    except RecursionError:
        fault = "is nested too deeply to be read"
    except (yaml.YAMLError, ValueError) as error:  # a ValueError: a number of thousands of digits, a 13th month
        raise BadInput(f"{where} is not valid YAML ({' '.join(str(error).split())[:300]}): mend that line") from error
    if fault or _depth(value) > MAX_DEPTH:
        raise BadInput(f"{where} {fault or f'is nested more than {MAX_DEPTH} deep'}: write it plainly")
    return value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        seen: set[Hashable] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"{twice[:80]!r} stands twice")
    return found


def _whole_number(digits: str) -> int:
    if len(digits) > MAX_DIGITS:
        raise ValueError(f"a whole number of {len(digits)} digits")
    return int(digits)


def _number(digits: str) -> float:
    value = float(digits)
    return value if math.isfinite(value) else _refused(digits[:80])


def _refused(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number of JSON")


def _inside(value: Any) -> list[Any]:
    if isinstance(value, dict):
        return [*value, *value.values()]
    return list(value) if isinstance(value, list | tuple | set) else []


def _depth(value: Any) -> int:
    """How deep lists and objects lie in each other, counted up to one more than is allowed."""
    level, depth = [value], 0
    while level and depth <= MAX_DEPTH + 1:
        level, depth = [item for held in level for item in _inside(held)], depth + 1
    return depth - 1


def _size(value: Any) -> int:
    """How many values there are, a repeated one as often as it is repeated; counted until there are too many."""
    left, count = [value], 0
    while left and count <= MAX_VALUES:
        left += _inside(left.pop())
        count += 1
    return count
