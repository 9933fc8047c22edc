"""What was typed behind `%nbtrain`: a word, names, and name=value.

Options would do for some of it, but IPython's Tab completes no word that begins with a dash.
"""

from __future__ import annotations

import ast
import shlex
from dataclasses import dataclass, field
from typing import Any

from IPython.core.error import UsageError

WORDS = (
    *("start", "resume", "pause", "save", "stop", "set"),
    *("rehearse", "audit", "find_lr", "panel", "plot", "history", "list", "status", "help"),
)
NAMED = ("start", "resume", "plot", "audit", "help")
VALUED = ("start", "resume", "set", "list", "find_lr")


@dataclass
class Said:
    """One line, read."""

    line: str
    word: str = "status"
    names: list[str] = field(default_factory=list)
    values: dict[str, Any] = field(default_factory=dict)
    in_background: bool = False

    def name(self) -> str:
        """Return the one name that may stand there, or ""."""
        if len(self.names) > 1:
            raise UsageError(f"{' '.join(self.names)} is more than one name. See %nbtrain help.")
        return "".join(self.names)


def read(parser: Any, line: str) -> Said:
    """Read a line with the parser of `magic_arguments`.

    Raises:
        UsageError: it makes no sense to the word it begins with.
    """
    try:
        args = parser.parse_intermixed_args(shlex.split(line, posix=False))
    except ValueError as error:
        raise UsageError(f"{line!r} cannot be read: {error}.") from error
    tokens: list[str] = []
    for token in args.words:
        if tokens and _is_open(tokens[-1].partition("=")[2]):
            tokens[-1] += f" {token}"
        else:
            tokens.append(token)
    said = Said(line.strip(), tokens[0] if tokens else "status")
    for token in tokens[1:]:
        name, equals, text = token.partition("=")
        if equals and name == "name":
            said.names.append(str(_value(text)))
        elif equals and name.isidentifier():
            said.values[name] = _value(text)
        elif token == "background":
            said.in_background = True
        elif token == "trust-code":
            args.trust_code = True
        else:
            said.names.append(str(_value(token)) if token[:1] in "'\"" else token)
    if args.store is not None:
        said.values["store"] = _value(args.store)
    if args.trust_code:
        said.values["trust_code"] = True
    _refuse_what_it_does_not_take(said)
    return said


def _refuse_what_it_does_not_take(said: Said) -> None:
    surplus = [
        *(said.names if said.word not in NAMED else ()),
        *(said.values if said.word not in VALUED else ()),
    ]
    if said.word in WORDS and surplus:
        hint = " Write name=value, without spaces." if said.word == "set" else ""
        raise UsageError(f"{said.word} takes no {surplus[0]!r}.{hint or ' See %nbtrain help.'}")


def _is_open(text: str) -> bool:
    """Tell whether a value goes on behind the next space."""
    is_quoted = text[:1] in ("'", '"')
    return (is_quoted and (len(text) < 2 or text[-1] != text[0])) or any(
        text.count(left) > text.count(right) for left, right in ("()", "[]")
    )


def _value(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):  # such as 8h or cosine
        return text
