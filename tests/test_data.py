"""Order and augmentation are functions of the place: workers, cuts and batch sizes change nothing."""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    Sampler,
    SequentialSampler,
    Subset,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)

from nbtrain import randomness
from nbtrain.data import Loader, Order, Walk, default_workers, moved, source
from nbtrain.errors import DataError

SEED = 3
NUM_SAMPLES = 11

# Torch's advice; what more workers than cores give must be the same nevertheless.
pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")


class Noisy(Dataset[Any]):
    """Samples that say which they are, augmented with all three kinds of randomness."""

    def __init__(self, num_samples: int = NUM_SAMPLES) -> None:
        self.num_samples = num_samples
        self.read: list[int] = []

    def __len__(self) -> int:
        return self.num_samples

    def __getitem__(self, index: int) -> tuple[int, Tensor]:
        self.read.append(index)
        drawn = [torch.rand(()).item(), float(np.random.normal()), random.random()]
        return index, torch.tensor(drawn, dtype=torch.float64)


def make(
    data: Any, *, workers: int = 0, batch_size: int = 4, shuffle: bool = True, seed: int = SEED
) -> Loader:
    found = source(data, "train", shuffle=shuffle, collate=None)
    return Loader(found, (seed, "train"), Order(found, seed), batch_size, workers)


def drain(loader: Loader) -> Iterator[Any]:
    while (found := next(loader, None)) is not None:
        yield found[1]


def read(
    data: Any, place: tuple[int, int] = (0, 0), *, batch_size: int = 4, epochs: int = 2, **how: Any
) -> list[Any]:
    """Return the batches from a place on."""
    with closing(make(data, **how)) as loader:
        loader.start(*place, batch_size, epochs)
        return list(drain(loader))


def samples(batches: list[Any]) -> list[tuple[int, list[float]]]:
    return [(int(i), x.tolist()) for indices, xs in batches for i, x in zip(indices, xs, strict=True)]


# ---- order


def order(seed: int = SEED, data: Any = None) -> Order:
    found = source(Noisy(50) if data is None else data, "train", shuffle=True, collate=None)
    return Order(found, seed)


