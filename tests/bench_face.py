"""What the whole face costs a run: the training time that panel, live picture and twin take away.

    OMP_NUM_THREADS=1 python tests/bench_face.py [--turns 4] [--seconds 40]

In a real kernel, whose messages somebody reads, a run whose step takes about a millisecond trains in
turns with its panel shown and without. A turn's speed says little: on a shared machine the same run is
slower by a fifth a minute later. So each step is timed, and those during which another thread of ours
did something are held against the median of the 400 around them: what they took longer is what it
cost. The steps that nobody disturbed are held against it too, and their mean is taken off. The first
eight seconds of a turn, with the panel's first pictures, are left out.

Told are also the processor time that all threads but the training one take, and the machine's load:
where others want the processors too, a thread that wakes costs more than it computes.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
from pathlib import Path

from kernels import Kernel

TURNS = """
import json, tempfile, time
import numpy as np
import torch
import nbtrain
from nbtrain import face, poll
from torch import nn

SKIPPED_S, SECONDS, NUM_TURNS = 8, {seconds}, {turns}
AROUND, STRIDE = 200, 100  # of the local median, in steps

def build():
    layers = [nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 10)]
    model = nn.Sequential(*layers)
    data = torch.utils.data.TensorDataset(torch.randn(64_000, 32), torch.randint(0, 10, (64_000,)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    return nbtrain.Task(model=model, optimizer=optimizer, train=data)

def noted(kind, name, what):
    function = getattr(kind, name)
    def call(*args, **more):
        began = time.perf_counter()
        try:
            return function(*args, **more)
        finally:
            acts.append((what, began, time.perf_counter()))
    setattr(kind, name, call)

acts = []
noted(face.Drawn, "_draw", "face")
noted(poll.Poller, "__call__", "wait")

def turn(session):
    acts.clear()
    times, begun = [], time.perf_counter()
    cpu = lambda: time.process_time() - time.thread_time()
    others = []
    def look(*_):
        now = time.perf_counter()
        if now - begun > SKIPPED_S:
            if not others:
                others.append(cpu())
            times.append(now)
        if now - begun > SKIPPED_S + SECONDS and len(others) == 1:
            others.append(cpu())
            session.stop()
    hook = session.task.model.register_forward_pre_hook(look)
    session.run()
    hook.remove()
    times = np.array(times)
    took, passed = np.diff(times), times[-1] - times[0]
    at = range(0, len(took), STRIDE)
    local = np.array([np.median(took[max(0, i - AROUND):i + AROUND + 1]) for i in at])
    beyond = took - local.repeat(STRIDE)[:len(took)]
    hits = {{"face": np.zeros(len(took), bool), "wait": np.zeros(len(took), bool)}}
    for what, began, ended in acts:
        first, last = np.searchsorted(times, [began, ended])
        hits[what][max(first - 1, 0):last] = True
    calm = beyond[~(hits["face"] | hits["wait"])].mean()
    lost = {{what: float((beyond[hit] - calm).sum() / passed) for what, hit in hits.items()}}
    lost["all"] = float((beyond[hits["face"] | hits["wait"]] - calm).sum() / passed)
    return lost | {{"step": float(np.median(took)), "cpu": (others[1] - others[0]) / SECONDS}}

store = tempfile.mkdtemp()
how = dict(store=store, batch_size=32, num_workers=0, device="cpu", warmup_epochs=2, budget=None)
bare, shown = (nbtrain.Session(n, build, bar=n == "shown", **how) for n in ("bare", "shown"))
pairs = [(turn(bare), turn(shown)) for _ in range(NUM_TURNS)]
print(json.dumps([pairs, shown._face.panel._rest_s]))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--turns", type=int, default=4)
    parser.add_argument("--seconds", type=int, default=40)
    asked = parser.parse_args()
    with (
        tempfile.TemporaryDirectory() as folder,
        Kernel(Path(sys.executable), Path(folder)) as kernel,
    ):
        out = kernel.run(TURNS.format(seconds=asked.seconds, turns=asked.turns), at_most_s=3600)
    pairs, rest_s = json.loads(out.strip().splitlines()[-1])
    for name, turns in zip(
        ("without the face", "with the face"), zip(*pairs, strict=True), strict=True
    ):
        lost = sorted(turn["all"] for turn in turns)
        median = {key: statistics.median(turn[key] for turn in turns) for key in turns[0]}
        print(
            f"{name}: a step takes {1000 * median['step']:.2f} ms; lost are {median['all']:.2%} of the "
            f"time (from {lost[0]:.2%} to {lost[-1]:.2%}): to the cell's wait {median['wait']:.2%}, to "
            f"the face {median['face']:.2%}; other threads compute for {median['cpu']:.2%} of it"
        )
    print(f"a picture every {rest_s:.1f} s; load average {os.getloadavg()[0]:.1f}")


if __name__ == "__main__":
    main()
