"""Embedding: the model whose output is a value inside another one, reduced, and whose head does nothing."""

from __future__ import annotations

from torch import nn

from featstore.models.staged import StagedModel
from training.placement import reduction_of


def embedding_model(model: StagedModel, cut: str | None, reduce: str | None, *, head_cut: str) -> StagedModel:
    """The stages of `model` up to `cut`, as they are now, and a pool; all of it frozen, so that features may serve.

    Args:
        model: with its head; never changed.
        cut: any of its cuts, behind its freeze point too; None: where the head sits.
        reduce: as of a head; None: that of the head, where the cut is its own, else ``auto``.
        head_cut: where the head sits.

    Raises:
        ValueError: for a name that no cut has, or a reduction that there isn't at this one.
    """
    name = head_cut if cut is None else model.canonical(cut)
    if name not in model.cut_points:
        raise ValueError(
            f"{name} is the pool or the head of {model.name}, and no cut. Leave cut out for what the head gets; "
            "predict_proba gives what it makes of it."
        )
    own = reduction_of(model) if name == head_cut else None
    return model.with_head(nn.Identity(), cut=name, reduction=reduce or own or "auto")
