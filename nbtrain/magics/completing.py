"""What may stand behind `%nbtrain`, for IPython's Tab."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from nbtrain.journal import SETTINGS
from nbtrain.magics import listing
from nbtrain.magics.said import WORDS
from nbtrain.schedule import DECAYS, WARMUPS


def complete(shell: Any, event: Any) -> list[str]:
    """Return what may stand at the cursor behind `%nbtrain`, for IPython's Tab."""
    before = event.text_until_cursor.split()[1:]
    typed = "" if event.text_until_cursor[-1:].isspace() or not before else before.pop()
    known: Sequence[str] = ()
    match before[:1]:
        case []:
            known = WORDS
        case ["start"]:
            known = ["background"]
        case ["resume"]:
            known = [*listing.names_nearby(), "trust-code", "background", "--trust-code", "--store"]
        case ["set"]:
            known = [f"{name}=" for name in (*SETTINGS, "budget")]
            known += [f"warmup={name}" for name in WARMUPS] + [f"decay={name}" for name in DECAYS]
        case ["find_lr"]:
            known = ["low=", "high=", "steps="]
        case ["list"]:
            known = ["store=", "--store"]
    # IPython's own word begins behind the last dash or equals sign.
    gone = len(typed) - len(event.symbol)
    return [name[gone:] for name in known if name.startswith(typed)]
