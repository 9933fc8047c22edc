"""Side by side: one population trained by a plain loop, by nbtrain here and on Ray, by Ray Tune.

    pip install -e '.[test]' && OMP_NUM_THREADS=1 python tests/bench_population.py [--repeats 3]

One job for all: members of one small net with dropout, their data in memory, trained with one thread,
a validation after each slice, the worst quarter going on from copies of the best. The plain loop is
what one would write by hand: it copies and explores too, and saves nothing. Ray Tune's own PBT is in
its best documented setup: synchronous, actors reused, four checkpoints kept of each trial, and the
trainable saves the optimizer too, which that of the official example does not. Ray is given one CPU, so
that members take turns everywhere, and what is measured is the way from one to the next.

Each contender is a fresh process; turns alternate, and what is told is the median of each turn's ratio
to the plain loop's turn just before, because a shared machine changes its speed.

    start      from a torch that is imported to the first step, in seconds
    a slice    wall time from the first step on, beyond the plain loop's, over the number of slices
    between    what lies between two members' slices, neither training nor validation; unknown on Ray
    CPU        seconds from the first step on, of the process and all that it started, over the loop's
    memory     of all these together, at most, in MiB
    written    bytes that all these wrote to disk, over those of the population's state
    at most    bytes that were kept at any time, over the same
"""

from __future__ import annotations

import argparse
import copy
import functools
import json
import math
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from statistics import median
from typing import Any

import psutil
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

MEMBERS, ROUNDS, EPOCHS_A_ROUND, BATCH = 8, 5, 3, 64
SAMPLES, VALID, HIDDEN = 2048, 512, 256
SLICES = MEMBERS * ROUNDS
QUANTILE = 0.25
LOOK_EVERY_S = 0.2


@functools.cache
def clouds() -> tuple[torch.Tensor, torch.Tensor]:
    """Make the samples: ten clouds that overlap."""
    made = torch.Generator().manual_seed(0)
    centres = torch.randn(10, 784, generator=made)
    labels = torch.randint(0, 10, (SAMPLES + VALID,), generator=made)
    images = centres[labels] + 6 * torch.randn(SAMPLES + VALID, 784, generator=made)
    return images, labels


def data(first: int, last: int) -> TensorDataset:
    images, labels = clouds()
    return TensorDataset(images[first:last], labels[first:last])


def net() -> nn.Module:
    layers = [nn.Linear(784, HIDDEN), nn.ReLU(), nn.Dropout(0.2), nn.Linear(HIDDEN, 10)]
    return nn.Sequential(*layers)


def loss(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    told = os.environ["BENCH_FIRST"]
    if output.requires_grad and not os.path.exists(told):  # in whichever process it is
        with open(told, "w") as file:
            file.write(str(time.time()))
    return nn.functional.cross_entropy(output, target)


def accuracy(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return (output.argmax(1) == target).float()


# ---- the contenders; each returns what of its wall time lies between slices, where it knows


class Member:
    """A member of the loop by hand, and of Ray Tune's trainable."""

    def __init__(self, lr: float, momentum: float) -> None:
        self.model = net()
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=lr, momentum=momentum)
        self.train = DataLoader(data(0, SAMPLES), BATCH, shuffle=True)
        self.valid = DataLoader(data(SAMPLES, SAMPLES + VALID), BATCH)

    def slice(self) -> float:
        self.model.train()
        for _ in range(EPOCHS_A_ROUND):
            for x, y in self.train:
                self.optimizer.zero_grad()
                loss(self.model(x), y).backward()
                self.optimizer.step()
        self.model.eval()
        with torch.no_grad():
            right = sum(accuracy(self.model(x), y).sum().item() for x, y in self.valid)
        return right / VALID

    def explore(self) -> None:
        group = self.optimizer.param_groups[0]
        group["lr"] = min(max(group["lr"] * random.choice((0.8, 1.2)), 1e-3), 1e-1)
        group["momentum"] = min(max(group["momentum"] * random.choice((0.8, 1.2)), 0.1), 0.9)

    def state(self) -> dict[str, Any]:
        return {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}

    def put(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])


def by_hand(folder: Path) -> float:
    torch.manual_seed(0)
    members = [Member(10 ** random.uniform(-3, -1), random.uniform(0.1, 0.9)) for _ in range(MEMBERS)]
    began, trained_s = time.perf_counter(), 0.0  # torch's first optimizer takes a second
    for _ in range(ROUNDS):
        began_round = time.perf_counter()
        scores = [member.slice() for member in members]
        trained_s += time.perf_counter() - began_round
        order = sorted(range(MEMBERS), key=scores.__getitem__)
        count = int(MEMBERS * QUANTILE)
        for worst in order[:count]:
            members[worst].put(copy.deepcopy(members[random.choice(order[-count:])].state()))
            members[worst].explore()
    return time.perf_counter() - began - trained_s


