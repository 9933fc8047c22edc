"""Side by side: who resumes exactly, who re-reads, who sees a flipped bit, what the loop costs.

    pip install -e '.[test]' accelerate lightning torchdata && python tests/bench_peers.py

One job for all: a small convolutional net with BatchNorm and Dropout, random augmentation, two
workers, accumulation 2, a checkpoint every 8 micro-batches. Each contender, in its best documented
setup, is run uncut, and killed with SIGKILL in the second epoch and resumed in a fresh process. Exact
means that every later loss and all final weights are equal to the bit. The cost of the loop is CPU time
a step with a tiny net and no checkpoints, the median of interleaved rounds, over the bare loop's.
"""

from __future__ import annotations

import importlib.util
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

N, BATCH, ACCUMULATE, EPOCHS, EVERY = 512, 16, 2, 2, 8
MICROS = EPOCHS * N // BATCH
KILL = 45  # in the second epoch; the checkpoint before it is at 40
ROUNDS, STEPS = 5, 2000


class Images(Dataset[Any]):
    """Images whose augmentation draws from torch, numpy and python."""

    def __len__(self) -> int:
        return N

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        if reads := os.environ.get("READS"):
            with Path(reads).open("a") as file:
                file.write("x")
        x = torch.full((3, 16, 16), index / N) + 0.1 * torch.randn(3, 16, 16)
        return x * float(np.random.uniform(0.9, 1.1)) + random.random(), index % 10


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, 2),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Flatten(),
        nn.Dropout(0.3),
        nn.Linear(16 * 49, 10),
    )


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)


class Told:
    """Losses by micro-batch; the first one of a process, and the end, are noticed."""

    def __init__(self, folder: Path, kill: int) -> None:
        self.folder, self.kill = folder, kill

    def __call__(self, micro: int, loss: torch.Tensor) -> None:
        with (self.folder / "losses").open("a") as file:
            file.write(f"{micro} {loss.item().hex()} {time.time()}\n")
        if micro == self.kill:
            os.kill(os.getpid(), signal.SIGKILL)


