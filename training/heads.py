"""Heads: small networks that map what a trunk gives to logits.

A head takes activations `(N, F)`, or tokens or maps, and returns logits `(N, K)`, without a final activation. Its
weights are drawn from its own seed; the global random state is neither read nor moved.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from itertools import pairwise
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedBuffer

from featstore.models.modes import mode_of, one_pass
from training.standardised import LinearHead, empty_linear


class HeadBuilder(Protocol):
    """What `HEADS` holds."""

    def __call__(self, in_features: int, num_classes: int, *, seed: int = 0) -> nn.Module:
        """A head that maps vectors of width `in_features` to `num_classes` logits, with weights drawn from `seed`."""


def build_head(
    head: str | nn.Module,
    in_features: int | Sequence[int],
    num_classes: int,
    seed: int = 0,
    *,
    channels_last: bool = False,
) -> nn.Module:
    """The head that `head` stands for: a new one by name, or a checked copy of a person's own module.

    Args:
        head: a key of `HEADS`, also with options in one word, ``concat:hidden=256+128,dropout=0.3``; or a module that
            maps float32 activations of two images to logits `(2, num_classes)`.
            The module itself is never changed: it is copied with its weights, statistics and training flags, and the
            copy is tried on zeros in eval mode. Lazy layers of the copy get their weights then, drawn from `seed`.
        in_features: the width F of one image's activations, or their shape; attention takes tokens ``(T, D)`` or maps
            ``(C, H, W)``, any other named head vectors.
        num_classes: the number of logits, K.
        seed: what a named head's weights are drawn from.
        channels_last: whether maps are ``(H, W, C)``.

    Raises:
        ValueError: for an unknown name or option, a named head for activations of another shape, or a module that
            doesn't make `(2, num_classes)`.
        TypeError: if `head` is neither a name nor a module.
    """
    shape = (in_features,) if isinstance(in_features, int) else tuple(in_features)
    if isinstance(head, nn.Module):
        return _checked_copy(head, shape, num_classes, seed)
    if not isinstance(head, str):
        raise TypeError(f"head is {head!r}; pass one of {', '.join(HEADS)}, or an instance of nn.Module.")
    name, options = read_head(head)
    if name == "attention":
        return attention_head(shape, num_classes, seed=seed, channels_last=channels_last, **options)
    if len(shape) != 1:
        raise ValueError(
            f"Activations of shape {shape} don't fit the head {head!r}, which takes vectors. "
            "Choose a reduction (avg, max, concat, token), the head attention, or pass your own nn.Module for maps."
        )
    return HEADS[name](shape[0], num_classes, seed=seed, **options)


def read_head(word: str) -> tuple[str, dict[str, Any]]:
    """Name and options of a head in one word.

    >>> read_head("concat:hidden=256+128,dropout=0.3")
    ('concat', {'hidden': (256, 128), 'dropout': 0.3})

    Raises:
        ValueError: for a name or an option that there isn't, or a value that is none.
    """
    name, _, rest = word.partition(":")
    if name not in HEADS:
        raise ValueError(f"The head {name!r} is unknown; pass one of {', '.join(HEADS)}, or your own nn.Module.")
    options: dict[str, Any] = {}
    for part in rest.split(",") if rest else ():
        option, _, text = part.partition("=")
        if option not in HEAD_OPTIONS[name]:
            known = ", ".join(HEAD_OPTIONS[name]) or "none"
            raise ValueError(f"The head {word!r} has {option!r}, and the options of {name} are: {known}. Correct it.")
        read = HEAD_OPTIONS[name][option]
        try:
            options[option] = read(text)
        except ValueError:
            raise ValueError(
                f"The head {word!r} has {option}={text}; expected a number, or several with + between them."
            ) from None
    return name, options


def head_word(name: str, **options: Any) -> str:
    """A head with its options in one word, as `read_head` reads it; options that are None are left out.

    >>> head_word("mlp", hidden=(256, 128), dropout=0.3)
    'mlp:hidden=256+128,dropout=0.3'
    """
    given = {
        option: "+".join(f"{each:g}" for each in (value if isinstance(value, list | tuple) else (value,)))
        for option, value in options.items()
        if value is not None
    }
    word = ",".join(f"{option}={text}" for option, text in given.items())
    return f"{name}:{word}" if word else name


def concat_head(
    in_features: int,
    num_classes: int,
    *,
    hidden: Sequence[int] = (512,),
    dropout: float | Sequence[float] | None = None,
    seed: int = 0,
) -> nn.Sequential:
    """The head of fastai: batch norm, dropout, linear, ReLU for each hidden layer; the same, without ReLU, to logits.

    Args:
        in_features: the width F of the vectors.
        num_classes: the number of logits, K.
        hidden: the widths of the hidden layers; with none this is a linear probe behind batch norm and dropout.
        dropout: one rate for every layer, or one a layer: `len(hidden) + 1` of them. None is fastai's choice, 0.25
            before each hidden layer and 0.5 before the last. A rate of 0 leaves the module out.
        seed: what the weights are drawn from, He normal (fan in, gain √2); biases are 0.
    """
    widths = _checked_widths(in_features, *_several(hidden), num_classes)
    default = (0.25,) * len(hidden) + (0.5,)
    rates = _dropout_rates(default if dropout is None else dropout, len(hidden) + 1)
    generator = torch.Generator().manual_seed(seed)
    layers: list[nn.Module] = []
    for (fan_in, fan_out), rate in zip(pairwise(widths), rates, strict=True):
        layers.append(nn.BatchNorm1d(fan_in))
        layers.extend(_dropout(rate))
        layers.append(_he_linear(fan_in, fan_out, generator))
        layers.append(nn.ReLU())
    return nn.Sequential(*layers[:-1])  # the last layer's output is the logits


def linear_head(in_features: int, num_classes: int, *, seed: int = 0) -> LinearHead:
    """One linear layer on standardised inputs. It starts at zero; nothing is drawn from `seed`."""
    _checked_widths(in_features, num_classes)
    return LinearHead(in_features, num_classes)


def mlp_head(
    in_features: int,
    num_classes: int,
    *,
    hidden: Sequence[int] = (512,),
    dropout: float | Sequence[float] = 0.5,
    seed: int = 0,
) -> nn.Sequential:
    """Linear, ReLU and dropout for each hidden layer, then linear to logits; no batch norm.

    `dropout` is one rate for every hidden layer, or one a hidden layer. Weights are drawn as those of `concat_head`.
    """
    widths = _checked_widths(in_features, *_several(hidden), num_classes)
    rates = _dropout_rates(dropout, len(hidden))
    generator = torch.Generator().manual_seed(seed)
    layers: list[nn.Module] = []
    for (fan_in, fan_out), rate in zip(pairwise(widths[:-1]), rates, strict=True):
        layers.append(_he_linear(fan_in, fan_out, generator))
        layers.append(nn.ReLU())
        layers.extend(_dropout(rate))
    return nn.Sequential(*layers, _he_linear(widths[-2], widths[-1], generator))


class AttentionHead(nn.Module):
    """Attention pooling, then one linear layer: what an image is, is asked of its tokens or places by learned queries.

    Tokens are normed, each query weighs them by their keys, separately in each of several heads, and gets the mean of
    their values; all queries' means together give the logits. As in attentive probes of frozen ViTs.

    Attributes:
        queries: ``(Q, D)``.
        num_heads: into which D is divided.
        channels: which dimension of one image's activations they are: the last of tokens; of maps the first or last.
    """

    def __init__(
        self, width: int, num_classes: int, *, queries: int, num_heads: int, channels: int, dropout: float
    ) -> None:
        super().__init__()
        self.num_heads, self.channels = num_heads, channels
        self.queries = nn.Parameter(torch.zeros(queries, width))
        self.norm = nn.LayerNorm(width, device="meta").to_empty(device="cpu")
        self.key, self.value = empty_linear(width, width), empty_linear(width, width)
        self.dropout = nn.Dropout(dropout)
        self.out = empty_linear(queries * width, num_classes)

    def forward(self, activations: Tensor) -> Tensor:
        """Logits ``(N, K)``."""
        tokens = activations.movedim(1 + self.channels, -1).flatten(1, -2)  # (N, T, D)
        count, _, width = tokens.shape
        tokens = self.norm(tokens)
        keys, values = (
            each(tokens).unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for each in (self.key, self.value)
        )  # (N, M, T, D / M)
        asked = self.queries.reshape(len(self.queries), self.num_heads, -1).transpose(0, 1)  # (M, Q, D / M)
        weights = (asked @ keys.transpose(-1, -2) * (width // self.num_heads) ** -0.5).softmax(-1)  # (N, M, Q, T)
        pooled = (weights @ values).transpose(1, 2).reshape(count, -1)  # (N, Q * D)
        logits: Tensor = self.out(self.dropout(pooled))
        return logits


def attention_head(
    in_features: Sequence[int],
    num_classes: int,
    *,
    queries: int = 1,
    dropout: float = 0.0,
    seed: int = 0,
    channels_last: bool = False,
) -> AttentionHead:
    """Attention pooling over tokens or maps, then linear to logits.

    Args:
        in_features: of one image: tokens ``(T, D)``, or maps ``(C, H, W)``.
        num_classes: the number of logits, K.
        queries: learned ones, Q.
        dropout: rate before the last layer.
        seed: what the weights are drawn from: normal, of deviation 0.02, as usual in transformers.
        channels_last: whether maps are ``(H, W, C)``.

    Raises:
        ValueError: for vectors, and for numbers that make no sense.
    """
    shape = tuple(in_features)
    if len(shape) not in (2, 3):
        raise ValueError(
            f"Activations of shape {shape} don't fit the head 'attention', which takes tokens (T, D) or maps (C, H, W)."
            ' Keep these: reduce="none", or "tokens" of a transformer (--reduce none); or choose another head.'
        )
    channels = 0 if len(shape) == 3 and not channels_last else len(shape) - 1
    width = shape[channels]
    _checked_widths(width, num_classes, queries)
    (rate,) = _dropout_rates(dropout, 1)
    num_heads = max(each for each in range(1, max(1, width // 64) + 1) if width % each == 0)
    head = AttentionHead(width, num_classes, queries=queries, num_heads=num_heads, channels=channels, dropout=rate)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in head.named_parameters():
            if name.startswith("norm"):
                parameter.fill_(float(name == "norm.weight"))
            elif name.endswith("bias"):
                parameter.zero_()
            else:
                parameter.normal_(std=0.02, generator=generator)
    return head


def extended_head(
    head: nn.Module, places: Sequence[int], num_classes: int, shape: Sequence[int], seed: int
) -> nn.Module:
    """A copy of `head` with more logits: the old ones, at other places, are what they were.

    New rows of the last linear layer are drawn as those of `concat_head`, and zero where all of it starts at zero.

    Args:
        head: whose logits are those of its last linear layer.
        places: where each of its logits goes.
        num_classes: the number of logits then.
        shape: of one image's activations.
        seed: what new rows are drawn from.

    Raises:
        ValueError: if its logits aren't those of a linear layer.
    """
    copied = copy.deepcopy(head)
    names = [
        name
        for name, module in copied.named_modules()
        if isinstance(module, nn.Linear) and module.out_features == len(places)
    ]
    if names:
        wider = _with_rows(copied.get_submodule(names[-1]), places, num_classes, seed)
        if names[-1]:
            parent, _, name = names[-1].rpartition(".")
            setattr(copied.get_submodule(parent), name, wider)
        else:
            copied = wider
        generator = torch.Generator().manual_seed(seed)
        parameter = next(copied.parameters())
        rows = torch.randn(2, *shape, generator=generator).to(parameter.device)
        with mode_of(head, training=False), mode_of(copied, training=False), torch.no_grad():
            expected: Tensor = head(rows)
            with suppress(Exception):  # what a person's own code raises where what follows has no use for more outputs
                found: Tensor = copied(rows)[:, list(places)]
                # Of another width, products may be summed in another order.
                if torch.allclose(found, expected, rtol=1e-4, atol=1e-4):
                    return copied
    raise ValueError(
        f"The head {type(head).__name__} doesn't end in a linear layer of {len(places)} outputs, so it can't have "
        "more classes. Make a new Learner with a head for all classes."
    )


def _with_rows(layer: nn.Module, places: Sequence[int], num_classes: int, seed: int) -> nn.Linear:
    assert isinstance(layer, nn.Linear)
    wider = (
        linear_head(layer.in_features, num_classes)
        if isinstance(layer, LinearHead)
        else _he_linear(layer.in_features, num_classes, torch.Generator().manual_seed(seed))
    )
    before = layer.state_dict()
    if "bias" not in before:
        wider.register_parameter("bias", None)
    wider = wider.to(layer.weight.device, layer.weight.dtype)
    for name, tensor in wider.state_dict().items():
        tensor[list(places) if name in ("weight", "bias") else ...] = before[name]
    return wider.train(layer.training)


def _widths(text: str) -> tuple[int, ...]:
    return tuple(int(each) for each in text.split("+")) if text else ()


def _rates(text: str) -> float | tuple[float, ...]:
    rates = tuple(float(each) for each in text.split("+"))
    return rates[0] if len(rates) == 1 else rates


HEADS: dict[str, Callable[..., nn.Module]] = {
    "concat": concat_head,
    "linear": linear_head,
    "mlp": mlp_head,
    "attention": attention_head,
}
"""The heads by name; all but attention are `HeadBuilder`."""

HEAD_OPTIONS: dict[str, dict[str, Callable[[str], Any]]] = {
    "concat": {"hidden": _widths, "dropout": _rates},
    "linear": {},
    "mlp": {"hidden": _widths, "dropout": _rates},
    "attention": {"queries": int, "dropout": float},
}
"""What each can be told in its word, and how its text is read."""


def _dropout(rate: float) -> list[nn.Module]:
    return [nn.Dropout(rate)] if rate > 0 else []


def _he_linear(fan_in: int, fan_out: int, generator: torch.Generator) -> nn.Linear:
    layer = empty_linear(fan_in, fan_out)
    nn.init.kaiming_normal_(layer.weight, nonlinearity="relu", generator=generator)
    nn.init.zeros_(layer.bias)
    return layer


def _several(hidden: Any) -> Sequence[int]:
    if isinstance(hidden, str) or not isinstance(hidden, Sequence):
        raise TypeError(
            f"hidden is {hidden!r}; expected the width of each hidden layer in a list, as (512,) or (256, 128)."
        )
    return hidden


def _checked_widths(*widths: int) -> tuple[int, ...]:
    shown = ", ".join(map(str, widths))
    if not all(isinstance(each, int | np.integer) for each in widths):
        raise TypeError(f"The layer widths are {shown}; each must be a whole number.")
    if min(widths) < 1:
        raise ValueError(f"The layer widths are {shown}; each must be at least 1.")
    return tuple(map(int, widths))


def _dropout_rates(dropout: float | Sequence[float], num_layers: int) -> tuple[float, ...]:
    rates = (dropout,) * num_layers if isinstance(dropout, int | float) else tuple(dropout)
    if len(rates) != num_layers:
        raise ValueError(
            f"dropout has {len(rates)} rates for {num_layers} layers with dropout; pass one number for all of them, "
            f"or exactly {num_layers} rates."
        )
    for rate in rates:
        if not isinstance(rate, int | float | np.number) or not 0 <= rate < 1:
            raise ValueError(f"A dropout rate is {rate!r}; pass rates of at least 0 and below 1.")
    return rates


def _checked_copy(head: nn.Module, shape: tuple[int, ...], num_classes: int, seed: int) -> nn.Module:
    copied = _copied(head)
    result = _result_of_zeros(copied, shape, seed)
    if not isinstance(result, Tensor):
        raise ValueError(
            f"The head {type(head).__name__} returns a {type(result).__name__}; a head returns one tensor of logits."
        )
    if result.shape != (2, num_classes):
        raise ValueError(
            f"The head {type(head).__name__} makes {tuple(result.shape)} from activations {(2, *shape)}; "
            f"{num_classes} classes need {(2, num_classes)}. Give its last layer {num_classes} outputs."
        )
    _check_scores(copied, shape, seed)
    return copied


def _copied(head: nn.Module) -> nn.Module:
    """A copy also of lazy batch norm, whose buffers torch can't copy before their shape is known."""
    unknown = [each for each in head.buffers() if isinstance(each, UninitializedBuffer)]
    made: Any = UninitializedBuffer  # whose stub says what any buffer takes
    fresh = [made(each.requires_grad, each.device, each.dtype) for each in unknown]
    return copy.deepcopy(head, {id(own): new for own, new in zip(unknown, fresh, strict=True)})


