"""Names: how layouts, reductions and precisions are called, and what is meant where nobody says.

Free of torch: a store reads them from facts, and a program lists them before it has a model.
"""

from __future__ import annotations

from typing import Literal, NamedTuple, get_args

Layout = Literal["NCHW", "NHWC", "NLC", "NC"]
"""The order of a stage's output: maps, maps with channels last, tokens, vectors."""

DIMENSIONS: dict[str, int] = {"NCHW": 3, "NHWC": 3, "NLC": 2, "NC": 1}
"""How many dimensions the values of one image have in each layout."""

LAYOUTS: tuple[str, ...] = (*DIMENSIONS, "other")
"""All of them, with that of values of other dimensions."""

POSITIONS: dict[str, tuple[int, ...]] = {"NCHW": (2, 3), "NHWC": (1, 2), "NLC": (1,)}
"""Which dimensions of a batch ``(N, *F)`` are positions, in the layouts that have some."""

Reduction = Literal["none", "avg", "max", "concat", "token", "tokens"]
REDUCTIONS: tuple[Reduction, ...] = get_args(Reduction)

Precision = Literal["fp32", "tf32", "bf16", "fp16"]
PRECISIONS: tuple[Precision, ...] = get_args(Precision)
DEFAULT_PRECISION: Precision = "fp32"

MemoryFormat = Literal["channels_last", "contiguous"]
MEMORY_FORMATS: tuple[MemoryFormat, ...] = get_args(MemoryFormat)


class Batching(NamedTuple):
    """How images go through a trunk: what may move the last bits of a row, and can be chosen.

    Attributes:
        batch_size: B, the images of each pass; None: what the device takes by default.
        memory_format: how a batch of them lies in memory.
        compiled: whether compiled code runs instead of one operation after the other.
    """

    batch_size: int | None = None
    memory_format: MemoryFormat = "channels_last"
    compiled: bool = False


DEFAULT_BATCHING = Batching()

PIXELS = "pixels"
"""What is asked for in the place of a cut: the views that a model would be given, as they are."""


WEIGHTS_SUFFIXES = (".safetensors", ".pth", ".pt", ".th", ".bin", ".ckpt")
"""What files of weights end with."""


def no_weights_file(path: object) -> str:
    """That there is none, in a sentence."""
    return (
        f"There is no weights file {path}. Give the path of an existing file, or --weights none for a random "
        'initialisation (in Python: weights=FILE, weights="none").'
    )


def layout_of(shape: tuple[int, ...]) -> str:
    """The layout of one image's values ``*F`` where nobody says: NCHW, NLC or NC by their dimensions, else other.

    >>> layout_of((512, 7, 7)), layout_of((197, 768)), layout_of((2048,)), layout_of((3, 2, 2, 2))
    ('NCHW', 'NLC', 'NC', 'other')
    """
    return {1: "NC", 2: "NLC", 3: "NCHW"}.get(len(shape), "other")


def automatic(layout: str, class_tokens: int) -> Reduction:
    """The reduction `auto` stands for: concat for maps, token for a transformer's tokens, none for vectors."""
    if layout == "NLC" and class_tokens:
        return "token"
    return "concat" if layout in POSITIONS else "none"
