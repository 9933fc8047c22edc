"""What the whole face costs a run: steps a second with panel, live picture and twin, and without.

    OMP_NUM_THREADS=1 python tests/bench_face.py [--turns 6] [--seconds 40]

In a real kernel, whose messages somebody reads, the same run trains in turns with `bar=False` and with
its panel shown; its step takes about a millisecond. The first eight seconds of a turn, with the panel's
first pictures, are left out. Two things are told. The median of each shown turn's time a step over the
mean of the bare turns around it: what it costs here, noise included. And the processor time that all
threads but the training one take, as a part of the time that passes, less that of the bare turns: more
than that it cannot cost where there are two cores, however loaded they are.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from itertools import pairwise
from pathlib import Path

from kernels import Kernel

TURNS = """
import json, statistics, tempfile, time
import torch
import nbtrain
from torch import nn

SKIPPED_S, SECONDS, NUM_TURNS = 8, {seconds}, {turns}

def build():
    layers = [nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 10)]
    model = nn.Sequential(*layers)
    data = torch.utils.data.TensorDataset(torch.randn(64_000, 32), torch.randint(0, 10, (64_000,)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    return nbtrain.Task(model=model, optimizer=optimizer, train=data)

def turn(session):
    began, num_steps, start = time.perf_counter(), 0, None
    def now():
        return time.perf_counter(), time.process_time() - time.thread_time()
    def look(*_):
        nonlocal num_steps, start, end
        num_steps += start is not None
        if start is None and time.perf_counter() - began > SKIPPED_S:
            start = now()
        elif start is not None and time.perf_counter() - began > SKIPPED_S + SECONDS:
            end = now()
            session.stop()
    end = None
    hook = session.task.model.register_forward_pre_hook(look)
    session.run()
    hook.remove()
    passed, others = (b - a for a, b in zip(start, end))
    return passed / num_steps, others / passed

store = tempfile.mkdtemp()
how = dict(store=store, batch_size=32, num_workers=0, device="cpu", warmup_epochs=2, budget=None)
bare, shown = (nbtrain.Session(n, build, bar=n == "shown", **how) for n in ("bare", "shown"))
alone, beside = [turn(bare)], []
for _ in range(NUM_TURNS):
    beside.append(turn(shown))
    alone.append(turn(bare))
print(json.dumps([alone, beside, shown._face._curves.interval_s]))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--turns", type=int, default=6)
    parser.add_argument("--seconds", type=int, default=40)
    asked = parser.parse_args()
    with (
        tempfile.TemporaryDirectory() as folder,
        Kernel(Path(sys.executable), Path(folder)) as kernel,
    ):
        out = kernel.run(TURNS.format(seconds=asked.seconds, turns=asked.turns), at_most_s=3600)
    alone, beside, interval_s = json.loads(out.strip().splitlines()[-1])
    around = [(a[0] + b[0]) / 2 for a, b in pairwise(alone)]
    ratios = [shown[0] / bare_s for shown, bare_s in zip(beside, around, strict=True)]
    busy, bare = (statistics.median(part for _, part in turns) for turns in (beside, alone))
    print(
        f"a step takes {1000 * statistics.median(around):.2f} ms alone, with the face "
        f"{statistics.median(ratios):.3f} times that (median of {len(ratios)}, from {min(ratios):.3f} "
        f"to {max(ratios):.3f}); a picture every {interval_s:.1f} s; other threads are busy for "
        f"{busy:.2%} of the time with it, {bare:.2%} without"
    )


if __name__ == "__main__":
    main()
