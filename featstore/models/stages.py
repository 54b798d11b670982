"""Stage: one piece of a network between two cuts, of four kinds: traced, pool, head, and absent."""

from __future__ import annotations

from collections.abc import Collection

from torch import Tensor, fx, nn

from featstore.digest import digest_json, digest_tensor
from featstore.errors import ModelError
from featstore.models.digests import chain, passes_through
from featstore.models.graph import GraphStage, may_write
from featstore.models.pool import Pool


class Stage(nn.Module):
    """One stage: abstract; the final classes are TracedStage, PoolStage, HeadStage and AbsentStage.

    Attributes:
        name: of the value that the stage ends in.
        aliases: other names of that value.
        may_write_input: whether its forward may write into its input's memory.
        has_effect: False where it changes nothing in eval mode (dropout).
        is_classifier: whether it may be the layer that makes scores: one linear layer, at each position for itself.
        is_pooling: whether it brings maps to a size of its own and does nothing else: a network's own pooling, which
            leaves maps of one size (7 x 7) as they are.
    """

    name: str
    aliases: tuple[str, ...] = ()
    may_write_input: bool = False
    has_effect: bool = True
    is_classifier: bool = False
    is_pooling: bool = False

    def digest(self, before: str) -> str:
        """The chained digest after this stage, given the digest before it."""
        raise NotImplementedError

    def tensors(self) -> dict[str, Tensor]:
        """Its parameters and persistent buffers, by their names in the whole model."""
        raise NotImplementedError


class TracedStage(Stage):
    """Operations of a traced module; holds its leaf layers.

    Args:
        stage: the operations.
        state: names of the tensors that the whole module saves; constants of its forward aren't among them.
    """

    def __init__(self, stage: GraphStage, state: Collection[str]) -> None:
        super().__init__()
        self.name, self.aliases = stage.name, stage.aliases
        self.in_eval, self.in_train = stage.eval, stage.train
        self.training = stage.eval.training
        self.may_write_input = may_write(stage.eval) or (stage.train is not None and may_write(stage.train))
        self.has_effect = not passes_through(stage.eval)
        self.is_classifier = _is_pointwise(stage.eval)
        self.is_pooling = _is_adaptive_pooling(stage.eval)
        self._state = frozenset(state) & self._all_tensors().keys()

    def digest(self, before: str) -> str:
        """See Stage."""
        return chain(before, self.in_eval)

    def tensors(self) -> dict[str, Tensor]:
        """See Stage."""
        return {name: value for name, value in self._all_tensors().items() if name in self._state}

    def forward(self, activations: Tensor) -> Tensor:
        """The value at the end of the stage; whole modules may hand over other things than tensors between them."""
        graph = self.in_train if self.training and self.in_train is not None else self.in_eval
        value: Tensor = graph(activations)
        return value

    def _all_tensors(self) -> dict[str, Tensor]:
        in_train = {} if self.in_train is None else self.in_train.state_dict()
        return {**in_train, **self.in_eval.state_dict()}


class PoolStage(Stage):
    """A reduction, right after the cut where the head sits."""

    def __init__(self, name: str, pool: Pool) -> None:
        super().__init__()
        self.name, self.pool = name, pool
        self.has_effect = pool.reduction != "none"

    def digest(self, before: str) -> str:
        """See Stage."""
        return before if self.pool.reduction == "none" else digest_json([before, "pool", self.pool.facts()])

    def tensors(self) -> dict[str, Tensor]:
        """See Stage."""
        return {}

    def forward(self, activations: Tensor) -> Tensor:
        """Pooled activations."""
        pooled: Tensor = self.pool(activations)
        return pooled


class HeadStage(Stage):
    """The head: a module from pooled activations to logits ``(N, K)``."""

    def __init__(self, name: str, module: nn.Module) -> None:
        super().__init__()
        self.name, self.module = name, module
        self.training = module.training
        self.may_write_input = True  # a person's module may do anything

    def digest(self, before: str) -> str:
        """See Stage. Tensors only: nothing is cached behind a head."""
        return digest_json([before, "head", {name: digest_tensor(value) for name, value in self.tensors().items()}])

    def tensors(self) -> dict[str, Tensor]:
        """See Stage."""
        return {f"{self.name}.{name}": value for name, value in self.module.state_dict().items()}

    def forward(self, activations: Tensor) -> Tensor:
        """Logits."""
        logits: Tensor = self.module(activations)
        return logits


class AbsentStage(Stage):
    """A stage known by name, output and digest alone: what a store knows of the trunk that made its features."""

    def __init__(self, *, name: str, layout: str, shape: tuple[int, ...], digest: str) -> None:
        super().__init__()
        self.name, self.layout, self.shape, self._digest = name, layout, shape, digest

    def digest(self, before: str) -> str:
        """See Stage."""
        return self._digest

    def tensors(self) -> dict[str, Tensor]:
        """See Stage."""
        return {}

    def forward(self, activations: Tensor) -> Tensor:
        """Can't run.

        Raises:
            ModelError: always.
        """
        raise ModelError(
            f"The trunk up to {self.name} isn't here: this model came from a store, which knows its name and digest "
            "but not its weights. Attach it: learn.attach(model), or work with stored features only."
        )


def has_weights(stage: Stage) -> bool:
    """Whether a stage can be trained, here or where its weights are."""
    return isinstance(stage, AbsentStage) or next(stage.parameters(), None) is not None


def _only_operation(stage: fx.GraphModule) -> fx.Node | None:
    operations = [node for node in stage.graph.nodes if node.op not in {"placeholder", "get_attr", "output"}]
    return operations[0] if len(operations) == 1 else None


def _is_pointwise(stage: fx.GraphModule) -> bool:
    """Whether a stage is one linear layer or one convolution with a kernel of a single pixel, and nothing else."""
    only = _only_operation(stage)
    if only is None or only.op != "call_module":
        return False
    layer = stage.get_submodule(str(only.target))
    if isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        return all(size == 1 for size in layer.kernel_size)
    return isinstance(layer, nn.Linear)


_ADAPTIVE_LAYERS = (nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d)
_ADAPTIVE_FUNCTIONS = (nn.functional.adaptive_avg_pool2d, nn.functional.adaptive_max_pool2d)


def _is_adaptive_pooling(stage: fx.GraphModule) -> bool:
    only = _only_operation(stage)
    if only is None:
        return False
    if only.op == "call_module":
        return isinstance(stage.get_submodule(str(only.target)), _ADAPTIVE_LAYERS)
    return only.target in _ADAPTIVE_FUNCTIONS
