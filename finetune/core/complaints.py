"""What pydantic complains of, in plain words: what to give instead of a wrong value."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Mapping
from typing import Any

from pydantic_core import ErrorDetails

OURS = "Value error, "  # pydantic puts it before the messages of our own validators
WHOLE = "give a whole number"
Context = Mapping[str, Any]
BOUNDS: dict[str, Callable[[Context], str]] = {
    "greater_than": lambda limits: f"give more than {_shown(limits['gt'])}",
    "greater_than_equal": lambda limits: f"give at least {_shown(limits['ge'])}",
    "less_than": lambda limits: f"give less than {_shown(limits['lt'])}",
    "less_than_equal": lambda limits: f"give at most {_shown(limits['le'])}",
    "too_short": lambda limits: f"give at least {limits['min_length']} of them",
    "too_long": lambda limits: f"give at most {limits['max_length']} of them",
    "string_too_short": lambda limits: "it is empty: give a text, or leave it out",
    "string_too_long": lambda limits: f"it is too long: give at most {limits['max_length']} characters",
}
KINDS = {  # the beginning of pydantic's name of an error, and what to give
    "int_": WHOLE,
    "bool_": "write true or false",
    "float_": "give a number, such as 0.01",
    "finite_number": "give a number that is neither infinite nor NaN",
    "string_type": "give a text",
    "string_unicode": "it has a character that no text can have: type it again",
    "string_": "give a text of another form",
    "path_": "give a path",
    "tuple_": "write a list of numbers, such as [0.9, 0.999]",
    "dict_type": "write names and values",
}


def what_to_do(fault: ErrorDetails) -> str:
    """The end of a sentence about one wrong value: what to give instead, in lower case and without a full stop.

    A message of one of our own validators comes as it is.
    """
    kind, context, value = fault["type"], fault.get("ctx", {}), fault["input"]
    if kind in BOUNDS:
        return BOUNDS[kind](context)
    if kind.startswith("int_"):
        return f"{WHOLE}{_written_out(value)}"
    if kind.startswith(("list_", "set_")):
        return f"write a list, such as {_listed(value)}"
    if kind == "literal_error":
        return _one_of(context["expected"], value)
    named = next((words for start, words in KINDS.items() if kind.startswith(start)), None)
    message = named or fault["msg"].removeprefix(OURS)
    return message[:1].lower() + message[1:]


def _listed(value: Any) -> str:
    if not isinstance(value, str) or not value:
        return "[a, b]"
    return f"[{value}]" if re.fullmatch(r"\w[\w ]*", value) else f"[{value[:80]!r}]"


def _shown(limit: float) -> str:
    return f"{limit:,}" if isinstance(limit, int) else f"{limit:.4g}"


def _written_out(value: Any) -> str:
    """1000 for the text "1e3", which YAML does not read as a number."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        return ""
    return f": {number:.0f}" if number.is_integer() and abs(number) < 1e15 and isinstance(value, str) else ""


def _one_of(expected: str, value: Any) -> str:
    """`expected` is pydantic's list of quoted names."""
    known = [name.strip(" '") for name in expected.replace(" or ", ", ").split(",")]
    nearest = difflib.get_close_matches(value, known, n=1, cutoff=0.6) if isinstance(value, str) else []
    return f"did you mean {nearest[0]!r}? known are {expected}" if nearest else f"use {expected}"
