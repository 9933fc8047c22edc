"""How good a resume is: what of a kernel can change a bit, and what of that differs from before.

Order, augmentation and keys are functions (see `randomness`), so they are the same in every kernel.
What a kernel makes of them is not: sums are taken in another order by another GPU or number of
threads, and another library may draw other numbers from the same key. A checkpoint keeps a fingerprint
of the kernel that wrote it; the next one compares its own, and says one word::

    exact        nothing is known to differ that can change a bit
    same order   the same samples in the same order, with the same augmentation, under the same keys;
                 floating-point sums may be others, and masks drawn in another shape or on another GPU
    approximate  the code, or the generators that numbers are drawn from, may be others too

Not seen: what the user's own cells do between two batches, functions that were compiled by hand,
and randomness that a data set keeps to itself.
"""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

EXACT, SAME_ORDER, APPROXIMATE = "exact", "same order", "approximate"
WORDS = ("new", EXACT, SAME_ORDER, APPROXIMATE)
MAX_TOLD = 3  # of the differences, in one line

# Each is the code, or the generators, that samples are made with: recorded where it is imported.
LIBRARIES = ("numpy", "PIL", "cv2", "albumentations", "kornia", "torchvision", "timm")

# What differs here makes a resume approximate,
NUMBERS = {
    "device": "device",
    "recipe": "code of build",
    "default_dtype": "default dtype",
    "python": "python",
    **{name: name for name in LIBRARIES},
}
# and here, the same order. How many workers fetch is recorded too, and changes nothing.
SUMS = {
    "torch": "torch",
    "cuda": "CUDA",
    "cudnn": "cuDNN",
    "gpu": "GPU",
    "cpu": "CPU capability",
    "threads": "CPU threads",
    "micro_batch": "micro-batch",
    "precision": "precision",
    "channels_last": "channels last",
    "compiled": "compiled",
    "deterministic": "deterministic algorithms",
    "matmul": "float32 matmul",
    "conv": "float32 convolution",
    "rnn": "float32 RNN",
    "sdpa": "attention backends",
    "onednn": "oneDNN",
    "cudnn_enabled": "cuDNN in use",
    "cudnn_benchmark": "cuDNN benchmark",
    "cudnn_deterministic": "deterministic cuDNN",
    "cublas_workspace": "CUBLAS_WORKSPACE_CONFIG",
}


@dataclass(frozen=True)
class Grade:
    """How good a resume is, in a word, and what differs: "GPU: Tesla T4 -> Tesla P100"."""

    word: str
    differences: tuple[str, ...] = ()

    def __str__(self) -> str:
        """Say it in one line: "same order: CPU threads 2 -> 4"."""
        told = [each.replace(": ", " ", 1) for each in self.differences[:MAX_TOLD]]
        left = len(self.differences) - len(told)
        told += [f"and {left} more"] if left else []
        return f"{self.word}: {', '.join(told)}" if told else self.word

    def plain(self) -> dict[str, Any]:
        """Return both, as the list of stages keeps them."""
        return {"grade": self.word, "differences": list(self.differences)}

    def is_worse_than(self, word: str) -> bool:
        """Whether this promises less than another grade's word; "new" promises as much as "exact"."""
        return WORDS.index(self.word) > max(WORDS.index(word), 1)


NEW = Grade("new")
UNKNOWN = Grade(APPROXIMATE, ("nothing was recorded of the kernel before",))


def fingerprint(
    device: torch.device,
    model: nn.Module,
    *,
    micro_batch: int | None,
    num_workers: int,
    recipe: str,
    precision: str = "fp32",
    channels_last: bool = False,
) -> dict[str, Any]:
    """Return what can change a bit of a run in this kernel, as plain values.

    None stands for what has no say here: a CPU run does not depend on TF32, and a library that was
    not imported made nothing. Reading imports nothing and does not initialise CUDA. It takes about a
    millisecond; on a GPU the first one loads cuDNN, which the first convolution would else do.

    Args:
        device: Where the model is.
        model: Looked through for compiled modules.
        micro_batch: Samples in a forward and backward; None where each member has its own.
        num_workers: Processes that fetch; recorded only.
        recipe: Hash of the source of `build`; "" for a loop of the user's own.
        precision: What the forward pass is computed in.
        channels_last: Whether images lie so.
    """
    is_cuda = device.type == "cuda"
    found = {
        "device": device.type,
        "recipe": recipe,
        "default_dtype": str(torch.get_default_dtype()).removeprefix("torch."),
        "python": platform.python_version(),
        **{name: _version(name) for name in LIBRARIES},
        "torch": str(torch.__version__),
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "micro_batch": micro_batch,
        "num_workers": num_workers,
        "precision": precision,
        "channels_last": channels_last,
        "compiled": _is_compiled(model),
        "deterministic": _deterministic(),
        "onednn": torch.backends.mkldnn.enabled,
    }
    return found | _precisions(is_cuda) | {"sdpa": _attention(is_cuda)} | _cuda(device)


