"""Reads JSON and YAML from untrusted files within limits. What exceeds a limit is refused with a clear message.

The limits: UTF-8 (with or without a byte order mark), at most `MAX_BYTES`, at most `MAX_DEPTH` levels, whole numbers
of at most `MAX_DIGITS` digits, no repeated key, no NaN and no infinity (JSON has neither).
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Hashable, Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import yaml

from finetune.core.errors import BadInput

MAX_BYTES = 64_000_000  # the largest known tokenizer.json has 20 MB
MAX_DEPTH = 64
MAX_DIGITS = 40  # tokenizer_config.json holds 10**30 for "no limit"
MAX_VALUES = 100_000  # in a YAML file; a value that aliases repeat counts each time

T = TypeVar("T", dict[str, Any], list[Any])


class BadText(BadInput):
    """Text or a file that can't be read. `reason` is the message without the file and the advice."""

    def __init__(self, where: str, reason: str, advice: str) -> None:
        super().__init__(f"{where} {reason}: {advice}")
        self.reason = reason


def read_bytes(file: Path, limit: int = MAX_BYTES) -> bytes:
    """Returns the content of a regular file.

    Raises:
        BadInput: it is not a regular file, or it is larger than `limit` bytes.
        OSError: it can't be read.
    """
    if file.exists() and not file.is_file():  # reading a pipe or a device might never end
        raise BadText(str(file), "is not a regular file", "put the file itself there")
    with file.open("rb") as opened:
        size = min(os.fstat(opened.fileno()).st_size, limit)
        content = opened.read(size + 1)  # read(limit) would take that much memory first
    if len(content) > limit:
        raise BadText(
            str(file), f"is larger than {limit / 1e6:g} MB, too large for this kind of file", "give the right file"
        )
    return content


def read_utf8(file: Path, limit: int = MAX_BYTES) -> str:
    """Returns the content of a UTF-8 text file, without its byte order mark.

    Raises:
        BadInput: it is not a regular file, is larger than `limit` bytes, or is not UTF-8.
        OSError: it can't be read.
    """
    try:
        return read_bytes(file, limit).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise BadText(str(file), f"is not UTF-8 text (byte {error.start} is wrong)", "save it as UTF-8") from error


def list_items(text: str) -> list[str]:
    """The items of a text file that lists one on each line. Empty lines and those that begin with # are skipped."""
    stripped = (line.strip() for line in text.splitlines())
    return [line for line in stripped if line and not line.startswith("#")]


def read_json(file: Path, kind: type[T], advice: str = "give the right file", limit: int = MAX_BYTES) -> T:
    """Returns the content of a JSON file, which must be an object (`kind` is `dict`) or a list (`list`).

    Raises:
        BadInput: it is damaged, exceeds a limit (`limit`: of bytes), or holds something else. The message ends with
            `advice`.
        OSError: it can't be read.
    """
    return parse_json(read_utf8(file, limit), str(file), kind, advice)


def parse_json(text: str, where: str, kind: type[T], advice: str = "give the right file", finite: bool = True) -> T:
    """Like `read_json`, for a text. `where` names its source in messages.

    With `finite=False`, NaN and infinity are accepted, because Python's json module writes them.

    Raises:
        BadInput: as `read_json`.
    """
    numbers: dict[str, Any] = {"parse_float": _number, "parse_constant": _refused} if finite else {}
    try:
        value = json.loads(text, object_pairs_hook=_object, parse_int=_whole_number, **numbers)
    except RecursionError as error:
        raise BadText(where, "is nested too deeply to be read", advice) from error
    except ValueError as error:
        raise BadText(where, f"is not valid JSON ({error})", advice) from error
    if not isinstance(value, kind):
        names = {"dict": "an object", "list": "a list", "str": "a text", "NoneType": "null"}
        found, wanted = (names.get(name, "a number") for name in (type(value).__name__, kind.__name__))
        raise BadText(where, f"holds {found} instead of {wanted}", advice)
    if _depth(value) > MAX_DEPTH:
        raise BadText(where, f"is nested more than {MAX_DEPTH} deep", advice)
    return value


def json_lines(file: Path, limit: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """Gives each line of a file of at most `limit` bytes that holds a JSON object, and the object.

    NaN and infinity are accepted. Other lines are skipped, such as one that was cut off when the process was killed.

    Raises:
        BadInput: the file is too large, or not a regular file.
    """
    for line in read_bytes(file, limit).decode("utf-8", "replace").splitlines():
        try:
            held = parse_json(line, str(file), dict, finite=False)
        except BadInput:
            continue
        yield line, held


def numbers_in(held: Mapping[str, Any]) -> dict[str, float]:
    """The values of an object that are numbers, without true and false."""
    return {key: float(value) for key, value in held.items() if type(value) in (int, float)}


def parse_yaml(text: str, where: str, loader: type[yaml.SafeLoader] = yaml.SafeLoader) -> Any:
    """Returns the plain data that a YAML text holds. `loader` is a SafeLoader; `where` names the source in messages.

    Raises:
        BadInput: it is not YAML, is nested too deeply, or has too many values (its aliases count each time).
    """
    try:
        value = yaml.load(text, loader)
        fault = "holds more values than a recipe can have" if _size(value) > MAX_VALUES else ""
    except RecursionError:
        fault = "is nested too deeply to be read"
    except (yaml.YAMLError, ValueError) as error:  # a ValueError: a number of thousands of digits, a 13th month
        raise BadInput(
            f"{where} is not valid YAML ({' '.join(str(error).split())[:300]}): correct that line"
        ) from error
    if fault or _depth(value) > MAX_DEPTH:
        raise BadInput(
            f"{where} {fault or f'is nested more than {MAX_DEPTH} deep'}: write it without nesting or aliases"
        )
    return value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        seen: set[Hashable] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"the key {twice[:80]!r} appears twice")
    return found


def _whole_number(digits: str) -> int:
    if len(digits) > MAX_DIGITS:
        raise ValueError(f"a whole number of {len(digits)} digits")
    return int(digits)


def _number(digits: str) -> float:
    value = float(digits)
    return value if math.isfinite(value) else _refused(digits[:80])


def _refused(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON number")


def _inside(value: Any) -> list[Any]:
    if isinstance(value, dict):
        return [*value, *value.values()]
    return list(value) if isinstance(value, list | tuple | set) else []


def _depth(value: Any) -> int:
    """How deeply lists and objects are nested, counted up to one more than is allowed."""
    level, depth = [value], 0
    while level and depth <= MAX_DEPTH + 1:
        level, depth = [item for held in level for item in _inside(held)], depth + 1
    return depth - 1


def _size(value: Any) -> int:
    """The number of values, counted up to one more than is allowed. A repeated value counts each time."""
    left, count = [value], 0
    while left and count <= MAX_VALUES:
        left += _inside(left.pop())
        count += 1
    return count
