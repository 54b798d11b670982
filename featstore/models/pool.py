"""Pool: a reduction of activations as a parameterless stage, the same one in extraction and in a model."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from featstore.digest import Json
from featstore.models.names import POSITIONS, REDUCTIONS, Reduction


class Pool(nn.Module):
    """Reduces activations ``(N, *F)`` in float32.

    * ``none``: as they are.
    * ``avg``, ``max``: over all positions, ``(N, C)``.
    * ``concat``: maximum, then average, ``(N, 2 C)``, as fastai's AdaptiveConcatPool2d.
    * ``token``: the class token of a transformer, ``(N, C)``.
    * ``tokens``: all tokens but those at the start that are no patches, ``(N, L - 1, C)`` with a class token alone.

    Over tokens, ``avg``, ``max`` and ``concat`` are over the patches.

    Args:
        reduction: one of `REDUCTIONS`.
        layout: of the activations that come in.
        class_tokens: how many tokens at the start stand for the whole image; 0 or 1.
        prefix_tokens: how many at the start are no patches, with registers; default: the class tokens.

    Raises:
        ValueError: for a reduction that this layout doesn't have.
    """

    def __init__(
        self, reduction: Reduction, layout: str, class_tokens: int = 0, prefix_tokens: int | None = None
    ) -> None:
        super().__init__()
        if reduction not in REDUCTIONS:
            raise ValueError(f"{reduction!r} is no reduction. The reductions are {', '.join(REDUCTIONS)}.")
        if reduction != "none" and layout not in POSITIONS:
            raise ValueError(
                f"reduction {reduction} needs activations with positions (NCHW, NHWC or NLC); here the layout is "
                f"{layout}. Use the reduction none, or cut where there are maps or tokens."
            )
        prefix_tokens = class_tokens if prefix_tokens is None else prefix_tokens
        needed = {"token": class_tokens, "tokens": prefix_tokens}
        if reduction in needed and not (layout == "NLC" and needed[reduction]):
            registers = f" and {prefix_tokens - class_tokens} registers" if prefix_tokens > class_tokens else ""
            raise ValueError(
                f"reduction {reduction} needs the tokens of a transformer with a class token; here the layout is "
                f"{layout} with {class_tokens} class tokens{registers}. Use avg, max, concat or none."
            )
        self.reduction: Reduction = reduction
        self.layout = layout
        self.class_tokens, self.prefix_tokens = class_tokens, prefix_tokens

    def facts(self) -> Json:
        """What decides the pooled values: the same for two pools that compute the same."""
        if self.reduction == "none":
            return {"reduction": "none"}
        facts: dict[str, Json] = {"reduction": self.reduction, "layout": self.layout}
        if self.layout == "NLC":
            facts["class_tokens"] = self.class_tokens
            if self.prefix_tokens != self.class_tokens:
                facts["prefix_tokens"] = self.prefix_tokens
        return facts

    def forward(self, activations: Tensor) -> Tensor:
        """Pooled activations, float32 (or float64 if that came in), contiguous."""
        values = activations if activations.dtype == torch.float64 else activations.float()
        values = values.contiguous()  # sums over a fixed order: maps from a store and from a trunk give equal bits
        match self.reduction:
            case "none":
                return values
            case "token":
                return values[:, 0].contiguous()
            case "tokens":
                return values[:, self.prefix_tokens :].contiguous()
        if self.layout == "NLC":
            values = values[:, self.prefix_tokens :]
        positions = POSITIONS[self.layout]
        match self.reduction:
            case "avg":
                return values.mean(positions)
            case "max":
                return values.amax(positions)
            case "concat":
                return torch.cat([values.amax(positions), values.mean(positions)], dim=1)

    def shape(self, activations: tuple[int, ...]) -> tuple[int, ...]:
        """The shape ``*F`` that comes out for the shape ``*F`` that comes in, both without N."""
        return tuple(self(torch.empty((1, *activations), device="meta")).shape[1:])

    def extra_repr(self) -> str:
        """How it prints."""
        return f"{self.reduction}, {self.layout}"
