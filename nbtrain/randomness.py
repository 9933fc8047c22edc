"""Randomness as a function: every generator is seeded from a key, so no stream has to be saved.

A key is a hash of words that say where in the run we are, for example::

    (seed, "build")                     first weights
    (seed, "order", epoch)              the permutation of an epoch
    (seed, "train", epoch, position)    the augmentation of one sample
    (seed, "step", step, micro_step)    dropout in one forward and backward

The invariant: equal words give equal random numbers, in any process, with any number of workers, and
whatever ran before. Keys are hashed, never added: with `seed + epoch`, epoch 1 of seed 0 would be
epoch 0 of seed 1.
"""

from __future__ import annotations

import os
import random
from hashlib import blake2b

import numpy as np
import torch

Word = int | str

WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"


def key(*words: Word) -> int:
    """Hash words to 64 bits, the same in every process and on every machine."""
    return int.from_bytes(blake2b(repr(words).encode(), digest_size=8).digest(), "little")


def seed(*words: Word) -> None:
    """Seed python's, numpy's, and torch's generators, on the CPU and every CUDA device, from a key.

    Costs about 8 microseconds. `torch.manual_seed` is avoided because it alone takes ten times as
    long while CUDA is not yet initialised: it formats a stack trace.
    """
    bits = key(*words)
    random.seed(bits)
    # 32 bits: a list of words takes ten times as long. Some samples will share numpy's noise.
    np.random.seed(bits & 0xFFFFFFFF)
    torch.default_generator.manual_seed(bits)
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        for generator in torch.cuda.default_generators:
            generator.manual_seed(bits)


def generator(*words: Word) -> torch.Generator:
    """Return a torch generator of its own, seeded from a key."""
    return torch.Generator().manual_seed(key(*words))


def deterministic() -> None:
    """Let each operation of torch give the same bits every time, or raise a RuntimeError.

    It holds for the process, from here on. cuBLAS of a torch before 2.10 also needs a workspace that
    is set in the environment before CUDA begins; a newer torch gives it one itself (pytorch#161749),
    and is left alone: another workspace may mean other sums.

    Raises:
        ValueError: it is too late for that workspace; nothing was changed.
    """
    if torch.__version__ < "2.10" and WORKSPACE not in os.environ:
        if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
            raise ValueError(
                f"deterministic=True comes too late: CUDA is in use, torch {torch.__version__} needs "
                f"{WORKSPACE} before that, and it is not set. "
                "Restart the kernel, and open the session before anything touches the GPU."
            )
        os.environ[WORKSPACE] = ":4096:8"
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.benchmark = False


def sample_rng() -> np.random.Generator:
    """Return a numpy generator for the sample that is being read: call it in `__getitem__`.

    It is seeded from python's `random`, which is keyed for each sample: the same sample gets the same
    numbers, whatever the worker and whatever was read before. Each call within a sample goes on, so two
    transforms have numbers of their own. Do not keep it: one that is kept in `__init__` is a stream
    again. Outside a session it is as random as `random` is.

    For torch use its module-level functions, which are keyed too; where an own generator is needed,
    `torch.Generator().manual_seed(int(sample_rng().integers(2**63)))`.
    """
    return np.random.default_rng(random.getrandbits(128))