def test_an_epochs_order_is_a_permutation_and_a_function_of_seed_and_epoch() -> None:
    epochs = [list(map(int, order()(epoch))) for epoch in range(4)]
    assert all(sorted(epoch) == list(range(50)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4
    assert list(map(int, order(SEED + 1)(0))) not in epochs, "seed + 1 is not the next epoch"
    torch.manual_seed(99)
    mixed = order()
    for epoch in (2, 0, 3, 1, 0, 2):
        assert mixed(epoch).tolist() == epochs[epoch]  # type: ignore[union-attr]


def test_without_shuffling_the_order_is_that_of_the_data() -> None:
    found = source(Noisy(), "valid", shuffle=False, collate=None)
    assert list(Order(found, 0)(5)) == list(range(NUM_SAMPLES))


def test_making_an_order_leaves_the_global_generator_alone() -> None:
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    order()(0)
    assert torch.equal(torch.rand(3), expected)


def test_the_order_of_a_million_samples_is_made_once_an_epoch() -> None:
    made = order()
    assert made(0) is made(0)
    first = made(0)
    made(1)
    assert made(0) is first, "a batch before the epoch's end may be asked for after one behind it"


# ---- the same samples, whoever fetches them


def test_any_number_of_workers_gives_the_same_samples_over_the_end_of_an_epoch() -> None:
    expected = samples(read(Noisy()))
    assert sorted(i for i, _ in expected[:NUM_SAMPLES]) == list(range(NUM_SAMPLES))
    assert sorted(i for i, _ in expected[NUM_SAMPLES:]) == list(range(NUM_SAMPLES))
    drawn = [value for _, xs in expected for value in xs]
    assert len(set(drawn)) == len(drawn), "every sample of every epoch has a key of its own"
    for workers in (1, 2, 4):
        assert samples(read(Noisy(), workers=workers)) == expected


def test_another_seed_gives_other_samples() -> None:
    one, other = samples(read(Noisy())), samples(read(Noisy(), seed=SEED + 1))
    assert not {tuple(x) for _, x in one} & {tuple(x) for _, x in other}


def test_what_is_drawn_outside_between_two_batches_changes_nothing() -> None:
    expected = samples(read(Noisy()))
    loader = make(Noisy())
    loader.start(0, 0, 4, 2)
    found = []
    while (batch := next(loader, None)) is not None:
        found.append(batch[1])
        torch.manual_seed(0)
        random.seed(0)
        np.random.seed(0)
    assert samples(found) == expected


@pytest.mark.parametrize("workers", [0, 2])
def test_going_on_from_any_position_gives_the_rest(workers: int) -> None:
    expected = samples(read(Noisy()))
    with closing(make(Noisy(), workers=workers)) as loader:
        for seen in range(2 * NUM_SAMPLES + 1):
            loader.start(*divmod(seen, NUM_SAMPLES), 4, 2)
            assert samples(list(drain(loader))) == expected[seen:]


def test_going_on_reads_no_sample_that_is_skipped() -> None:
    data = Noisy()
    rest = samples(read(data, (1, 5)))
    assert data.read == [index for index, _ in rest]
    assert len(data.read) == NUM_SAMPLES - 5


def test_a_loader_that_stands_there_already_keeps_what_it_has_fetched() -> None:
    data = Noisy()
    loader = make(data)
    for place in ((0, 0), (0, 4), (0, 8)):
        loader.start(*place, 4, 2)
        batches = loader._batches
        next(loader)
        loader.start(place[0], min(place[1] + 4, NUM_SAMPLES), 4, 2)
        assert loader._batches is batches
    loader.turn()
    loader.start(1, 0, 4, 2)
    assert loader._batches is batches
    loader.start(1, 4, 4, 2)
    assert loader._batches is not batches


@pytest.mark.parametrize("workers", [0, 2])
def test_what_is_put_back_comes_again_and_nothing_is_read_twice(workers: int) -> None:
    data = Noisy()
    with closing(make(data, workers=workers)) as loader:
        loader.start(0, 4, 4, 2)
        given = [next(loader), next(loader)]
        loader.put_back(given)
        loader.start(0, 4, 4, 2)
        assert next(loader)[1] is given[0][1], "it stands where they came from"
        loader.start(0, 8, 4, 2)
        assert next(loader)[1] is given[1][1]
        loader.turn()
        loader.start(1, 0, 4, 2)
        rest = samples(list(drain(loader)))
    assert rest == samples(read(Noisy(), (1, 0)))
    assert len(data.read) == (0 if workers else 7 + NUM_SAMPLES)


@pytest.mark.parametrize("workers", [0, 2])
def test_the_batch_size_may_change_in_the_middle_of_an_epoch(workers: int) -> None:
    expected = samples(read(Noisy(), epochs=1))
    found: list[Any] = []
    with closing(make(Noisy(), workers=workers)) as loader:
        position = 0
        for batch_size in (4, 2, 1, 3, 9):
            loader.start(0, position, batch_size, 1)
            num_samples, batch = next(loader)
            assert num_samples == len(batch[0]) == min(batch_size, NUM_SAMPLES - position)
            found.append(batch)
            position += num_samples
    assert samples(found) == expected


@pytest.mark.parametrize(("drop_last", "sizes"), [(False, [4, 4, 3] * 2), (True, [4, 4] * 2)])
def test_a_last_batch_that_is_not_full_is_left_out_only_if_asked(
    drop_last: bool, sizes: list[int]
) -> None:
    taken_over = DataLoader(Noisy(), batch_size=4, shuffle=True, drop_last=drop_last)
    found = read(taken_over)
    assert [len(indices) for indices, _ in found] == sizes
    whole = samples(read(Noisy(), epochs=1))
    assert samples(found)[: sum(sizes) // 2] == whole[: sum(sizes) // 2]


def test_dropping_the_last_counts_from_where_the_batch_size_changed() -> None:
    walk = Walk(order(data=Noisy()), 3, True, position=4, epochs=1)
    assert [(start, len(indices)) for _, start, indices in walk] == [(4, 3), (7, 3)]


def test_a_walk_without_end_goes_on_over_epochs() -> None:
    walk = iter(Walk(order(data=Noisy()), 8, False))
    places = [next(walk)[:2] for _ in range(7)]
    assert places == [(0, 0), (0, 8), (1, 0), (1, 8), (2, 0), (2, 8), (3, 0)]


def test_the_first_batch_of_a_resumed_imagenet_epoch_is_there_at_once() -> None:
    length, batches = 1_281_167, 320_000

    class Indices(Dataset[int]):
        def __len__(self) -> int:
            return length

        def __getitem__(self, index: int) -> int:
            return index

    loader = make(Indices())
    began = time.perf_counter()
    loader.start(7, 4 * batches, 4, None)
    _, batch = next(loader)
    took_s = time.perf_counter() - began
    print(f"batch {batches} of {length} samples after {1000 * took_s:.0f} ms")
    assert batch.tolist() == loader._walk.order(7)[4 * batches : 4 * batches + 4].tolist()  # type: ignore[union-attr]
    assert took_s < 1.0


# ---- workers


class Pids(Dataset[int]):
    def __len__(self) -> int:
        return NUM_SAMPLES

    def __getitem__(self, index: int) -> int:
        return os.getpid()


def test_workers_are_forked_once_for_all_epochs_and_restarts() -> None:
    with closing(make(Pids(), workers=2)) as loader:
        pids = []
        for epoch, position, batch_size in ((0, 0, 2), (3, 5, 2), (0, 2, 4), (8, 0, 1)):
            loader.start(epoch, position, batch_size, epoch + 3)
            pids.append({pid for batch in drain(loader) for pid in batch.tolist()})
    assert len(pids[0]) == 2
    assert os.getpid() not in pids[0]
    assert all(some == pids[0] for some in pids)


def test_a_workers_death_is_told_where_its_batch_is_awaited_and_nowhere_else() -> None:
    """A shutdown kills the workers while the loop saves; an error there would lose the save."""
    loader = make(Pids(), workers=1)
    loader.start(0, 0, 4, None)
    next(loader)
    worker = loader._torch._iterator._workers[0]
    worker.kill()
    os.waitid(os.P_PID, worker.pid, os.WEXITED | os.WNOWAIT)  # here torch's handler would raise
    with pytest.raises(RuntimeError, match="exited unexpectedly"):
        list(drain(loader))  # what was fetched before comes first
    loader.close()


def test_after_closing_a_start_forks_new_workers() -> None:
    expected = samples(read(Noisy(), epochs=1))
    with closing(make(Noisy(), workers=2)) as loader:
        for _ in range(2):
            loader.start(0, 0, 4, 1)
            assert samples(list(drain(loader))) == expected
            loader.close()


def test_workers_can_be_started_in_a_thread_that_is_not_the_main_one() -> None:
    found: list[Any] = []
    thread = threading.Thread(target=lambda: found.extend(read(Noisy(), workers=2)))
    thread.start()
    thread.join(30)
    assert not thread.is_alive()
    assert samples(found) == samples(read(Noisy()))


def test_a_class_of_a_notebook_cell_works_with_workers() -> None:
    secret = object()  # no pickle can carry it, nor the classes made here

    class Local(Dataset[int]):
        held = secret

        def __len__(self) -> int:
            return NUM_SAMPLES

        def __getitem__(self, index: int) -> int:
            assert self.held is secret
            return index

    def collate(found: list[int]) -> list[int]:
        return found

    there = source(Local(), "train", shuffle=False, collate=collate)
    with closing(Loader(there, (0, "train"), Order(there, 0), 4, 2)) as loader:
        loader.start(0, 0, 4, 1)
        assert [i for batch in drain(loader) for i in batch] == list(range(NUM_SAMPLES))


class Signals(Dataset[Any]):
    """How a worker stands to signals, and what its user's own beginning has set."""

    began = -1

    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: int) -> tuple[bool, bool, int]:
        ignored = signal.getsignal(signal.SIGINT) == signal.SIG_IGN
        return ignored, signal.getsignal(signal.SIGTERM) == signal.SIG_DFL, Signals.began


def begin(number: int) -> None:
    Signals.began = 40 + number


def test_a_worker_leaves_interrupts_to_the_loop_and_begins_as_its_user_says() -> None:
    def note(number: int, frame: object) -> None:
        raise AssertionError

    before = signal.signal(signal.SIGTERM, note)  # as the loop has set one while it runs
    try:
        given = DataLoader(Signals(), num_workers=2, worker_init_fn=begin)
        found = read(given, workers=2, batch_size=1, epochs=1)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert [[value.item() for value in batch] for batch in found] == [
        [True, True, 40],
        [True, True, 41],
    ]


class Sums(Dataset[Tensor]):
    """A reduction that is big enough for torch to split it among its threads."""

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> Tensor:
        return torch.rand(1_000_003).sum()


@pytest.fixture
def _two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("_two_threads")
def test_a_big_reduction_has_the_same_bits_in_the_loop_and_in_a_worker() -> None:
    loop = read(Sums(), epochs=1)
    assert torch.get_num_threads() == 2, "the model's own computations keep their threads"
    worker = read(Sums(), epochs=1, workers=1)
    assert torch.equal(torch.cat(loop), torch.cat(worker))


class Broken(Noisy):
    broken = 7

    def __getitem__(self, index: int) -> tuple[int, Tensor]:
        if index == self.broken:
            raise OSError("truncated image")
        return super().__getitem__(index)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_sample_that_raises_is_named_and_the_loader_goes_on_after_it(workers: int) -> None:
    whole = samples(read(Noisy(), epochs=1, batch_size=1))
    at = [index for index, _ in whole].index(Broken.broken)
    with closing(make(Broken(), workers=workers)) as loader:
        loader.start(0, 0, 1, 1)
        before = [next(loader)[1] for _ in range(at)]
        message = rf"OSError: truncated image\n  at index 7 \(epoch 0, position {at}\)"
        for _ in range(2):  # and again, when it has not been mended
            with pytest.raises(DataError, match=message) as caught:
                next(loader)
            assert "__getitem__" in str(caught.value.__cause__), "the data set's own traceback"
            loader.start(0, at, 1, 1)
        loader.start(0, at + 1, 1, 1)
        after = list(drain(loader))
    assert samples(before) == whole[:at]
    assert samples(after) == whole[at + 1 :]


def test_a_batch_that_cannot_be_collated_is_named() -> None:
    class Ragged(Noisy):
        def __getitem__(self, index: int) -> Any:
            return torch.zeros(index)

    loader = make(Ragged())
    loader.start(0, 0, 4, 1)
    with pytest.raises(
        DataError, match=r"RuntimeError: .*\n  at collating indices \[\d+, \d+, \d+, \d+\]"
    ):
        next(loader)


# ---- taking over what the user has


def test_a_data_loader_is_taken_over_with_all_that_it_says() -> None:
    def collate(found: list[Any]) -> list[Any]:
        return found

    sampler = WeightedRandomSampler([1.0] * NUM_SAMPLES, NUM_SAMPLES)
    data = Noisy()
    given = DataLoader(
        data,
        batch_size=5,
        sampler=sampler,
        drop_last=True,
        collate_fn=collate,
        num_workers=2,
        pin_memory=True,
        prefetch_factor=7,
    )
    found = source(given, "train", shuffle=True, collate=None)
    assert found.dataset is data
    assert found.sampler is sampler
    assert found.collate is collate
    assert (found.batch_size, found.drop_last, found.num_workers) == (5, True, 2)
    assert (found.pin_memory, found.prefetch_factor) == (True, 7)
    with closing(Loader(found, (0, "train"), Order(found, 0), 5, 2)) as loader:
        assert loader._torch.prefetch_factor == 7
        loader.start(0, 0, 5, 1)
        assert type(next(loader)[1]) is list


def test_a_data_loaders_shuffling_is_kept_or_left_out_as_it_says() -> None:
    for shuffle in (False, True):
        found = source(DataLoader(Noisy(), shuffle=shuffle), "train", shuffle=not shuffle, collate=None)
        assert found.shuffle is shuffle
        assert found.sampler is None
    assert source(Noisy(), "train", shuffle=True, collate=None).shuffle
    for replacement in (False, True):
        few = DataLoader(Noisy(), sampler=RandomSampler(Noisy(), replacement, 5))
        assert len(order(data=few)(0)) == order(data=few).length(0) == 5


def test_a_collate_of_the_task_goes_before_the_data_loaders() -> None:
    assert source(DataLoader(Noisy()), "train", shuffle=True, collate=max).collate is max


class Own(Sampler[int]):
    """A sampler that draws from torch's global generator, and knows of epochs."""

    epoch = -1

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        return iter([self.epoch, *torch.randperm(5).tolist()])


WEIGHTS = [float(i + 1) for i in range(NUM_SAMPLES)]


@pytest.mark.parametrize(
    "sampler",
    [
        WeightedRandomSampler(WEIGHTS, 20),
        WeightedRandomSampler(WEIGHTS, 20, generator=torch.Generator().manual_seed(5)),
        SubsetRandomSampler([1, 4, 5, 9], generator=torch.Generator()),
        RandomSampler(WEIGHTS, replacement=True, num_samples=9),
        Own(),
    ],
    ids=["weighted", "weighted with generator", "subset", "with replacement", "own"],
)
def test_a_random_sampler_is_a_function_of_seed_and_epoch_too(sampler: Any) -> None:
    data = DataLoader(Noisy(), sampler=sampler)
    own = getattr(sampler, "generator", None)
    state = own.get_state() if own is not None else None
    expected = {epoch: list(order(data=data)(epoch)) for epoch in range(3)}
    assert len({tuple(indices) for indices in expected.values()}) == 3
    torch.rand(4)
    again = order(data=data)
    for epoch in (2, 1, 0, 2):
        assert list(again(epoch)) == expected[epoch]
        assert again.length(epoch) == len(expected[epoch])
    assert list(order(SEED + 1, data)(0)) != expected[0]
    assert getattr(sampler, "generator", None) is own
    assert state is None or torch.equal(own.get_state(), state), "the user's generator is untouched"


def test_a_sample_that_comes_twice_in_an_epoch_is_augmented_anew() -> None:
    found = samples(read(DataLoader(Noisy(), sampler=[6, 6, 2, 6])))
    assert [index for index, _ in found] == [6, 6, 2, 6] * 2
    assert len({tuple(drawn) for _, drawn in found}) == 8


def test_a_sampler_learns_the_epoch() -> None:
    taken = order(data=DataLoader(Noisy(), sampler=Own()))
    assert [taken(epoch)[0] for epoch in range(3)] == [0, 1, 2]


class Stream(IterableDataset[int]):
    def __iter__(self) -> Iterator[int]:
        return iter(range(9))


class NoLength:
    def __getitem__(self, index: int) -> int:
        return index


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (Stream(), "a Stream has no length, and a step must know.*Give it a __len__: how many samples"),
        (DataLoader(Stream()), "a Stream has no length"),
        (iter([1, 2]), "a list_iterator has no positions"),
        (3, "a int has no positions"),
        (DataLoader(Noisy(), batch_size=None), "the DataLoader has batch_size=None.*Give the data set"),
        (NoLength(), "a NoLength has no length. Give it a __len__"),
        ([], "the data set is empty. Check the path"),
        (Subset(Noisy(), []), "the data set is empty. Check the path"),
    ],
)
def test_what_cannot_be_resumed_is_refused_with_a_way_out(data: Any, message: str) -> None:
    with pytest.raises(DataError, match=f"(?s)^valid: .*{message}"):
        source(data, "valid", shuffle=False, collate=None)


