"""What a session says of itself, as HTML: the page's own colours and font, and every text escaped.

    ● running  cifar   stage 2, resumed at step 120 (exact)
    epoch 3.20 of 20 · step 1,240 · loss 0.4123 · learning rate 0.05 · 1,204 samples/s

    epoch   [#####...............]  1,000 of 5,000 samples, 3m20s left
    run     [###.................]  3.20 of 20 epochs, 2h10m left
    budget  [######..........|///]  6h12m left, stops at 21:40 UTC, reserve 1m30s

State is never told by a colour alone. All functions take `session.status()` and return text.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any, Protocol

from nbtrain.bar import number
from nbtrain.budget import size, words
from nbtrain.history import History
from nbtrain.journal import Journal

Facts = Mapping[str, Any]  # session.status()

SIGNS = {"ready": "○", "running": "●", "paused": "‖", "stopped": "■", "done": "✓", "failed": "!"}
ASKED = {
    "pause": "pausing after this window",
    "stop": "stopping after this window",
    "save": "saving after this window",
    "set": "changing settings after this window",
}
REASONS = {
    "budget": "the budget ends",
    "interrupt": "interrupted",
    "terminate": "the machine asked for its end",
    "error": "an error",
}
DEGREES = {
    "local": "local: lost with this machine",
    "copied": "copied: handed to the mount, its upload cannot be seen",
    "durable": "durable",
    "unknown": "unknown: whether it lasts is not known",
}
WEEKDAYS_S = 6 * 86400  # beyond them a weekday may be any
SILENCE_S = 20  # without a new bar for so long, the page itself says so: no kernel is needed for it

STYLE = f"""<style>
.nbt-panel {{ box-sizing: border-box; max-width: 780px; padding: 2px 8px 8px 2px; }}
.nbt-panel .widget-html, .nbt-panel .widget-html-content {{ height: auto; overflow: visible; }}
.nbt-panel.jupyter-widgets-disconnected::before {{ content: "The kernel of this panel has ended. \
This is how it stood."; color: inherit; font: 600 13px/1.8 var(--jp-ui-font-family, sans-serif); }}
.nbt-panel.jupyter-widgets-disconnected > * {{ opacity: .6; pointer-events: none; }}
.nbt-panel .jupyter-widgets-disconnected::before {{ display: none; }}
[data-jp-theme-light="false"] .nbt-panel .widget-image {{ filter: invert(.93) hue-rotate(180deg); }}
.nbt {{ font-family: var(--jp-ui-font-family, sans-serif); font-size: 13px; line-height: 1.5;
  color: var(--jp-ui-font-color1, inherit); font-variant-numeric: tabular-nums;
  overflow-wrap: anywhere; }}
.nbt-dim {{ opacity: .72; }}
.nbt-small {{ font-size: 12px; }}
.nbt-state {{ font-weight: 600; padding: 0 7px; border: 1px solid; border-radius: 9px;
  margin-right: 6px; white-space: nowrap; }}
.nbt-numbers > span {{ white-space: nowrap; margin-right: 14px; }}
.nbt-bars {{ display: grid; grid-template-columns: max-content minmax(80px, 1fr) minmax(0, max-content);
  column-gap: 10px; row-gap: 3px; align-items: center; }}
.nbt-bar {{ position: relative; height: 12px; box-sizing: border-box; border-radius: 3px;
  border: 1px solid var(--jp-border-color1, rgba(128, 128, 128, .6)); overflow: hidden; }}
