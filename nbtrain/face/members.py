"""What a population says of itself, as HTML and as plain text: its bars, and a line for each member.

    ● running  mnist-pbt   stage 1, new
    round 3 · member 4 trains, loss 0.41 · best accuracy 0.953 (member 2)

    round   [#####...............]  3 of 10 members
    run     [###.................]  23 of 250 slices
    budget  [######..........|///]  6h12m left, stops at 21:40 UTC, reserve 1m30s

    member   accuracy  lr      momentum  from   now
    2 best   0.953     0.0312  0.41             waiting
    4        0.871     0.0250  0.49      <- 2   training

All functions take `population.status()`.
"""

from __future__ import annotations

import math
from html import escape

from nbtrain.bar import number
from nbtrain.face import markup
from nbtrain.face.markup import Facts

NUM_ROWS = 50  # of members; more of them would push all else out of the page

STYLE = """<style>
.nbt-members { overflow-x: auto; }
.nbt-members table { border-collapse: collapse; border: none; color: inherit; margin: 4px 0; }
.nbt-members th, .nbt-members td { text-align: right; padding: 0 12px 0 0; border: none;
  white-space: nowrap; background: transparent; color: inherit; }
.nbt-members th { font-weight: normal; opacity: .72; }
.nbt-members th.nbt-words, .nbt-members td.nbt-words { text-align: left; }
.nbt-members tr.nbt-best { font-weight: 600; }
</style>"""


def status(facts: Facts) -> str:
    """Say how a population is, in two lines that a screen reader is told of."""
    shown = [f"round <b>{facts['round'] + (facts['state'] != 'done')}</b>"]
    busy = [m for m in facts["members"] if m["state"] == "training"]
    for member in busy:
        loss = "" if math.isnan(member["loss"]) else f", loss <b>{number(member['loss'])}</b>"
        shown.append(f"member <b>{member['id']}</b> trains{loss}")
    shown.append(f"best {best(facts)}")
    return markup.headed(facts, " ".join(f"<span>{text}</span>" for text in shown))


def best(facts: Facts) -> str:
    """Say the best score and whose it is, as HTML."""
    metric = escape(facts["metric"])
    if facts["best_score"] is None:
        return f"{metric} <b>-</b>"
    return f"{metric} <b>{number(facts['best_score'])}</b> (member {facts['best_member']})"


def bars(facts: Facts, now_s: float) -> str:
    """Draw the bars of round, run and budget.

    Args:
        facts: Of the population.
        now_s: `time.time()`.
    """
    left, slices, in_all = (facts[n] for n in ("left_in_round", "num_slices", "num_slices_in_all"))
    over = facts["over_in_round"]
    rows = [markup.bar("round", over / max(over + left, 1), f"{over} of {over + left} members")]
    if facts["state"] == "done":
        rows = [markup.bar("round", 1.0, "over")]
    run = f"{slices:,} of {in_all:,} slices" if in_all else f"{slices:,} slices"
    rows.append(markup.bar("run", slices / in_all if in_all else 0.0, run))
    return markup.grid(facts, rows, now_s)


def lines(facts: Facts) -> tuple[list[str], list[list[str]]]:
    """Return the names of the columns, and a line for each member."""
    members = facts["members"][:NUM_ROWS]
    names = [*dict.fromkeys(name for member in members for name in member["hyperparameters"])]
    told = []
    for member in members:
        wins = member["id"] == facts["best_member"]
        score = "-" if member["score"] is None else number(member["score"])
        values = [value(member["hyperparameters"].get(name, "")) for name in names]
        donor = "" if member["donor"] is None else f"<- {member['donor']}"
        now = member["state"] + (f": {member['error']}" if member["error"] else "")
        told.append([f"{member['id']}{' best' if wins else ''}", score, *values, donor, now])
    return ["member", facts["metric"], *names, "from", "now"], told


def value(given: object) -> str:
    """Write a hyperparameter in few letters."""
    return f"{given:.3g}" if isinstance(given, float) else str(given)


def table(facts: Facts, style: str = STYLE) -> str:
    """Draw a line for each member: score, hyperparameters, from whom, what it does."""
    columns, told = lines(facts)
    words = {0, len(columns) - 2, len(columns) - 1}
    head = "".join(_cell("th", n in words, text) for n, text in enumerate(columns))
    body = "".join(
        f"<tr{_best(row)}>"
        + "".join(_cell("td", n in words, text) for n, text in enumerate(row))
        + "</tr>"
        for row in told
    )
    rest = len(facts["members"]) - len(told)
    more = f"<div>and {rest} more</div>" if rest > 0 else ""
    return (
        f'{style}<div class="nbt nbt-small nbt-members"><table aria-label="members">'
        f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>{more}</div>"
    )


def text(facts: Facts) -> str:
    """Return the members' lines as plain text."""
    columns, told = lines(facts)
    rows = [columns, *told]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    )


def _best(row: list[str]) -> str:
    return ' class="nbt-best"' if row[0].endswith("best") else ""


def _cell(kind: str, is_words: bool, said: str) -> str:
    look = ' class="nbt-words"' if is_words else ""
    return f"<{kind}{look}>{escape(said)}</{kind}>"