class Buckets(BatchSampler):
    """Batches of several sizes, shuffled by a generator of its own."""

    def __init__(self, generator: torch.Generator | None = None) -> None:
        super().__init__(RandomSampler(range(NUM_SAMPLES), generator=generator), 4, False)

    def __iter__(self) -> Iterator[list[int]]:
        indices = list(self.sampler)
        yield from (indices[a:b] for a, b in ((0, 2), (2, 7), (7, 8), (8, 11)))


@pytest.mark.parametrize("generator", [None, torch.Generator().manual_seed(5)])
def test_a_batch_sampler_makes_the_batches_as_a_function_of_seed_and_epoch(generator: Any) -> None:
    data = DataLoader(Noisy(), batch_sampler=Buckets(generator))
    expected = read(data)
    assert [len(indices) for indices, _ in expected] == [2, 5, 1, 3] * 2
    firsts = [[i for i, _ in samples(expected[:4])], [i for i, _ in samples(expected[4:])]]
    assert sorted(firsts[0]) == sorted(firsts[1]) == list(range(NUM_SAMPLES)) and firsts[0] != firsts[1]
    torch.rand(3)
    again = DataLoader(Noisy(), batch_sampler=Buckets(generator))
    for seen, place in ((1, (0, 2)), (3, (0, 8)), (4, (1, 0)), (6, (1, 7))):
        for workers in (0, 2):
            assert samples(read(again, place, workers=workers)) == samples(expected[seen:])
    if generator is not None:
        assert again.batch_sampler.sampler.generator is generator  # type: ignore[union-attr]


