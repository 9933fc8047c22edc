"""The loop of a run: windows, boundaries, the ends of epochs, and saving on the way.

Windows follow each other; between two of them is a boundary, and only there are orders obeyed, the
clock and the losses looked at, and snapshots taken. At the end of an epoch comes the validation, and
the place stays at the epoch's end until it is done: a cut inside it is a cut before it.

Whatever ends the loop, an order, the clock, a signal, an error or a `break`, goes through one door:
what is under way is taken back to the window's start, saved, and waited for.
"""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Any

from torch import Tensor

from nbtrain import memory, randomness
from nbtrain.bar import Bar, Pace, number
from nbtrain.data import Epoch, Loader
from nbtrain.driving import Driven
from nbtrain.errors import SessionError
from nbtrain.keeping import Keeping
from nbtrain.live import Live
from nbtrain.opening import Opened
from nbtrain.validation import validate

SETTLE_S = 0.25  # how long losses stay on the device, unread
TICK_S = 0.05  # between two looks at whether a loop that is held goes on


class Loop(Driven):
    """Trains what is alive, from where it is, until something ends it.

    Args:
        name: The session's.
        opened: Data, clock, stores.
        live: What is trained.
        save_every_s: Longest time between two saves, besides those at the ends of epochs.
        shows_bar: Whether a progress line is drawn.
    """

    def __init__(
        self, name: str, opened: Opened, live: Live, save_every_s: float, shows_bar: bool
    ) -> None:
        super().__init__(name, opened, shows_bar)
        self.live = live
        self._opened = opened
        self._shows_bar = shows_bar
        self._bar = self.bar(shown=False)
        self._fed: int | None = None
        self._is_short = False
        self._running_loop: Callable[[], Generator[Epoch] | None] = lambda: None
        self._is_save_asked = self._is_cast = False
        self._settle_at = 0.0
        self._pace = Pace()
        self.keeping = Keeping(name, opened, live, self.lines, save_every_s)
        self.keeping.load()

    # ---- what the session says

    def epochs(self) -> Generator[Epoch]:
        """Give the rest of this epoch, then the next ones."""
        self.leave()
        loop = self._epochs()
        # Weak, so that a `break` in the user's loop still ends the generator at once.
        self._running_loop = weakref.ref(loop)
        return loop

    def update(self, loss: Tensor, n: float | None, named: Mapping[str, Any]) -> None:
        """Add a micro-step to the window, and step when that fills it."""
        window = self.live.window
        if window is None or self._fed is None or self.runs_elsewhere:
            raise SessionError("update() goes with a batch: call it once inside the session's loop.")
        if not self._is_cast and self.live.forward.precision != "fp32":
            raise self.live.forward.not_entered()
        num_samples = self._fed
        try:
            self.live.add(loss, num_samples if n is None else n, named)
        except Exception as error:
            if self.is_own:  # the loop itself only sees that it is closed
                self.reason = "error"
                if memory.is_shortage(error):
                    error.add_note(memory.way_out(self.live.journal.settings))
            raise
        self._fed = None

    def autocast(self) -> AbstractContextManager[Any]:
        """Return the context of one forward pass."""
        self._is_cast = True
        return self.live.forward.autocast()

    def gives_way(self, error: Exception) -> bool:
        """Whether the window is done again in smaller micro-batches: memory was short.

        Raises:
            torch.OutOfMemoryError: it was, and nothing smaller helps.
        """
        reason, self.reason = self.reason, "error"  # the loop itself only sees that it is closed
        if not memory.is_shortage(error):
            return False
        self.lines.say(self.live.give_way(error, self._fed))
        self.reason, self._fed, self._is_short = reason, None, True
        return True

    def save(self) -> None:
        """Commit now; from another thread than the loop's, at the next boundary."""
        if self.runs_elsewhere:
            self._is_save_asked = True
            self.order("save", self._save_once)
        else:
            self.keeping.request(self.reason)
            self.keeping.finish()
            self.keeping.say_saved()

    def set(self, changes: dict[str, Any]) -> None:
        """Change settings at the next boundary; what the loop's own body sets, it will set again."""
        is_told = self._thread is None or self.runs_elsewhere or self._poll.is_handling
        self.order("set", lambda: self._edit(changes, is_told=is_told))

    def leave(self) -> None:
        """End a loop of this thread that an error in a cell has left behind."""
        loop = self._running_loop()
        if loop is not None and not self.runs_elsewhere:
            loop.close()

    @property
    def is_done(self) -> bool:
        """Whether all epochs are trained."""
        return self.live.is_done

    @property
    def samples_per_s(self) -> float:
        """How fast it trains; 0 where that is not known yet."""
        return self._pace.per_s

    # ---- what happens

    def _epochs(self) -> Generator[Epoch]:
        live = self.live
        if live.is_done:
            self.state, self.reason = "done", live.end
            self.keeping.catch_up()
            self._say_goodbye()
            return
        with self._running():
            while (not self.reason or self._is_resumed()) and not live.is_done:
                place = live.place
                randomness.seed(self._opened.seed, "epoch", live.epoch)
                yield Epoch(self._batches, live.epoch)
                live.go_back()
                if self.reason:
                    return
                if live.next_window() is None:
                    self._close_epoch()
                elif live.place == place:
                    raise SessionError(
                        f"Nothing of epoch {live.epoch} was trained in the loop's body. "
                        "Write: for batch in epoch: ... session.update(loss)."
                    )
            self.reason = self.reason or live.end

    def _batches(self) -> Iterator[Any]:
        # Above it only sees that it is closed; what went wrong has to be told it here.
        try:
            yield from self._windows()
        except Exception:
            self._note_error()
            raise

    def _windows(self) -> Iterator[Any]:
        opened, live = self._opened, self.live
        while self._boundary() and (window := live.next_window()) is not None:
            if live.judging.is_due(live.step, live.history.epochs) and not self._validate_within():
                continue
            began = self._budget.working()
            live.begin(window)
            settings = live.journal.settings
            size, epochs = settings["batch_size"], settings["epochs"]
            opened.train.start(live.epoch, live.position, size, epochs, live.room)
            while not window.is_full:
                self._fed, batch = next(opened.train)
                randomness.seed(opened.seed, "step", live.step, window.micro_step)
                self._is_cast = False
                try:
                    given = live.forward.moved(batch)
                except RuntimeError as error:  # no room for the batch itself; nobody was given it
                    if self.is_own or not self.gives_way(error):
                        raise
                else:
                    yield given
                    del given
                if self._is_short:
                    break
                if live.window is not window and not window.is_full:
                    raise SessionError("This loop was ended by a newer one of the same session.")
                if self._fed is not None:
                    raise SessionError(
                        "A batch was not given to session.update(loss). Call it once for each."
                    )
            if self._is_short:  # the same window again, in smaller micro-batches
                self._is_short = False
                memory.release()
                continue
            if live.stages[-1]["first_step_at"] is None:
                live.enter(None, time.time())
            for text in opened.train.told():
                self.lines.say(text)
            took_s = self._budget.working() - began
            live.train_s += took_s
            self._budget.observe("window", took_s)
        # What the user's body draws now is the same after a cut as without one.
        randomness.seed(opened.seed, "epoch's end", live.epoch)
        if self.reason:  # and what it does now may outlast the machine
            live.enter(self.reason, time.time())
            self.keeping.request(self.reason)
            self.keeping.saver.wait(copies=False)

    def _boundary(self) -> bool:
        """Look at losses, orders and clock, save if it is time; say whether to go on."""
        now = self._opened.clock()
        if now >= self._settle_at:
            self._settle_at = now + SETTLE_S
            self.live.settle()
            self._pace.add(now, self.live.num_seen)
            self._poll()
            if self._bar.is_due():
                self.draw(self._bar)
            self.keeping.heed()
        if not self._may_go_on("window") and not self._is_resumed():
            return False
        if not self.live.position and self.live.end == "done":  # somebody has just lowered epochs
            self.reason = "done"
            return False
        if self._opened.replay is not None:
            self._opened.replay.follow(self.live)
        if self.keeping.is_due(now):
            self.keeping.request("")
        return True

    def _say_goodbye(self, *, prints: bool = True) -> None:
        self.keeping.say_goodbye(self.reason, is_own=self.is_own, prints=prints)

    def _is_resumed(self) -> bool:
        """Hold the user's own loop at a pause, saved, where a panel can resume it; whether one did."""
        if self.reason != "pause" or not self._holds:
            return False
        self.live.enter("pause", time.time())
        self.keeping.request("pause")
        self.keeping.saver.wait(copies=False)
        self.keeping.say_goodbye("pause", is_own=False)
        self.state, self._orders.asked = "paused", ""
        while self.reason == "pause" and not self._interrupts.asked and self.has_time:
            self._poll()
            self._orders.obey()
            time.sleep(TICK_S)
        self.state, self._pace = "running", Pace()
        if self.reason == "pause":
            self.reason = self._interrupts.asked or ""
        if goes_on := self._may_go_on("window"):
            self.live.enter(None, time.time())
        return goes_on

    def _close_epoch(self) -> None:
        live, valid = self.live, self._opened.valid
        live.settle()
        epochs = live.journal.settings["epochs"]
        is_due = valid is not None and live.judging.is_due_at_end(live.step, live.epoch + 1, epochs)
        metrics = self._validate(valid) if valid is not None and is_due else {}
        if metrics is None:  # cut: the place stays at the epoch's end, where it is done again
            return
        if is_due:
            live.judging.check(live.logged | metrics)
        if is_due or valid is None:
            live.refuse_unwatched(metrics)
        num_entries = len(live.journal.entries)
        written = live.close_epoch(metrics)
        self._tell(f"epoch {live.epoch}", written, is_due, num_entries)
        self._opened.train.turn()
        self.keeping.request("", written)

    def _validate_within(self) -> bool:
        """Validate inside an epoch, between two windows; False where that was cut, or ends the run."""
        live, valid = self.live, self._opened.valid
        if valid is None:
            return True
        live.settle()
        metrics = self._validate(valid)
        if metrics is None:  # it is done again when the loop is here again
            return False
        num_entries = len(live.journal.entries)
        live.note(metrics)
        live.look_for_plateau()
        self._tell(f"epoch {live.progress:.2f}, step {live.step}", metrics, True, num_entries)
        self.keeping.request("", metrics)
        self.reason = self.reason or live.end
        return not self.reason

    def _tell(self, at: str, written: dict[str, float], is_validated: bool, num_entries: int) -> None:
        loss = number(written.get("train_loss", self.live.loss))  # of the epoch, or the last window
        others = [f"{name} {number(value)}" for name, value in written.items() if name != "train_loss"]
        whose = " (of the EMA)" if is_validated and self.live.task.ema is not None else ""
        self.lines.say(f"{at}: {', '.join([f'loss {loss}', *others])}{whose}")
        for made in self.live.journal.entries[num_entries:]:
            self.lines.say(f"{made.by}: {made.what} {made.old:.3g} -> {made.new:.3g}")

    def _validate(self, loader: Loader) -> dict[str, float] | None:
        if not self._may_go_on("validation"):
            return None
        opened, live, began = self._opened, self.live, self._budget.working()
        try:
            metrics = validate(
                live.task,
                loader,
                opened.valid_batch,
                seed=opened.seed,
                forward=opened.forward,
                proceed=lambda: self._may_go_on("window"),
                room=live.valid_room,
            )
        except RuntimeError as error:
            if not memory.is_shortage(error):
                raise
            size, model = opened.valid_batch, live.task.model
            self.lines.say(memory.give_way_in_validation(error, live.rooms, model, size))
            return self._validate(loader)
        if metrics is not None:
            self._budget.observe("validation", self._budget.working() - began)
        return metrics

    def _rest(self) -> None:
        self._opened.close()

    def _settle(self) -> None:
        if not self.live.is_torn:
            self.live.check()

    def _begin(self) -> None:
        if self.live.is_torn:  # its checkpoint could not be read when the last loop ended
            self.keeping.fall_back()
        if not self.live.task.model.training:
            self.live.task.model.train()
        self.keeping.regrade()
        self._is_short = False
        self.lines.shown = self._shows_bar and not self._holds  # a panel has them already
        self._settle_at, self._pace, self._bar = 0.0, Pace(), self.bar(shown=not self._holds)
        self.live.enter(None, time.time())
        self.keeping.begin()
        self._order_files.start()

    def _end(self) -> None:
        """Save what is alive and wait for it; where it is spoilt, be what was saved last."""
        try:
            self._orders.obey()
            if self.live.is_torn:
                self.keeping.saver.wait(timeout_s=self.keeping.patience_s)
                self.keeping.fall_back()
            self.live.go_back()
            self.live.enter(self.reason, time.time())
            if not self.keeping.has(self.reason):
                self.keeping.request(self.reason)
            self.draw(self._bar)
            self.keeping.finish()
            if self._orders.obey():  # given while it saved
                self.keeping.request(self.reason)
                self.keeping.finish()
            self._bar.close()
            self._say_goodbye()
        finally:
            self._bar.close()
            self._fed = None

    def bar(self, *, shown: bool = True) -> Bar:
        """Return a progress line; on another thread than the main one it draws nothing."""
        shown = shown and self._shows_bar
        return Bar.of(self.live, self.name, is_batch=self._opened.host.is_batch, shown=shown)

    def draw(self, bar: Bar) -> None:
        """Draw a progress line as things are now."""
        bar.draw(self.live, self.samples_per_s, self._budget.left_s)

    def _save_once(self) -> None:
        if self._is_save_asked:
            self._is_save_asked = False
            self.keeping.request(self.reason)

    def _edit(self, changes: dict[str, Any], *, is_told: bool) -> None:
        live, epochs = self.live, changes.get("epochs")
        num_entries = len(live.journal.entries)
        if epochs is not None and live.position:  # an epoch that is under way is the last one at least
            changes = changes | {"epochs": max(epochs, live.epoch + 1)}
        try:
            live.edit(changes)
        except ValueError as error:  # two changes, each of which could be made alone
            self.lines.warn(f"Not set: {error}")
        if is_told and len(live.journal.entries) > num_entries:
            self.keeping.secure(waits=self._thread is None)
