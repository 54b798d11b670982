"""Modes: what a pass runs under - eval or train mode, random states, pinned numerics - put back afterwards."""

from __future__ import annotations

import os
import random
import threading
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from featstore.errors import ModelError
from featstore.models.names import Precision

INITIAL_SEED = 0
"""Seed of every initialisation that stands in for weights: the same on each rank and run."""

one_pass = threading.RLock()
"""Held while flags or settings that others share are set for one pass; others wait for theirs."""

# A fork waits for the pass of another thread: a child would inherit its lock, which nobody there gives back, and its
# flags and settings, which nobody there puts back.
if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=one_pass.acquire, after_in_parent=one_pass.release, after_in_child=one_pass.release)


@contextmanager
def mode_of(module: nn.Module, *, training: bool) -> Iterator[None]:
    """Puts `module` and all below into one mode for the block, and every flag back as it was, also after an error.

    Sets the flags alone: a person's own `train()` may do more, which could not be undone.
    """
    before = [(part, part.training) for part in module.modules()]
    try:
        for part, _ in before:
            part.training = training
        yield
    finally:
        for part, flag in before:
            part.training = flag


@contextmanager
def eval_mode(module: nn.Module) -> Iterator[None]:
    """`mode_of` for one pass in eval mode; one such pass at a time in a process, others wait.

    Models share modules, and flags belong to modules: a pass that ends would switch the layers of another thread's
    pass back to train mode. Training loops keep `mode_of`: the stages that they train are copies of their own, and
    nobody should wait for an epoch. Not around a `yield`, for the same reason.
    """
    with one_pass, mode_of(module, training=False):
        yield


@contextmanager
def random_states_kept() -> Iterator[None]:
    """Leaves the global random states of Python, numpy and torch after the block as they were before it."""
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002 - the global state is what is kept
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []  # type: ignore[no-untyped-call]
    with torch.random.fork_rng(devices):
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)  # noqa: NPY002


def random_states() -> tuple[Any, ...]:
    """The global random states on the CPU, as a value to compare: it changes when a number is drawn."""
    _, numbers, *places = np.random.get_state()  # noqa: NPY002
    return random.getstate(), np.asarray(numbers).tobytes(), places, torch.get_rng_state().numpy().tobytes()


@contextmanager
def gradients_on() -> Iterator[None]:
    """Gradients for the block whatever the caller has switched off, and tensors that can be trained.

    A forward may ask whether gradients are on (checkpointing does), and a tensor that it makes inside
    ``torch.inference_mode`` can never take part in training.
    """
    with torch.inference_mode(False), torch.enable_grad():
        yield


def check_trainable(parameters: Iterable[nn.Parameter], name: str) -> None:
    """Raises ModelError for parameters that were made inside ``torch.inference_mode``: they are for inference only."""
    if any(parameter.is_inference() for parameter in parameters):
        raise ModelError(
            f"{name} has parameters that were made inside torch.inference_mode, which torch can't train. Make the "
            "model, its head and the learner outside of it."
        )


@contextmanager
def seeded() -> Iterator[None]:
    """A fixed seed for the block; the caller's random state is put back."""
    with random_states_kept():
        random.seed(INITIAL_SEED)
        np.random.seed(INITIAL_SEED)  # noqa: NPY002 - a person's file may draw from it
        torch.default_generator.manual_seed(INITIAL_SEED)
        if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
            torch.cuda.manual_seed_all(INITIAL_SEED)
        yield


class WithoutValues(TorchFunctionMode):
    """Gives tensors that are only made, to be filled later, no memory.

    What constructors compute with (a table of widths, positions in a window) is computed, as `torch.device("meta")`
    would not.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = dict(kwargs or {})
        if func in (torch.empty, torch.ones, torch.zeros) and given.get("device") is None:
            given["device"] = "meta"
        return func(*args, **given)


@contextmanager
def numerics(precision: Precision, device: torch.device) -> Iterator[None]:
    """Pins what float32 arithmetic means for the block, and puts every setting back, also after an error."""
    wanted = "tf32" if precision == "tf32" and device.type == "cuda" else "ieee"
    cuda, cudnn, mkldnn = torch.backends.cuda.matmul, torch.backends.cudnn, torch.backends.mkldnn
    with ExitStack() as stack:

        def pin(owner: Any, name: str, value: Any) -> None:
            before = getattr(owner, name)
            if before != value:  # a child that follows its parent goes on following it
                stack.callback(setattr, owner, name, before)
                setattr(owner, name, value)

        stack.enter_context(torch.autocast(device.type, enabled=False))
        older, older_wanted = _older_switch(), "high" if wanted == "tf32" else "highest"
        if older not in {None, older_wanted}:
            for owner in (cuda, mkldnn.matmul):  # type: ignore[attr-defined] # the older switch sets these too
                stack.callback(setattr, owner, "fp32_precision", owner.fp32_precision)
            stack.callback(torch.set_float32_matmul_precision, older)
            torch.set_float32_matmul_precision(older_wanted)
        pin(torch.backends, "fp32_precision", wanted)
        for owner in (cudnn, cuda, cudnn.conv, cudnn.rnn):  # type: ignore[attr-defined]
            pin(owner, "fp32_precision", wanted)
        for owner in (mkldnn.matmul, mkldnn.conv, mkldnn.rnn) if wanted == "ieee" else ():  # type: ignore[attr-defined]
            pin(owner, "fp32_precision", wanted)
        pin(cudnn, "benchmark", False)  # the fastest algorithm may change from run to run
        pin(cudnn, "deterministic", True)
        pin(cuda, "allow_fp16_accumulation", False)
        for name in ("allow_fp16_reduced_precision_reduction", "allow_bf16_reduced_precision_reduction"):
            stack.callback(setattr, cuda, name, (getattr(cuda, name), getattr(cuda, f"{name}_split_k")))
            setattr(cuda, name, False)
        yield


def _older_switch() -> str | None:
    """Torch's older switch of the same thing, or None where the caller has left it for the newer ones.

    torch refuses to read the older one once they contradict each other.
    """
    try:
        return torch.get_float32_matmul_precision()
    except RuntimeError:
        return None