def test_where_there_is_less_room_a_batch_comes_in_even_pieces() -> None:
    expected = samples(read(Noisy(), epochs=1))
    for data, sizes in (
        (Noisy(), [2, 2, 2, 2, 3]),
        (DataLoader(Noisy(), batch_sampler=Buckets()), [2, 3, 2, 1, 3]),
    ):
        with closing(make(data)) as loader:
            loader.start(0, 0, 4, 1, 3)
            found = list(drain(loader))
        assert [len(indices) for indices, _ in found] == sizes
        assert samples(found) == (
            expected if data.__class__ is Noisy else samples(read(data, epochs=1))
        )


class Several(Noisy):
    """A data set that reads several samples at once, and only so."""

    __getitem__ = Dataset.__getitem__

    def __getitems__(self, indices: list[int]) -> list[Any]:
        return [Noisy.__getitem__(self, index) for index in indices]


def test_a_data_set_that_reads_several_at_once_gives_each_sample_its_own_key() -> None:
    expected = samples(read(Noisy()))
    assert samples(read(Several())) == expected
    assert samples(read(Several(), batch_size=3, workers=2)) == expected
    assert samples(read(Subset(Noisy(), range(NUM_SAMPLES)))) == expected, "it has both"


def test_a_list_is_a_data_set() -> None:
    assert [batch.tolist() for batch in read([5, 6, 7], shuffle=False, epochs=1)] == [[5, 6, 7]]
    given = DataLoader([5, 6, 7], sampler=SequentialSampler([5, 6, 7]))
    assert not source(given, "train", shuffle=True, collate=None).shuffle


