"""torch's global settings of arithmetic, all of them, as a value to compare."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

BACKENDS = torch.backends


def settings() -> dict[str, Any]:
    """Name -> value; "contradicted" for one of the older switches that torch refuses to read."""
    readers: dict[str, Callable[[], Any]] = {
        "all": lambda: BACKENDS.fp32_precision,  # type: ignore[attr-defined]
        "cuda": lambda: BACKENDS.cudnn.fp32_precision,
        "cuda.matmul": lambda: BACKENDS.cuda.matmul.fp32_precision,
        "cuda.conv": lambda: BACKENDS.cudnn.conv.fp32_precision,  # type: ignore[attr-defined]
        "cuda.rnn": lambda: BACKENDS.cudnn.rnn.fp32_precision,  # type: ignore[attr-defined]
        "mkldnn.matmul": lambda: BACKENDS.mkldnn.matmul.fp32_precision,  # type: ignore[attr-defined]
        "mkldnn.conv": lambda: BACKENDS.mkldnn.conv.fp32_precision,  # type: ignore[attr-defined]
        "mkldnn.rnn": lambda: BACKENDS.mkldnn.rnn.fp32_precision,  # type: ignore[attr-defined]
        "older": torch.get_float32_matmul_precision,
        "older, cuda": lambda: BACKENDS.cuda.matmul.allow_tf32,
        "older, cudnn": lambda: BACKENDS.cudnn.allow_tf32,
        "benchmark": lambda: BACKENDS.cudnn.benchmark,
        "deterministic": lambda: BACKENDS.cudnn.deterministic,
        "fp16 sums": lambda: BACKENDS.cuda.matmul.allow_fp16_reduced_precision_reduction,
        "fp16 sums, split": lambda: BACKENDS.cuda.matmul.allow_fp16_reduced_precision_reduction_split_k,
        "fp16 accumulation": lambda: BACKENDS.cuda.matmul.allow_fp16_accumulation,
    }
    found: dict[str, Any] = {}
    for name, read in readers.items():
        try:
            found[name] = read()
        except RuntimeError:  # torch refuses to read the older switches where the newer ones contradict them
            found[name] = "contradicted"
    return found