def compare(then: Mapping[str, Any] | None, now: Mapping[str, Any]) -> Grade:
    """Return the grade of going on in this kernel, from the fingerprints of the one before and of it.

    Another patch or build of torch is `same order`, another minor version `approximate`: the order
    itself comes from `torch.randperm`, and torch promises no numbers across releases and has changed
    them in minor ones (`exponential_` and `multinomial` from 2.6 to 2.7, pytorch#154031; see
    https://docs.pytorch.org/docs/stable/notes/randomness.html).

    Args:
        then: None where the checkpoint has none: it was written by an older nbtrain.
        now: Of this kernel.
    """
    if then is None:
        return UNKNOWN
    # On another kind of device every sum is another one, and each of them tells nothing more.
    names = (*NUMBERS, *SUMS) if then.get("device") == now["device"] else NUMBERS
    differing = [name for name in names if _differ(name, then, now)]
    approximate = [name for name in differing if name in NUMBERS or _is_other_release(name, then, now)]
    told = [_told(name, then, now) for name in dict.fromkeys([*approximate, *differing])]
    if not told:
        return Grade(EXACT)
    return Grade(APPROXIMATE if approximate else SAME_ORDER, tuple(told))


def _differ(name: str, then: Mapping[str, Any], now: Mapping[str, Any]) -> bool:
    if name not in then:  # nbtrain did not know of it yet
        return now[name] is not None
    return then[name] is not None and now[name] is not None and then[name] != now[name]


def _is_other_release(name: str, then: Mapping[str, Any], now: Mapping[str, Any]) -> bool:
    if name != "torch":
        return False
    return name not in then or then[name].split(".")[:2] != now[name].split(".")[:2]


def _told(name: str, then: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    old, new = _word(then.get(name, "not recorded")), _word(now[name])
    return f"{(NUMBERS | SUMS)[name]}: {old} -> {new}"


def _word(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return str(value) or "none"


def _version(name: str) -> str | None:
    version = getattr(sys.modules.get(name), "__version__", None)
    return None if version is None else str(version)


def _is_compiled(model: nn.Module) -> bool:
    """Whether any of a model is, by `torch.compile(model)` or by `model.compile()`."""
    compiler = sys.modules.get("torch._dynamo.eval_frame")  # which `torch.compile` imports
    wrapped = getattr(compiler, "OptimizedModule", ())
    return any(
        isinstance(module, wrapped) or module._compiled_call_impl is not None
        for module in model.modules()
    )


def _deterministic() -> str:
    if not torch.are_deterministic_algorithms_enabled():
        return "no"
    return "warned of" if torch.is_deterministic_algorithms_warn_only_enabled() else "yes"


def _precisions(is_cuda: bool) -> dict[str, str | None]:
    """Return in what precision float32 is computed; torch 2.8 has only the older switches.

    Newer ones raise at a reading of the older switches where a cell has set the new.
    """
    backends: Any = torch.backends
    place = backends.cudnn if is_cuda else backends.mkldnn
    if hasattr(backends.cudnn, "conv"):
        found = {
            "matmul": (backends.cuda if is_cuda else place).matmul.fp32_precision,
            "conv": place.conv.fp32_precision,
            "rnn": place.rnn.fp32_precision,
        }
        return {name: "ieee" if value == "none" else value for name, value in found.items()}
    matmul = {"highest": "ieee", "high": "tf32", "medium": "bf16"}[torch.get_float32_matmul_precision()]
    if not is_cuda:
        return {"matmul": "bf16" if matmul == "bf16" else "ieee", "conv": "ieee", "rnn": "ieee"}
    others = "tf32" if backends.cudnn.allow_tf32 else "ieee"
    return {"matmul": "ieee" if matmul == "ieee" else "tf32", "conv": others, "rnn": others}


def _attention(is_cuda: bool) -> str:
    cuda: Any = torch.backends.cuda
    enabled = {"flash": cuda.flash_sdp_enabled(), "math": cuda.math_sdp_enabled()}
    if is_cuda:
        enabled |= {"efficient": cuda.mem_efficient_sdp_enabled(), "cudnn": cuda.cudnn_sdp_enabled()}
    return "+".join(name for name, is_on in enabled.items() if is_on)


def _cuda(device: torch.device) -> dict[str, Any]:
    """Return what matters on a GPU only; of a GPU that nothing has used yet, no name."""
    names = ("cuda", "cudnn", "gpu", "cudnn_enabled", "cudnn_benchmark", "cudnn_deterministic")
    if device.type != "cuda":
        return dict.fromkeys([*names, "cublas_workspace"])
    is_used = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    cudnn: Any = torch.backends.cudnn
    return {
        "cuda": torch.version.cuda,
        "cudnn": cudnn.version(),
        "gpu": torch.cuda.get_device_name(device) if is_used else None,
        "cudnn_enabled": cudnn.enabled,
        "cudnn_benchmark": cudnn.benchmark,
        "cudnn_deterministic": cudnn.deterministic,
        "cublas_workspace": os.environ.get("CUBLAS_WORKSPACE_CONFIG", ""),
    }
