"""Choices: names that a program needs where what they belong to would load torch."""

from __future__ import annotations

from typing import Literal

HEADS = ("concat", "linear", "mlp", "attention")
"""The keys of `heads.HEADS`; a test holds them equal."""

PROBES = ("knn", "ridge", "linear")
"""`probing.PROBES`; a test holds them equal."""

FEW_SHOT_PROBES = ("ridge", "linear", "knn", "head")
"""What `shots.few_shot` fits by name; a test holds them equal."""

PRECISIONS: tuple[Literal["fp32", "bf16", "fp16"], ...] = ("fp32", "bf16", "fp16")
"""`steps.TRAINING_PRECISIONS`; a test holds them equal."""

KEEP: tuple[Literal["last", "best"], ...] = ("last", "best")
"""Whose weights remain after a fit."""

SAMPLINGS: tuple[Literal["shuffled", "balanced"], ...] = ("shuffled", "balanced")
BATCH_NORMS: tuple[Literal["train", "frozen"], ...] = ("train", "frozen")
"""What a fit's `sampling` and `batch_norm` may be."""

PROJECTIONS: tuple[Literal["pca", "tsne", "umap"], ...] = ("pca", "tsne", "umap")
"""`featstore.pages.projection.METHODS`; a test holds them equal."""

CHECKPOINT = ".checkpoint"
"""What the name of a run ends in where its fit is kept until it is saved."""

FOLDS = ".folds"
"""What it ends in where the fits of a cross-validation are kept until it is saved."""

SWEEP, BEST = "sweep.json", "best"
"""In the folder of a sweep: what all of its scores depend on, and the run of its best setting."""

EXPORTS: dict[str, tuple[str, ...]] = {"pt2": (".pt2",), "onnx": (".onnx",), "state-dict": (".safetensors", ".pth")}
"""Format of an exported model -> how its file's name may end."""

FEW_STEPS = 50
"""Fewer leave a new head far from what it can learn: 54 images and ten epochs gave an accuracy of 0.64 in batches of
64, and of 0.79 in batches of 8."""

SMALL_BATCH = 8
"""That is advised then."""
