"""What it costs a training to be watched: steps a second with pictures drawn beside it, and without.

    python tests/bench_plots.py [--repeats 40] [--seconds 2] [--rows 20000] [--every 0.25 0.5 2]

A tiny net trains in a worker thread while the main thread waits, as in a notebook; a third thread draws
its curves. Turns are short and alternate, so that a machine that slows down slows all of them, and what
is told is the median of each turn's ratio to the turn with nothing beside it that came just before. Not
a test: a loaded machine is slower by more than what is looked for.

Pictures that come often show what one costs, far above the noise: `lost` is the training time lost to a
picture. Drawn every 100 times that, it costs 1 %.
"""

from __future__ import annotations

import argparse
import math
import statistics
import threading
import time
from collections.abc import Callable

import torch

from nbtrain.history import History
from nbtrain.journal import Journal
from nbtrain.plots import Curves

SETTINGS = {
    "epochs": 100,
    "warmup_epochs": 5,
    "warmup": "linear",
    "decay": "cosine",
    "milestones": (),
    "gamma": 0.1,
    "batch_size": 64,
    "accumulate": 1,
    "lr": None,
    "base_lr": None,
    "base_batch": None,
}
STEPS_AN_EPOCH = 2000
POLL_S = 0.05  # how often a waiting session looks for clicks


class Run:
    """A run that has some rows, and goes on for as long as it is told.

    Args:
        num_rows: Steps already in the history.
    """

    def __init__(self, num_rows: int) -> None:
        torch.manual_seed(0)
        layers = [torch.nn.Linear(64, 128), torch.nn.ReLU(), torch.nn.Linear(128, 64), torch.nn.ReLU()]
        self.model = torch.nn.Sequential(*layers, torch.nn.Linear(64, 10))
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1, momentum=0.9)
        self.x, self.y = torch.randn(32, 64), torch.randint(0, 10, (32,))
        self.journal, self.history = Journal(SETTINGS, [0.1]), History()
        self.step = 0
        noise = torch.randn(num_rows).tolist()
        for one in noise:
            self.count(2 * math.exp(-self.step / num_rows) + 0.2 * one)

    @property
    def progress(self) -> float:
        return self.step / STEPS_AN_EPOCH

    def count(self, loss: float) -> None:
        self.step += 1
        epoch = self.step // STEPS_AN_EPOCH
        lr = self.journal.rates(self.progress)[0]
        seen = {"step": self.step, "epoch": epoch, "progress": self.progress, "loss": loss, "lr": lr}
        self.history.add(stage=1, seconds=self.step * 1e-3, **seen)
        if not self.step % STEPS_AN_EPOCH:
            self.history.close_epoch(seen | {"valid_loss": loss})

    def train(self, seconds: float) -> float:
        """Return the steps a second."""
        first, began = self.step, time.perf_counter()
        while (now := time.perf_counter()) - began < seconds:
            loss = torch.nn.functional.cross_entropy(self.model(self.x), self.y)
            loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
            self.count(loss.item())
        return (self.step - first) / (now - began)


class Drawing:
    """A thread that draws a run.

    Args:
        interval_s: From one picture to the next.
    """

    def __init__(self, interval_s: float) -> None:
        self.interval_s = interval_s
        self.curves = Curves("bench")
        self.num_pictures, self.spent_s = 0, 0.0

    def beside(self, run: Run, end: threading.Event) -> None:
        began = time.thread_time()
        while True:
            self.curves.draw(run.history.arrays(), run.history.epochs, run.journal, run.progress)
            self.curves.png()
            self.num_pictures += 1
            if end.wait(self.interval_s):
                self.spent_s += time.thread_time() - began
                return


def turn(run: Run, seconds: float, beside: Callable[[Run, threading.Event], None] | None) -> float:
    """Train in a worker thread for some seconds with something beside it; return steps a second."""
    found: list[float] = []
    end = threading.Event()
    worker = threading.Thread(target=lambda: found.append(run.train(seconds)))
    other = threading.Thread(target=beside, args=(run, end)) if beside else None
    for thread in filter(None, (other, worker)):
        thread.start()
    while worker.is_alive():
        worker.join(POLL_S)
    end.set()
    if other:
        other.join()
    return found[0]


def main() -> None:
    """Print a line a kind."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=40)
    parser.add_argument("--seconds", type=float, default=2.0)
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--every", type=float, nargs="+", default=[0.25, 0.5, 2.0])
    options = parser.parse_args()
    torch.set_num_threads(1)
    drawings = {f"every {interval_s:g} s": Drawing(interval_s) for interval_s in options.every}
    run = Run(options.rows)
    for drawing in (None, *drawings.values()):  # the first picture has all its axes to draw
        turn(run, 2.0, drawing.beside if drawing else None)
    for drawing in drawings.values():
        drawing.num_pictures, drawing.spent_s = 0, 0.0
    alone: list[float] = []
    ratios: dict[str, list[float]] = {name: [] for name in ["nothing again", *drawings]}
    for _ in range(options.repeats):
        for name in ratios:
            drawing = drawings.get(name)
            before = turn(run, options.seconds, None)
            speed = turn(run, options.seconds, drawing.beside if drawing else None)
            ratios[name].append(speed / before)
            alone.append(before)
    print(f"alone: {statistics.median(alone):.0f} steps/s, {len(run.history)} rows at the end")
    print("pictures        ratio to alone (quartiles)    a second   thread's own ms   lost ms")
    for name, found in ratios.items():
        low, middle, high = statistics.quantiles(found, n=4)
        line = f"{name:14}  {middle:.4f} ({low:.4f} - {high:.4f})"
        if name in drawings:
            one, seconds = drawings[name], options.repeats * options.seconds
            own_ms, lost_ms = (
                1e3 * s / one.num_pictures for s in (one.spent_s, (1 - middle) * seconds)
            )
            line += f"   {one.num_pictures / seconds:8.2f}   {own_ms:15.1f}   {lost_ms:7.1f}"
        print(line)


if __name__ == "__main__":
    main()