def ours(engine: str, folder: Path) -> float:
    import nbtrain
    from nbtrain.population.member import Member as Ours

    def build(lr: float = 0.1, momentum: float = 0.9) -> nbtrain.Task:
        model = net()
        optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=momentum)
        train, valid = data(0, SAMPLES), data(SAMPLES, SAMPLES + VALID)
        metrics = {"accuracy": accuracy}
        return nbtrain.Task(
            model=model, optimizer=optimizer, train=train, valid=valid, loss=loss, metrics=metrics
        )

    # What is spent in training and validation, for what lies between; not so in Ray's processes.
    inside = {"train": 0.0, "validate": 0.0}

    def timed(name: str) -> None:
        method = getattr(Ours, name)

        def around(self: Ours, *given: Any) -> Any:
            began = time.perf_counter()
            found = method(self, *given)
            inside[name] += time.perf_counter() - began
            return found

        setattr(Ours, name, around)

    for name in inside:
        timed(name)
    population = nbtrain.Population(
        "bench",
        build,
        members=MEMBERS,
        interval=f"{EPOCHS_A_ROUND} epochs",
        epochs=EPOCHS_A_ROUND * ROUNDS,
        quantile=QUANTILE,
        space={"lr": nbtrain.loguniform(1e-3, 1e-1), "momentum": nbtrain.uniform(0.1, 0.9)},
        metric="accuracy",
        batch_size=BATCH,
        store=folder,
        budget=None,
        bar=False,
        device="cpu",
        engine=engine,
        resources={"num_cpus": 1} if engine == "ray" else None,
    )
    if engine == "ray":
        begin_ray()
    began = time.perf_counter()
    population.run()
    took_s = time.perf_counter() - began
    assert population.is_done and len(population.history) == SLICES
    return took_s - sum(inside.values()) if engine == "local" else math.nan


def begin_ray() -> None:
    import logging

    import ray

    ray.init(num_cpus=1, include_dashboard=False, logging_level=logging.ERROR, log_to_driver=False)


def tune(folder: Path) -> float:
    os.environ["RAY_AIR_NEW_OUTPUT"] = "0"
    from ray import tune
    from ray.tune.schedulers import PopulationBasedTraining

    def trainable(config: dict[str, Any]) -> None:
        torch.set_num_threads(1)
        member = Member(config["lr"], config["momentum"])
        done = 0
        if (found := tune.get_checkpoint()) is not None:
            with found.as_directory() as there:
                state = torch.load(Path(there) / "state.pt")
            member.put(state)
            done = state["done"]
            member.optimizer.param_groups[0] |= {k: config[k] for k in ("lr", "momentum")}
        while done < ROUNDS:
            score, done = member.slice(), done + 1
            with tempfile.TemporaryDirectory() as there:
                torch.save(member.state() | {"done": done}, Path(there) / "state.pt")
                tune.report({"accuracy": score}, checkpoint=tune.Checkpoint.from_directory(there))

    domains = {"lr": tune.loguniform(1e-3, 1e-1), "momentum": tune.uniform(0.1, 0.9)}
    scheduler = PopulationBasedTraining(
        time_attr="training_iteration",
        perturbation_interval=1,
        quantile_fraction=QUANTILE,
        hyperparam_mutations=domains,
        synch=True,
    )
    begin_ray()
    tuner = tune.Tuner(
        trainable,
        param_space=domains,
        tune_config=tune.TuneConfig(
            metric="accuracy",
            mode="max",
            scheduler=scheduler,
            num_samples=MEMBERS,
            reuse_actors=True,
        ),
        run_config=tune.RunConfig(
            name="bench",
            storage_path=str(folder),
            stop={"training_iteration": ROUNDS},
            verbose=0,
            checkpoint_config=tune.CheckpointConfig(num_to_keep=4),
        ),
    )
    results = tuner.fit()
    assert len(results) == MEMBERS and not results.errors
    assert all(result.metrics["training_iteration"] == ROUNDS for result in results)
    return math.nan


CONTENDERS: dict[str, Callable[[Path], float]] = {
    "plain loop": by_hand,
    "nbtrain": lambda folder: ours("local", folder),
    "nbtrain on Ray": lambda folder: ours("ray", folder),
    "Ray Tune's PBT": tune,
}


# ---- what they cost


def one(name: str, place: str) -> None:
    """Be one contender, and write down what it knows of itself."""
    folder = Path(place)
    torch.set_num_threads(1)
    began_at = time.time()
    between_s = CONTENDERS[name](folder / "kept")
    ended_at, first_at = time.time(), float(Path(os.environ["BENCH_FIRST"]).read_text())
    told = {"start_s": first_at - began_at, "took_s": ended_at - first_at, "between_s": between_s}
    (folder / "told").write_text(json.dumps(told))


