"""On a real Ray cluster, with real workers that are killed."""

from __future__ import annotations

import gc
import importlib
import os
import signal
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from herds import EPOCHS, assert_same_bits, bits, build, population
from torch import nn
from trials import bits_of, trial

import nbtrain
from nbtrain.errors import NbtrainError, NbtrainWarning
from nbtrain.population.cluster import Cluster, Done


def imported(name: str) -> Any:
    """Import Ray, or skip where it is missing; it raises the one or the other kind of ImportError."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        pytest.skip(f"{name}: {error}; pip install 'nbtrain[ray]'", allow_module_level=True)


ray = imported("ray")

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning:ray.*"),
    pytest.mark.filterwarnings("ignore::FutureWarning:ray.*"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),  # Ray's pipes, closed by the collector
]

DRIVER = os.getpid()  # whose losses do none of what follows
MARK = ""  # a file: where it is not there yet, a slice makes it and kills its worker
GATE = ""  # a folder: slices come there, and wait until there is a file "open"
AFTER = 0  # so many losses in the process at least
COUNT: list[int] = []


def wild(lr: float = 0.05, weight_decay: float = 0.0) -> nbtrain.Task:
    task = build(lr, weight_decay)

    def loss(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        if os.getpid() != DRIVER:
            COUNT.append(1)
            if MARK and len(COUNT) > AFTER and not os.path.exists(MARK):
                open(MARK, "x").close()
                os.kill(os.getpid(), signal.SIGKILL)
            if GATE and len(COUNT) == 5:
                open(f"{GATE}/{os.getpid()}", "x").close()
                until = time.monotonic() + 60
                while not os.path.exists(f"{GATE}/open") and time.monotonic() < until:
                    time.sleep(0.01)
        return nn.functional.cross_entropy(output, target)

    task.loss = loss
    return task


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> nbtrain.Population:
    return population(tmp_path_factory.mktemp("local")).run()


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """A cluster that nobody had made: ours. The tests find it connected, use it and leave it."""
    assert not ray.is_initialized()
    ours = Cluster({}, wants_gpu=False)
    assert ours.open()
    yield ray
    assert ray.is_initialized()
    ours.close()
    assert not ray.is_initialized()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        gc.collect()


@pytest.fixture(autouse=True)
def collected() -> Iterator[None]:
    """Ray leaves processes and pipes to the collector, which warns in whichever test it comes to."""
    yield
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        gc.collect()


def test_on_ray_with_a_worker_killed_every_bit_is_as_in_turn(
    cluster: Any, local: nbtrain.Population, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mark = tmp_path / "mark"
    monkeypatch.setattr(sys.modules[__name__], "MARK", str(mark))
    found = population(tmp_path / "found", engine="ray", build=wild, num_workers=1)
    with pytest.warns(NbtrainWarning, match="A worker was lost"):
        found.run()
    assert mark.exists()
    assert_same_bits(bits(found), bits(local))


def test_on_ray_slices_that_are_stopped_are_saved_and_gone_on_with(
    cluster: Any, local: nbtrain.Population, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = tmp_path / "gate"
    gate.mkdir()
    monkeypatch.setattr(sys.modules[__name__], "GATE", str(gate))
    two = {"num_cpus": cluster.cluster_resources()["CPU"] / 2}  # as many workers as fit
    found = population(tmp_path / "found", engine="ray", build=wild, resources=two)
    wait, cut = Cluster.wait, Cluster.cut

    def waiting(self: Cluster, timeout_s: float) -> list[Done]:
        if len(list(gate.iterdir())) >= 2:
            found.stop()
        return wait(self, timeout_s)

    def cutting(self: Cluster) -> list[Any]:
        told = cut(self)
        cluster.get(told)
        (gate / "open").touch()
        return told

    monkeypatch.setattr(Cluster, "wait", waiting)
    monkeypatch.setattr(Cluster, "cut", cutting)
    found.run()
    assert found.state == "stopped" and found.history == []
    again = population(tmp_path / "found")
    assert again._rounds.founded.parts.keys() == {(0, 0), (0, 1)}
    assert_same_bits(bits(again.run()), bits(local))


def test_a_cluster_smaller_than_asked_is_an_error_that_says_what_there_is(
    cluster: Any, tmp_path: Path
) -> None:
    found = population(tmp_path, engine="ray", resources={"num_gpus": 1})
    words = "asked for each: 1 CPU, 1 GPU\n  there in all:   [1-9]\\d* CPU, 0 GPU, on 1 node"
    with pytest.raises(NbtrainError, match=words):
        found.run()
    assert found.state == "failed"
    with pytest.raises(ValueError, match="num_tapes"):
        population(tmp_path, engine="ray", resources={"num_tapes": 1}).run()


def test_a_tuner_has_its_trials_restored_to_the_bits_of_runs_that_were_not_cut(
    cluster: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ASHA over two trials, each in its process; one is killed in its second epoch."""
    tune = imported("ray.tune")
    monkeypatch.setattr(sys.modules[__name__], "MARK", str(tmp_path / "mark"))
    monkeypatch.setattr(sys.modules[__name__], "AFTER", 20)
    trainable = nbtrain.tune_trainable(wild, epochs=EPOCHS, batch_size=3, warmup_epochs=0.5)
    config = {"lr": tune.grid_search([0.05, 0.02]), "accumulate": 2}
    asha = tune.schedulers.ASHAScheduler(max_t=EPOCHS, grace_period=EPOCHS)
    tuner = tune.Tuner(
        trainable,
        param_space=config,
        tune_config=tune.TuneConfig(metric="valid_loss", mode="min", scheduler=asha),
        run_config=tune.RunConfig(
            storage_path=str(tmp_path / "tune"),
            failure_config=tune.FailureConfig(max_failures=1),
            verbose=0,
        ),
    )
    results = tuner.fit()
    assert (tmp_path / "mark").exists() and not results.errors
    for result in results:
        number = int(result.metrics["trial_id"][-5:])
        whole = trial(tmp_path / str(number), number, result.config, build=wild)
        assert result.metrics["epoch"] == EPOCHS
        assert result.metrics["valid_loss"] == whole.reports[-1]["valid_loss"]
        with result.checkpoint.as_directory() as folder:
            assert_same_bits(bits_of(Path(folder)), bits_of(whole.folders[-1]))
