"""`python -m nbtrain demo`: a run that is cut twice, gone on with, and compared with one that is not.

Four processes on scikit-learn's handwritten digits, with a small timm model, random augmentation,
workers, accumulation and warmup:

1. a script whose budget ends: it stops itself, rehearses its resume, and exits with 0;
2. the same script, killed with SIGKILL in mid-epoch;
3. a process that holds none of the script, only `nbtrain.resume(...)`;
4. the same script, never cut, in another folder.

The weights of 3 and 4 are compared bit by bit.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from nbtrain import checkpoint
from nbtrain.checkpoint import Snapshot
from nbtrain.history import History
from nbtrain.journal import Journal
from nbtrain.stores import FolderStore
from nbtrain.trees import restore

PICTURE = "nbtrain-demo.png"
NAME = "digits"
KILL_AFTER = 40  # steps of its own that stage 2 has saved
SEEN = ("step", "epoch", "progress", "loss", "lr", "valid_loss", "accuracy")

SCRIPT = '''\
import os
import sys
import time

import numpy as np
import timm
import torch
from sklearn.datasets import load_digits
from torch.utils.data import Dataset
from torchvision.transforms import v2

import nbtrain


class Digits(Dataset):
    """The 1,797 handwritten digits that come with scikit-learn, as images."""

    def __init__(self, train):
        digits = load_digits()
        held_out = np.arange(len(digits.target)) % 5 == 0
        chosen = held_out != train
        images = torch.tensor(digits.images[chosen] / 16, dtype=torch.float32)
        self.images = torch.nn.functional.interpolate(images[:, None], 32, mode="bilinear")
        self.labels = digits.target[chosen]
        self.augment = v2.RandomAffine(degrees=12, translate=(0.1, 0.1), scale=(0.9, 1.1))
        self.train = train

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        image = self.images[index]
        if self.train:
            image = self.augment(image) + 0.05 * torch.randn(1, 32, 32)
        return image.expand(3, -1, -1), int(self.labels[index])


def accuracy(output, target):
    return (output.argmax(1) == target).float()


def build(lr=0.02):
    model = timm.create_model("test_resnet", num_classes=10, drop_rate=0.1)
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9, nesterov=True)
    return nbtrain.Task(model=model, optimizer=optimizer, train=Digits(True), valid=Digits(False),
                        metrics={"accuracy": accuracy})


if __name__ == "__main__":
    store, budget = sys.argv[1], sys.argv[2]
    session = nbtrain.Session(
        "digits", build, store=store, epochs=8, batch_size=16, accumulate=2, num_workers=2,
        warmup_epochs=2, warmup="exponential", decay="cosine", save_every="1s",
        budget=None if budget == "none" else float(budget), started_at=time.time())
    session.run()
    if session.reason == "budget":  # before the machine goes: would a fresh one go on?
        session.rehearse()
'''

RESUME = """\
import sys, nbtrain
nbtrain.resume("digits", store=sys.argv[1], trust_code=True, budget=None).run()
"""


def main() -> int:
    """Run the demo, print its table, save its picture; return 0 if the bits are the same."""
    folder = Path(tempfile.mkdtemp(prefix="nbtrain-demo-"))
    script, one_line = folder / "digits.py", folder / "fresh_kernel.py"
    script.write_text(SCRIPT)
    one_line.write_text(RESUME)
    cut, uncut = folder / "cut", folder / "uncut"
    say(f"Working in {folder}")
    began = []
    for title, command in (
        ("1/4  a budget that ends after 12 s", (script, cut, "12")),
        ("2/4  killed in mid-epoch", (script, cut, "none")),
        ("3/4  resumed by one line, with none of the code", (one_line, cut)),
        ("4/4  the same run, never cut", (script, uncut, "none")),
    ):
        say(f"\n{title}")
        began.append(time.time())
        # Workers take the second core; more threads would only wait for it.
        environ = os.environ | {"OMP_NUM_THREADS": "1"}
        process = subprocess.Popen([sys.executable, *map(str, command)], env=environ)
        code = kill_in_mid_epoch(process, cut) if title.startswith("2") else process.wait()
        if code != (-signal.SIGKILL if title.startswith("2") else 0):
            raise SystemExit(f"This stage ended with exit code {code}.")
    one, other = newest(cut), newest(uncut)
    table(one, began)
    same = same_bits(one, other)
    say(f"bit-identical: {'yes' if same else 'NO'} (weights, buffers, optimizer, losses, rates)")
    picture(one)
    say(f"curves:        {Path(PICTURE).resolve()}")
    return 0 if same else 1


def say(text: str) -> None:
    """Print at once: the processes below write to the same terminal."""
    print(text, flush=True)


def kill_in_mid_epoch(process: subprocess.Popen[bytes], store: Path) -> int:
    """Kill a process once it has saved some steps of its own inside an epoch."""
    first = newest_facts(store)["step"]
    while process.poll() is None:
        facts = newest_facts(store)
        if facts["step"] >= first + KILL_AFTER and 0.1 < facts["progress"] % 1 < 0.9:
            process.kill()
        time.sleep(0.05)
    return process.wait()


def newest_facts(store: Path) -> Mapping[str, Any]:
    """Return what the newest manifest says."""
    return checkpoint.find([FolderStore(store)], NAME)[0].facts


def newest(store: Path) -> Snapshot:
    """Read the newest checkpoint of a folder."""
    return checkpoint.load_newest(checkpoint.find([FolderStore(store)], NAME))[1]


def history(snapshot: Snapshot) -> list[dict[str, Any]]:
    """Return the rows of a checkpoint's history."""
    found = History()
    found.load_state_dict(restore(snapshot.state["trees"]["history"], snapshot.tensors))
    return list(found)


def same_bits(one: Snapshot, other: Snapshot) -> bool:
    """Compare weights, buffers, optimizer, and every loss and rate, with torch.equal."""
    names = [name for name in one.tensors if name.startswith("optimizer")]
    pairs = [(one.model[name], other.model[name]) for name in one.model]
    pairs += [(one.tensors[name], other.tensors[name]) for name in names]
    seen = [[[row[c] for c in SEEN] for row in history(side)] for side in (one, other)]
    return (
        one.model.keys() == other.model.keys()
        and all(torch.equal(a, b) for a, b in pairs)
        and seen[0] == seen[1]
    )


def table(snapshot: Snapshot, began: list[float]) -> None:
    """Print a line a stage."""
    rows = history(snapshot)
    say("\nstage  steps      ended by  first step after   loss  accuracy")
    for stage, started in zip(snapshot.state["stages"], began, strict=False):
        mine = [row for row in rows if row["stage"] == stage["stage"]]
        scores = [row["accuracy"] for row in mine if row["accuracy"] is not None]
        score = f"{scores[-1]:.1%}" if scores else "-"
        first_s = stage["first_step_at"] - started
        steps = f"{mine[0]['step']}-{mine[-1]['step']}"
        say(
            f"{stage['stage']:5}  {steps:9}  {stage['ended'] or 'SIGKILL':8}  {first_s:14.1f} s  "
            f"{mine[-1]['loss']:5.3f}  {score:>8}"
        )
    say("")


def picture(snapshot: Snapshot) -> None:
    """Save the curves of the run that was cut."""
    from nbtrain import plots

    journal = Journal.from_state_dict(snapshot.state["journal"])
    plots.curves(NAME, history(snapshot), journal, snapshot.facts["progress"]).savefig(PICTURE, dpi=120)