def _check_scores(head: nn.Module, shape: tuple[int, ...], seed: int) -> None:
    """Checks that in eval mode an image has logits of its own, the same each time; a copy of `head` is tried.

    Raises:
        ValueError: if they change from one time to the next, or with what else is in the batch.
    """
    tried, generator = copy.deepcopy(head), torch.Generator().manual_seed(seed)
    parameter = next(tried.parameters(), None)
    image, *others = torch.randn(3, 1, *shape, generator=generator).to("cpu" if parameter is None else parameter.device)
    found: list[Tensor] = []
    with mode_of(tried, training=False), torch.no_grad(), _seeded_cpu_generator(seed), suppress(Exception):
        # What a person's own code raises for such numbers says nothing of those of images.
        found = [tried(torch.cat([image, other])) for other in (others[0], *others)]
    if len(found) < 3:
        return
    name, close = type(head).__name__, partial(torch.allclose, rtol=1e-3, equal_nan=True)
    around = 1e-4 * float(found[0].abs().max().nan_to_num())
    if not close(found[0], found[1], atol=around):
        raise ValueError(
            f"The head {name} gives other logits for the same activations each time, in eval mode too, so that no "
            "score of it could be repeated. Let what is random rest in eval mode: nn.Dropout(p) does, or "
            "F.dropout(x, p, training=self.training)."
        )
    if not close(found[0][0], found[2][0], atol=around):
        raise ValueError(
            f"The logits that the head {name} gives for an image depend on the others in its batch, in eval mode too, "
            "so that scores would change with batch_size. Normalise each image by itself (nn.LayerNorm), or by running "
            "statistics (nn.BatchNorm1d with track_running_stats=True)."
        )


def _result_of_zeros(head: nn.Module, shape: tuple[int, ...], seed: int) -> object:
    parameter = next(head.parameters(), None)
    zeros = torch.zeros(2, *shape, device=None if parameter is None else parameter.device)
    try:
        with mode_of(head, training=False), torch.no_grad(), _seeded_cpu_generator(seed):
            return head(zeros)
    except Exception as error:  # a person's own code may raise anything
        raise ValueError(
            f"The head {type(head).__name__} fails on float32 activations {tuple(zeros.shape)}: {error}. "
            f"Make it take activations of shape {shape} for each image."
        ) from error


@contextmanager
def _seeded_cpu_generator(seed: int) -> Iterator[None]:
    """The global CPU generator at `seed` for a while: lazy layers draw their weights from nowhere else."""
    with one_pass, torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield
