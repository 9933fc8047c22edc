"""What the whole face costs a run: steps a second with panel, live picture and twin, and without.

    python tests/bench_face.py [--turns 8] [--steps 4000]

In a real kernel, whose messages somebody reads, the same run trains in turns with `bar=False` and with
its panel shown; its step takes about a millisecond. What is told is the median of each shown turn's
time over that of the bare turn before it. Not a test: a loaded machine varies by more than the 2 % that
it may cost.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from pathlib import Path

from kernels import Kernel

TURNS = """
import json, statistics, tempfile, time
import torch
import nbtrain
from torch import nn

NUM_STEPS, NUM_TURNS = {steps}, {turns}

def build():
    layers = [nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 10)]
    model = nn.Sequential(*layers)
    data = torch.utils.data.TensorDataset(torch.randn(64_000, 64), torch.randint(0, 10, (64_000,)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    return nbtrain.Task(model=model, optimizer=optimizer, train=data)

def turn(session):
    times = []
    def look(*_):
        times.append(time.perf_counter())
        if len(times) == NUM_STEPS:
            session.stop()
    hook = session.task.model.register_forward_pre_hook(look)
    session.run()
    hook.remove()
    return (times[-1] - times[100]) / (len(times) - 101)

store = tempfile.mkdtemp()
how = dict(store=store, batch_size=32, num_workers=0, device="cpu", warmup_epochs=2, budget=None)
bare, shown = (nbtrain.Session(n, build, bar=n == "shown", **how) for n in ("bare", "shown"))
turn(bare), turn(shown)
ratios, steps = [], []
for _ in range(NUM_TURNS):
    alone = turn(bare)
    ratios.append(turn(shown) / alone)
    steps.append(alone)
print(json.dumps([statistics.median(steps), ratios, shown._face._curves.interval_s]))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--turns", type=int, default=8)
    parser.add_argument("--steps", type=int, default=4000)
    asked = parser.parse_args()
    with (
        tempfile.TemporaryDirectory() as folder,
        Kernel(Path(sys.executable), Path(folder)) as kernel,
    ):
        out = kernel.run(TURNS.format(steps=asked.steps, turns=asked.turns), at_most_s=3600)
    step_s, ratios, interval_s = json.loads(out.strip().splitlines()[-1])
    print(
        f"a step takes {1000 * step_s:.2f} ms alone, with the face {statistics.median(ratios):.3f} "
        f"times that (median of {len(ratios)}, from {min(ratios):.3f} to {max(ratios):.3f}); "
        f"a picture every {interval_s:.1f} s"
    )


if __name__ == "__main__":
    main()
