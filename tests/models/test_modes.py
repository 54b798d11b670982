from __future__ import annotations

import os
import signal
import threading
import time
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.torch_settings import settings
from torch import nn

from featstore.models.modes import eval_mode, mode_of, numerics
from featstore.models.names import PRECISIONS, Precision

BACKENDS = torch.backends


def test_mode_of_puts_each_flag_back_after_an_error() -> None:
    module = nn.Sequential(nn.Dropout(), nn.BatchNorm2d(3).eval())
    with pytest.raises(ValueError, match="4D"), mode_of(module, training=True):
        module(torch.zeros(1, 5))  # batch norm wants maps
    assert [part.training for part in module.modules()] == [True, True, False]


def test_a_fork_waits_for_the_pass_of_another_thread() -> None:
    """Else the child has its lock for good, and its flags."""
    module, is_running = nn.ReLU(), threading.Event()

    def run() -> None:
        with eval_mode(module):
            is_running.set()
            time.sleep(0.2)

    thread = threading.Thread(target=run)
    thread.start()
    is_running.wait()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Python warns of forks beside threads: the point here
        child = os.fork()
    if not child:
        signal.alarm(10)  # ends a child that hangs
        flags = [module.training]

        def run_there() -> None:
            with eval_mode(module):
                flags.append(module.training)

        try:
            threading.Thread(target=run_there).start()
            run_there()
        finally:
            while len(flags) < 3:
                time.sleep(0.01)
            os._exit(0 if flags == [True, False, False] else 1)
    thread.join()
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    with eval_mode(module):  # and so may the parent
        pass


# ------------------------------------------------------------------------------------------------------------ numerics


def set_both() -> None:
    torch.set_float32_matmul_precision("high")
    BACKENDS.cuda.matmul.fp32_precision = "ieee"


CHOICES: dict[str, Callable[[], None]] = {
    "nothing": lambda: None,
    "older high": lambda: torch.set_float32_matmul_precision("high"),
    "older medium": lambda: torch.set_float32_matmul_precision("medium"),
    "older cuda": lambda: setattr(BACKENDS.cuda.matmul, "allow_tf32", True),
    "older cudnn": lambda: setattr(BACKENDS.cudnn, "allow_tf32", False),
    "all tf32": lambda: setattr(BACKENDS, "fp32_precision", "tf32"),
    "all ieee": lambda: setattr(BACKENDS, "fp32_precision", "ieee"),
    "all bf16": lambda: setattr(BACKENDS, "fp32_precision", "bf16"),
    "cuda": lambda: setattr(BACKENDS.cudnn, "fp32_precision", "tf32"),
    "cuda matmul": lambda: setattr(BACKENDS.cuda.matmul, "fp32_precision", "tf32"),
    "cuda conv": lambda: setattr(BACKENDS.cudnn.conv, "fp32_precision", "ieee"),  # type: ignore[attr-defined]
    "cpu matmul": lambda: setattr(BACKENDS.mkldnn.matmul, "fp32_precision", "bf16"),  # type: ignore[attr-defined]
    "older and newer": set_both,
    "fast": lambda: setattr(BACKENDS.cudnn, "benchmark", True),
    "sums": lambda: setattr(BACKENDS.cuda.matmul, "allow_fp16_reduced_precision_reduction", (False, False)),
}


@pytest.fixture
def restored() -> Any:
    """Puts torch's own defaults back; a test may leave settings that no public function can undo exactly."""
    defaults = settings()
    yield
    BACKENDS.fp32_precision = "none"  # type: ignore[attr-defined]
    BACKENDS.cudnn.fp32_precision = "none"
    torch.set_float32_matmul_precision("highest")
    BACKENDS.cudnn.allow_tf32 = True
    owners: list[tuple[Any, str]] = [
        (BACKENDS.cuda.matmul, "cuda.matmul"),
        (BACKENDS.mkldnn.matmul, "mkldnn.matmul"),  # type: ignore[attr-defined]
        (BACKENDS.cudnn.conv, "cuda.conv"),  # type: ignore[attr-defined]
        (BACKENDS.cudnn.rnn, "cuda.rnn"),
    ]
    for owner, name in owners:
        owner.fp32_precision = defaults[name]
    BACKENDS.cudnn.benchmark = defaults["benchmark"]
    BACKENDS.cuda.matmul.allow_fp16_reduced_precision_reduction = (defaults["fp16 sums"], defaults["fp16 sums, split"])
    assert settings() == defaults


@pytest.mark.usefixtures("restored")
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("choice", CHOICES)
def test_arithmetic_is_pinned_for_the_pass_and_each_setting_comes_back(choice: str, precision: Precision) -> None:
    CHOICES[choice]()
    before = settings()
    with numerics(precision, torch.device("cpu")):
        within = settings()
    assert settings() == before
    kinds = ("cuda.matmul", "cuda.conv", "cuda.rnn", "mkldnn.matmul", "mkldnn.conv", "mkldnn.rnn")
    assert {within[kind] for kind in kinds} == {"ieee"}
    assert (within["benchmark"], within["deterministic"], within["fp16 sums"]) == (False, True, False)


@pytest.mark.usefixtures("restored")
def test_settings_that_followed_their_parent_go_on_following_it() -> None:
    BACKENDS.fp32_precision = "tf32"  # type: ignore[attr-defined]
    with numerics("fp32", torch.device("cpu")):
        pass
    BACKENDS.fp32_precision = "ieee"  # type: ignore[attr-defined]
    assert settings()["cuda.matmul"] == settings()["mkldnn.conv"] == "ieee"


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_tf32_is_allowed_on_a_gpu_for_tf32_alone() -> None:
    for precision in PRECISIONS:
        with numerics(precision, torch.device("cuda")):
            expected = "tf32" if precision == "tf32" else "ieee"
            assert {settings()[kind] for kind in ("cuda.matmul", "cuda.conv", "cuda.rnn")} == {expected}