def test_tensors_in_memory_need_no_workers() -> None:
    assert default_workers(TensorDataset(torch.zeros(3))) == 0
    assert 1 <= default_workers(Noisy()) <= 4


def test_tensors_in_memory_draw_nothing_and_need_no_key_but_what_is_made_of_them_does(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Moved(TensorDataset):
        def __getitem__(self, index: int) -> Any:
            return super().__getitem__(index)[0] + torch.rand(())

    def noisy(samples: list[Any]) -> Tensor:
        return torch.stack([x for (x,) in samples]) + torch.rand(())

    tensors = torch.arange(11.0)
    assert torch.equal(
        torch.cat(read(Moved(tensors), batch_size=4)), torch.cat(read(Moved(tensors), batch_size=3))
    )
    plain = TensorDataset(tensors)
    mixed = [DataLoader(plain, 4, shuffle=True, collate_fn=noisy) for _ in range(2)]
    assert all(map(torch.equal, *map(read, mixed)))

    monkeypatch.setattr(randomness, "seed", lambda *words: pytest.fail(f"a key of {words}"))
    read(plain, batch_size=4, epochs=1)


@pytest.mark.parametrize("workers", [0, 2])
def test_tensors_in_memory_are_gathered_at_once_to_what_torch_collates(workers: int) -> None:
    class Unknown(TensorDataset):
        """Read sample by sample, because it is not known to draw nothing."""

    def taken(kind: type[TensorDataset]) -> list[Any]:
        made = torch.Generator().manual_seed(0)
        images = torch.randn(12, 2, 3, 5, generator=made).permute(0, 3, 1, 2)  # as numpy has images
        whole = kind(images, torch.arange(12), images.bfloat16(), torch.arange(12.0).double())
        half = Subset(Subset(whole, torch.randperm(12, generator=made)), [11, 0, 3, 4, 6, 7, 8])
        return read(half, workers=workers, batch_size=3, epochs=2)

    gathered, collated = taken(TensorDataset), taken(Unknown)
    assert len(gathered) == len(collated) == 6
    for one, other in zip(gathered, collated, strict=True):
        assert type(one) is type(other) is list
        assert [t.dtype for t in one] == [t.dtype for t in other]
        assert all(map(torch.equal, one, other))
        assert [t.stride() for t in one] == [t.stride() for t in other]


@pytest.mark.parametrize(
    "indices", [torch.tensor([[3], [1]]), [[0, 1], [2, 3]], [slice(2), slice(3, 5)]]
)
def test_an_index_that_is_no_number_reads_what_torch_reads(indices: Any) -> None:
    images = torch.arange(20.0).reshape(10, 2)
    (found,) = read(Subset(TensorDataset(images), indices), batch_size=2, epochs=1, shuffle=False)
    (wanted,) = DataLoader(Subset(TensorDataset(images), indices), 2)
    assert torch.equal(found[0], wanted[0])


def test_moving_keeps_the_shape_of_a_batch() -> None:
    class Pair(NamedTuple):
        x: Tensor
        y: Any

    batch = {"a": [torch.ones(1), ("text", 3)], "b": Pair(torch.ones(2), None)}
    assert moved(batch, torch.device("cpu")) is batch
    there = moved(batch, torch.device("meta"))
    assert there["a"][0].is_meta
    assert there["a"][1] == ("text", 3)
    assert type(there["b"]) is Pair
    assert there["b"][0].is_meta and there["b"][1] is None