class Watch:
    """What a process and all that it starts have cost so far, and what its folder holds."""

    def __init__(self, pid: int, folder: Path) -> None:
        self._root, self._folder = psutil.Process(pid), folder
        self._cpu_s: dict[tuple[int, float], float] = {}
        self._written: dict[tuple[int, float], int] = {}
        self.most_bytes = self.most_memory = 0
        self.before_s = 0.0  # what it had cost when it began to train

    def look(self) -> None:
        memory = 0
        for process in self._all():
            try:
                key = process.pid, process.create_time()
                times = process.cpu_times()
                self._cpu_s[key] = times.user + times.system
                self._written[key] = process.io_counters().write_bytes
                memory += process.memory_info().rss - process.memory_info().shared
            except psutil.Error:  # it has ended meanwhile
                continue
        self.most_memory = max(self.most_memory, memory)
        self.most_bytes = max(self.most_bytes, size(self._folder / "kept"))
        if not (self._folder / "first").exists():
            self.before_s = self.cpu_s

    @property
    def cpu_s(self) -> float:
        return sum(self._cpu_s.values())

    @property
    def written(self) -> int:
        return sum(self._written.values())

    def _all(self) -> Iterable[psutil.Process]:
        try:
            return [self._root, *self._root.children(recursive=True)]
        except psutil.Error:
            return []


def size(folder: Path) -> int:
    total = 0
    for at, _, files in os.walk(folder):
        for file in files:
            try:
                total += os.lstat(os.path.join(at, file)).st_size
            except OSError:  # it was removed meanwhile
                continue
    return total


def measured(name: str) -> dict[str, float]:
    """Run a contender to its end in a process of its own."""
    folder = Path(tempfile.mkdtemp(prefix="bench"))
    (folder / "kept").mkdir()
    # Imported, because Ray's processes must find what is in here too, and `__main__` is another there.
    paths = os.pathsep.join(filter(None, (str(Path(__file__).parent), os.environ.get("PYTHONPATH"))))
    env = os.environ | {"BENCH_FIRST": str(folder / "first"), "PYTHONPATH": paths}
    with (folder / "log").open("wb") as log:
        be = "import sys, bench_population; bench_population.one(*sys.argv[1:])"
        command = [sys.executable, "-c", be, name, str(folder)]
        process = subprocess.Popen(command, env=env, stdout=log, stderr=subprocess.STDOUT)
        watch = Watch(process.pid, folder)
        while process.poll() is None:
            watch.look()
            time.sleep(LOOK_EVERY_S)
    try:
        assert process.returncode == 0, (folder / "log").read_text()[-4000:]
        told: dict[str, float] = json.loads((folder / "told").read_text())
    finally:
        shutil.rmtree(folder)
    cpu_s = watch.cpu_s - watch.before_s
    costs = {"cpu_s": cpu_s, "written": watch.written, "most": watch.most_bytes}
    return told | costs | {"memory": watch.most_memory / 2**20}


def state_bytes() -> int:
    """Return the size of the population's state: weights and momentum of each member."""
    return MEMBERS * 2 * sum(p.numel() * p.element_size() for p in net().parameters())


def main() -> None:
    """Print a line a contender."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--only", nargs="+", choices=list(CONTENDERS), default=list(CONTENDERS))
    options = parser.parse_args()
    turns: dict[str, list[dict[str, float]]] = {name: [] for name in CONTENDERS}
    pairs: dict[str, list[tuple[float, float]]] = {name: [] for name in CONTENDERS}
    names = ["plain loop", *(name for name in options.only if name != "plain loop")]
    for _ in range(options.repeats):
        for name in names:
            plain = measured("plain loop")
            found = measured(name)
            turns[name].append(found)
            beyond_s = (found["took_s"] - plain["took_s"]) / SLICES
            pairs[name].append((beyond_s, found["cpu_s"] / plain["cpu_s"]))
            said = f"{name}: start {found['start_s']:.1f} s"
            for who, cost in (("then", found), ("plain", plain)):
                said += f"; {who} {cost['took_s']:.1f} s, {cost['cpu_s']:.1f} CPU s"
            print(f"{said}; load {os.getloadavg()[0]:.1f}", file=sys.stderr)
    print(f"{SLICES} slices of {EPOCHS_A_ROUND * SAMPLES // BATCH} steps; load {os.getloadavg()}")
    print("                start s   a slice ms   between ms    CPU  memory MiB  written  at most")
    for name in names:
        mid = {key: median(turn[key] for turn in turns[name]) for key in turns[name][0]}
        beyond_s, cpu = (median(column) for column in zip(*pairs[name], strict=True))
        between_ms = 1000 * mid["between_s"] / SLICES
        written, most = (mid[key] / state_bytes() for key in ("written", "most"))
        print(
            f"{name:15} {mid['start_s']:7.2f} {1000 * beyond_s:12.1f} {between_ms:12.2f} {cpu:6.2f} "
            f"{mid['memory']:11.0f} {written:8.2f} {most:8.2f}"
        )


if __name__ == "__main__":
    main()