def tutorial(folder: Path, told: Told) -> nn.Module:
    model = net()
    optimizer = sgd(model)
    done, path = 0, folder / "last.pt"
    if path.exists():
        state = torch.load(path)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        done = state["done"]
    loader = DataLoader(Images(), BATCH, shuffle=True, num_workers=2)
    while done < MICROS:
        for x, y in loader:
            loss = nn.functional.cross_entropy(model(x), y)
            (loss / ACCUMULATE).backward()
            if (done + 1) % ACCUMULATE == 0:
                optimizer.step()
                optimizer.zero_grad()
            told(done, loss)
            done += 1
            if done % EVERY == 0:
                state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
                torch.save(state | {"done": done}, path)
            if done % (N // BATCH) == 0:
                break
    return model


def torchdata(folder: Path, told: Told) -> nn.Module:
    from torchdata.stateful_dataloader import StatefulDataLoader

    model = net()
    optimizer = sgd(model)
    loader = StatefulDataLoader(Images(), BATCH, shuffle=True, num_workers=2)
    done, path, rng = 0, folder / "last.pt", None
    if path.exists():
        state = torch.load(path, weights_only=False)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        loader.load_state_dict(state["loader"])
        done, rng = state["done"], state["rng"]
    while done < MICROS:
        batches = iter(loader)
        if rng is not None:  # after iter(), which draws from the global generator
            torch.set_rng_state(rng)
            rng = None
        for x, y in batches:
            loss = nn.functional.cross_entropy(model(x), y)
            (loss / ACCUMULATE).backward()
            if (done + 1) % ACCUMULATE == 0:
                optimizer.step()
                optimizer.zero_grad()
            told(done, loss)
            done += 1
            if done % EVERY == 0:
                state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
                state |= {"loader": loader.state_dict(), "rng": torch.get_rng_state()}
                torch.save(state | {"done": done}, path)
    return model


def accelerate(folder: Path, told: Told) -> nn.Module:
    from accelerate import Accelerator
    from accelerate.utils import DataLoaderConfiguration, set_seed

    set_seed(0)
    config = DataLoaderConfiguration(use_seedable_sampler=True)
    engine = Accelerator(cpu=True, gradient_accumulation_steps=ACCUMULATE, dataloader_config=config)
    model = net()
    loader = DataLoader(Images(), BATCH, shuffle=True, num_workers=2)
    model, optimizer, loader = engine.prepare(model, sgd(model), loader)
    done, path = 0, folder / "last"
    if path.exists():
        engine.load_state(str(path))
        done = int((folder / "done").read_text())
    while done < MICROS:
        epoch, skip = divmod(done, N // BATCH)
        loader.set_epoch(epoch)
        for x, y in engine.skip_first_batches(loader, skip) if skip else loader:
            with engine.accumulate(model):
                loss = nn.functional.cross_entropy(model(x), y)
                engine.backward(loss)
                optimizer.step()
                optimizer.zero_grad()
            told(done, loss)
            done += 1
            if done % EVERY == 0:
                engine.save_state(str(path))
                (folder / "done").write_text(str(done))
    return engine.unwrap_model(model)


def lightning(folder: Path, told: Told) -> nn.Module:
    import lightning as pl
    from lightning.pytorch.callbacks import ModelCheckpoint
    from torchdata.stateful_dataloader import StatefulDataLoader

    class Module(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = net()
            self.done = 0

        def training_step(self, batch: Any, number: int) -> torch.Tensor:
            loss = nn.functional.cross_entropy(self.net(batch[0]), batch[1])
            told(self.current_epoch * (N // BATCH) + number, loss)
            return loss

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return sgd(self.net)

    pl.seed_everything(0, workers=True)
    module = Module()
    saver = ModelCheckpoint(
        folder, filename="last", every_n_train_steps=EVERY // ACCUMULATE, enable_version_counter=False
    )
    trainer = pl.Trainer(
        max_epochs=EPOCHS,
        accelerator="cpu",
        accumulate_grad_batches=ACCUMULATE,
        callbacks=[saver],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    loader = StatefulDataLoader(Images(), BATCH, shuffle=True, num_workers=2)
    path = folder / "last.ckpt"
    trainer.fit(module, loader, ckpt_path=path if path.exists() else None)
    return module.net


def nbtrain(folder: Path, told: Told) -> nn.Module:
    import nbtrain

    model = net()
    session = nbtrain.Session(
        "bench",
        model=model,
        optimizer=sgd(model),
        train=Images(),
        store=folder,
        epochs=EPOCHS,
        batch_size=BATCH,
        accumulate=ACCUMULATE,
        num_workers=2,
        budget=None,
        bar=False,
    )
    done = session.step * ACCUMULATE
    for x, y in session:
        loss = nn.functional.cross_entropy(model(x), y)
        session.update(loss)
        told(done, loss)
        done += 1
        if done % EVERY == 0:
            session.save()
    return model


CONTENDERS = (tutorial, torchdata, accelerate, lightning, nbtrain)


def train(name: str, folder: Path, kill: int) -> None:
    """Be one process of one contender."""
    model = globals()[name](folder, Told(folder, kill))
    torch.save(model.state_dict(), folder / "final.pt")


def spawn(name: str, folder: Path, kill: int = -1, reads: Path | None = None) -> tuple[int, float]:
    """Run a contender in a fresh process; return exit code and when it began."""
    folder.mkdir(parents=True, exist_ok=True)
    environ = os.environ | {"READS": str(reads) if reads else ""}
    began = time.time()
    command = [sys.executable, __file__, name, str(folder), str(kill)]
    log = (folder.parent / f"{name}.log").open("a")
    return subprocess.run(command, env=environ, stderr=log, stdout=log).returncode, began


def losses(folder: Path) -> dict[int, str]:
    """Return the loss of each micro-batch, the last one written where there are two."""
    rows = [line.split() for line in (folder / "losses").read_text().splitlines()]
    return {int(micro): loss for micro, loss, _ in rows}


def flipped_is_seen(name: str, folder: Path) -> str:
    """Flip a bit in the middle of the largest file, resume, and say what came of it."""
    files = [p for p in folder.rglob("*") if p.is_file() and p.name not in ("losses", "final.pt")]
    newest = max(p.stat().st_mtime for p in files)
    largest = max((p for p in files if newest - p.stat().st_mtime < 1), key=lambda p: p.stat().st_size)
    data = bytearray(largest.read_bytes())
    data[len(data) // 2] ^= 0x40
    largest.write_bytes(data)
    code, _ = spawn(name, folder)
    if code:
        return "error"
    return "exact from the one before" if same(folder, folder.parent / "whole") else "not seen"


def same(folder: Path, whole: Path) -> bool:
    one, other = torch.load(folder / "final.pt"), torch.load(whole / "final.pt")
    equal = all(torch.equal(one[name], other[name]) for name in other)
    return equal and losses(folder) == losses(whole)


def exactness(name: str, base: Path) -> str:
    """Run a contender uncut, and cut; return its row."""
    whole, cut, reads = base / "whole", base / "cut", base / "reads"
    assert spawn(name, whole)[0] == 0, f"see {base}"
    assert spawn(name, cut, KILL)[0] == -signal.SIGKILL
    flipped = base / "flipped"
    subprocess.run(["cp", "-a", str(cut), str(flipped)], check=True)
    before = len((cut / "losses").read_text().splitlines())
    code, began = spawn(name, cut, reads=reads)
    assert code == 0, f"see {base}"
    first = (cut / "losses").read_text().splitlines()[before].split()
    verdict = "yes" if same(cut, whole) else "no"
    seen = flipped_is_seen(name, flipped)
    ended = len(reads.read_text()) if reads.exists() else 0
    needed = N * EPOCHS - int(first[0]) * BATCH
    extra = max(0, ended - needed)
    return f"{name:10} {verdict:6} {float(first[2]) - began:6.1f} s {extra:12}      {seen}"


def tiny_step(name: str) -> float:
    """Return the CPU microseconds of one step of a tiny net."""
    data = TensorDataset(torch.randn(8 * STEPS, 16), torch.randint(0, 4, (8 * STEPS,)))
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4))
    optimizer, began = sgd(model), 0.0
    if name == "nbtrain":
        import nbtrain

        session: Any = nbtrain.Session(
            "cost",
            model=model,
            optimizer=optimizer,
            train=data,
            store=tempfile.mkdtemp(),
            epochs=1,
            batch_size=8,
            num_workers=0,
            bar=False,
        )
        began = time.process_time()
        for x, y in session:
            session.update(nn.functional.cross_entropy(model(x), y))
    elif name == "accelerate":
        from accelerate import Accelerator

        engine = Accelerator(cpu=True)
        model, optimizer, loader = engine.prepare(model, optimizer, DataLoader(data, 8, shuffle=True))
        began = time.process_time()
        for x, y in loader:
            engine.backward(nn.functional.cross_entropy(model(x), y))
            optimizer.step()
            optimizer.zero_grad()
    else:
        loader = DataLoader(data, 8, shuffle=True)
        began = time.process_time()
        for x, y in loader:
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
            optimizer.zero_grad()
    return (time.process_time() - began) / STEPS * 1e6


def main() -> None:
    torch.set_num_threads(1)
    base = Path(tempfile.mkdtemp(prefix="nbtrain-bench-"))
    there = [c.__name__ for c in CONTENDERS]
    there = [n for n in there if n == "tutorial" or importlib.util.find_spec(n)]
    print("           exact  first step   reads more   a flipped bit")
    for name in there:
        print(exactness(name, base / name), flush=True)
    names = ["bare", *(n for n in there if n in ("accelerate", "nbtrain"))]
    seen: dict[str, list[float]] = {n: [] for n in names}
    for _ in range(ROUNDS):
        for n in names:
            seen[n].append(tiny_step(n))
    print("\nCPU microseconds a step, tiny net, median of", ROUNDS)
    for n in names:
        print(f"{n:10} {median(seen[n]):6.0f}   x{median(seen[n]) / median(seen['bare']):.2f}")


if __name__ == "__main__":
    if len(sys.argv) > 1:
        train(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]))
    else:
        main()
