"""Waiting for a run on the main thread, with an ear for clicks, signals and what there is to say.

The cell that runs `session.run()` waits here while another thread trains. Messages of widgets are
handled all the while, which no kernel does by itself for a busy cell; and an interrupt is a word that
the training hears at its next boundary.

Where a panel is watched, a pause only holds: the cell goes on waiting for Resume; the second interrupt,
or Stop, or the end of the budget, ends it. Elsewhere nobody could resume, and a pause ends it.
"""

from __future__ import annotations

from collections.abc import Callable

from nbtrain.driving import Driven
from nbtrain.interrupts import Interrupts
from nbtrain.poll import Poller

TICK_S = 0.25  # a message and the end of the training are heard at once, all else so often
ONE_PRESS_S = 0.1  # an impatient finger is slower; a second press only stops, and loses nothing


def wait(loop: Driven, *, watched: bool, show: Callable[[], None] | None = None) -> None:
    """Return when the training has ended; everything is saved then.

    Args:
        loop: Trains in its own thread.
        watched: Whether a panel is shown to somebody.
        show: Shows it; called where an interrupt is heard already.

    Raises:
        KeyboardInterrupt: it was interrupted. One press too many leaves the training to itself.
        BaseException: what the training raised.
    """
    pressed = Interrupts(at_once=3, one_press_s=ONE_PRESS_S) if watched else Interrupts()
    loop.heard = lambda: pressed.asked
    with pressed as interrupts, Poller() as poll:
        if watched and poll.problem:
            loop.lines.say(poll.problem)
        try:
            if show is not None:
                show()
            _watch(loop, interrupts, poll, watched=watched)
        except Exception:  # such as a warning that is an error here
            loop.halt("error")
            _join(loop)
            raise
        # In here, so that an interrupt does not say that all is saved when that has failed.
        if loop.worker is not None and loop.worker.error is not None:
            error, loop.worker.error = loop.worker.error, None
            raise error


def _watch(loop: Driven, interrupts: Interrupts, poll: Poller, *, watched: bool) -> None:
    bar = loop.bar(shown=not watched)
    worker, heard = loop.worker, 0
    # The pause is looked at first: one that ends between the two looks is seen training.
    while (watched and loop.state == "paused") or _trains(loop):
        if loop.worker is not worker:  # resumed: what was asked of the one before is done
            interrupts.forget(heard)
            worker, heard = loop.worker, 0
        poll()
        if watched or not loop.reason:  # the last words come below the last of the bar
            loop.lines.flush(prints=not watched)
        if bar.is_due():
            loop.draw(bar)
        if _trains(loop):
            if interrupts.num_presses > heard:
                heard = interrupts.num_presses
                is_pause = watched and interrupts.asked == "interrupt" and heard == 1
                loop.halt("pause" if is_pause else str(interrupts.asked))
            poll.wait(TICK_S, loop.worker.ended)  # type: ignore[union-attr]
        elif interrupts.num_presses > min(heard, 1):  # one press has made the pause
            loop.halt(str(interrupts.asked))
        elif not loop.has_time:
            loop.halt("budget")
        else:
            poll.wait(TICK_S)
    poll()
    loop.draw(bar)
    bar.close()
    loop.lines.flush(prints=not watched)


def _trains(loop: Driven) -> bool:
    return loop.worker is not None and loop.worker.is_alive()


def _join(loop: Driven) -> None:
    if loop.worker is not None:
        loop.worker.join()