.nbt-bar > i {{ position: absolute; top: 0; bottom: 0; left: 0;
  background: var(--jp-brand-color1, #1976d2); }}
.nbt-bar > i.nbt-reserve {{ left: auto; right: 0; min-width: 3px; opacity: .55; background:
  repeating-linear-gradient(135deg, currentColor 0 2px, transparent 2px 6px); }}
.nbt-bar > i.nbt-stop {{ width: 2px; margin-left: -2px; background: currentColor; }}
.nbt-silent {{ visibility: hidden; max-height: 0; grid-column: 1 / -1;
  animation: nbt-silent 0s linear {SILENCE_S}s forwards; }}
@keyframes nbt-silent {{ to {{ visibility: visible; max-height: 4em; }} }}
.nbt-alert {{ border-left: 4px solid var(--jp-error-color1, #d32f2f); padding: 3px 10px; margin: 2px 0;
  white-space: pre-wrap; }}
.nbt-panel pre.nbt-log {{ font-family: var(--jp-code-font-family, monospace); font-size: 12px;
  line-height: 1.4; margin: 0; padding: 5px 8px; white-space: pre-wrap; overflow-wrap: anywhere;
  word-break: normal; color: inherit; background: transparent;
  border: 1px solid var(--jp-border-color2, rgba(128, 128, 128, .35)); border-radius: 3px; }}
.jp-OutputArea-child:has(.nbt-panel) ~ .jp-OutputArea-child:has(.nbt-twin),
.jp-OutputArea-child:has(.nbt-panel) ~ .jp-OutputArea-child:has(img):has(+ * .nbt-twin),
.output_area:has(.nbt-panel) ~ .output_area:has(.nbt-twin),
.output_area:has(.nbt-panel) ~ .output_area:has(img):has(+ * .nbt-twin) {{ display: none; }}
</style>"""


class Trained(Protocol):
    """A session or a population, as far as a face knows it."""

    @property
    def name(self) -> str: ...
    @property
    def state(self) -> str: ...
    @property
    def lines(self) -> list[str]: ...
    def status(self) -> dict[str, Any]: ...
    def start(self) -> Any: ...
    def pause(self) -> None: ...
    def stop(self) -> None: ...


class Run(Trained, Protocol):
    """A session."""

    @property
    def history(self) -> History: ...
    @property
    def journal(self) -> Journal: ...
    def save(self) -> None: ...
    def set(self, **changes: Any) -> None: ...


def status(facts: Facts) -> str:
    """Say how a session is, in two lines that a screen reader is told of."""
    return headed(facts, _numbers(facts))


def headed(facts: Facts, numbers: str) -> str:
    """Say state, name and stage, and below them some numbers."""
    state = facts["state"]
    asked = ASKED.get(facts["asked"], "")
    head = [
        f"<b>{escape(facts['name'])}</b>",
        f'<span class="nbt-dim">stage {facts["stage"]}, {escape(facts["resumed"])}</span>',
    ]
    if asked:
        head.insert(0, f"<b>{asked}</b> ·")
    return (
        '<div class="nbt" role="status" aria-live="polite"><div>'
        f'<span class="nbt-state"><span aria-hidden="true">{SIGNS.get(state, "")}</span> '
        f"{escape(state_words(facts))}</span> {' '.join(head)}</div>"
        f'<div class="nbt-numbers">{numbers}</div></div>'
    )


def state_words(facts: Facts) -> str:
    """Say the state, and why where it does not say so itself: "stopped: the budget ends"."""
    reason = REASONS.get(facts["reason"], "") if facts["state"] != "running" else ""
    return f"{facts['state']}: {reason}" if reason else str(facts["state"])


def epochs_words(facts: Facts) -> str:
    """Say how far the run is: "3.20 of 20", or "3.20" where it has no end."""
    of = f" of {facts['epochs']}" if facts["epochs"] else ""
    return f"{facts['progress']:.2f}{of}"


def _numbers(facts: Facts) -> str:
    speed = facts["samples_per_s"]
    shown = [
        f"epoch <b>{epochs_words(facts)}</b>",
        f"step <b>{facts['step']:,}</b>",
        f"loss <b>{number(facts['loss'])}</b>",
        f"learning rate <b>{facts['lr']:.3g}</b>",
    ]
    if facts["state"] == "running" and speed:
        shown.append(f"<b>{speed:{',.0f' if speed >= 10 else '.2g'}}</b> samples/s")
    return " ".join(f"<span>{text}</span>" for text in shown)


def bars(facts: Facts, now_s: float) -> str:
    """Draw the bars of epoch, run and budget.

    Args:
        facts: Of the session.
        now_s: `time.time()`; the planned stop is told in the machine's time, by its zone.
    """
    total = facts["num_samples"]
    seen = total if facts["state"] == "done" else facts["position"]
    speed = facts["samples_per_s"] if facts["state"] == "running" else 0.0
    left = f", {words((total - seen) / speed)} left" if speed else ""
    rows = [
        bar("epoch", seen / max(total, 1), f"{seen:,} of {total:,} samples{left}"),
        bar(
            "run",
            facts["progress"] / facts["epochs"] if facts["epochs"] else 0.0,
            _ending(facts),
        ),
    ]
    return grid(facts, rows, now_s)


def grid(facts: Facts, bars: Sequence[str], now_s: float) -> str:
    """Put bars under each other, that of the budget the last."""
    rows = [*bars, _budget(facts, now_s)]
    if facts["state"] == "running":
        rows.append(
            f'<div class="nbt-silent">No news for {SILENCE_S} s: the kernel is busy or gone, '
            "or shows nothing while no cell runs.</div>"
        )
    beat = int(now_s // (SILENCE_S / 4))  # or bars that stand still would pass for silence
    return f'<div class="nbt nbt-small nbt-bars" data-beat="{beat}">{"".join(rows)}</div>'


def bar(label: str, share: float, text: str, marks: str = "") -> str:
    """Draw one bar, with its name and what it says."""
    percent = 100 * min(max(share, 0.0), 1.0)
    return (
        f'<span>{label}</span><div class="nbt-bar" role="progressbar" aria-label="{label}" '
        f'aria-valuemin="0" aria-valuemax="100" aria-valuenow="{percent:.0f}" '
        f'aria-valuetext="{escape(text)}"><i style="width: {percent:.2f}%"></i>{marks}</div>'
        f"<span>{escape(text)}</span>"
    )


def _ending(facts: Facts) -> str:
    """Say when the run ends, or that the budget ends before it."""
    if not facts["epochs"]:
        return "no end but the budget's"
    pace = facts["samples_per_s"] / max(facts["num_samples"], 1)  # epochs a second
    epochs = "1 epoch" if facts["epochs"] == 1 else f"{facts['epochs']} epochs"
    if facts["state"] != "running" or not pace:
        return epochs
    run_s = (facts["epochs"] - facts["progress"]) / pace
    train_s = facts["budget_left_s"] - facts["reserve_s"]
    if run_s <= train_s:
        return f"{epochs}, {words(run_s)} left"
    end = facts["progress"] + max(train_s, 0.0) * pace
    return f"{epochs}, {words(run_s)} left; the budget ends near {end:.2f}"


def _budget(facts: Facts, now_s: float) -> str:
    limit_s, left_s, reserve_s = (facts[k] for k in ("budget_limit_s", "budget_left_s", "reserve_s"))
    if limit_s is None or math.isinf(left_s):
        return bar("budget", 0.0, "no limit: nothing stops it in time")
    reserve = 100 * min(reserve_s / limit_s, 1.0)
    marks = (
        f'<i class="nbt-reserve" style="width: {reserve:.2f}%"></i>'
        f'<i class="nbt-stop" style="left: {100 - reserve:.2f}%"></i>'
    )
    stop_s = left_s - reserve_s
    when = f"stops at {moment(now_s + stop_s, now_s)}" if stop_s > 0 else "only the reserve is left"
    if facts["state"] == "running":
        when = f"{words(left_s)} left, {when}"
    text = f"{when}, reserve {words(reserve_s)}"
    return bar("budget", 1 - left_s / limit_s, text, marks)


def moment(at_s: float, now_s: float) -> str:
    """Write a time of day with its zone, and the weekday where it is not today, or the date."""
    at, now = time.localtime(at_s), time.localtime(now_s)
    is_today = (at.tm_year, at.tm_yday) == (now.tm_year, now.tm_yday)
    day = "" if is_today else "%a " if abs(at_s - now_s) < WEEKDAYS_S else "%Y-%m-%d "
    return time.strftime(f"{day}%H:%M %Z", at).strip()


def saved(facts: Facts, now_s: float, *, steps: bool = True) -> str:
    """Say where the last checkpoint is in each place: how safe, how old, how large.

    Args:
        facts: Of the session or population.
        now_s: `time.time()`.
        steps: Whether its step is told: a population's is one member's.
    """
    # What rests is not drawn again, and an age would soon be wrong.
    ages = facts["state"] == "running"
    places = [saved_words(place, now_s, steps=steps, ages=ages) for place in facts["saved"]]
    pending = facts["pending_bytes"]
    if pending:
        places.append(f"{size(pending)} are not yet in {facts['store']}")
    text = "<br>".join(escape(place) for place in places) or "nothing saved yet in this kernel"
    return f'<div class="nbt nbt-small"><span class="nbt-dim">Checkpoint:</span> {text}</div>'


def saved_words(place: Facts, now_s: float, *, steps: bool = True, ages: bool = True) -> str:
    """Say in one line what one place holds, and how old that is, or else since when."""
    when = f"{words(now_s - place['at'])} ago" if ages else moment(place["at"], now_s)
    step = f"step {place['step']:,}, " if steps else ""
    what = f"{step}{size(place['num_bytes'])}, {when}, in {place['place']}"
    return f"{what} ({DEGREES.get(place['degree'], place['degree'])})"


def alert(text: str) -> str:
    """Say what went wrong; nothing for nothing."""
    return f'<div class="nbt nbt-alert" role="alert">{escape(text)}</div>' if text else ""


def small(text: str) -> str:
    """Say something small."""
    return f'<div class="nbt nbt-small nbt-dim">{escape(text)}</div>'


def log(lines: list[str]) -> str:
    """Show lines as they are."""
    text = escape("\n".join(lines)) or "nothing said yet"
    return f'<div class="nbt"><pre class="nbt-log" role="log" aria-label="log">{text}</pre></div>'
