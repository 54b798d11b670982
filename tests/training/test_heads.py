import copy
import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from sklearn.preprocessing import StandardScaler
from torch import Tensor, nn

from training import choices
from training.heads import (
    HEADS,
    AttentionHead,
    attention_head,
    build_head,
    concat_head,
    head_word,
    linear_head,
    mlp_head,
    read_head,
)
from training.standardised import SPREAD, LinearHead


def layer_names(head: nn.Module) -> list[str]:
    return [type(layer).__name__ for layer in head.children()]


def dropout_rates(head: nn.Module) -> list[float]:
    return [layer.p for layer in head.modules() if isinstance(layer, nn.Dropout)]


def linears(head: nn.Module) -> list[nn.Linear]:
    return [layer for layer in head.modules() if isinstance(layer, nn.Linear)]


def same_states(one: nn.Module, other: nn.Module) -> bool:
    left, right = one.state_dict(), other.state_dict()
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def test_concat_head_has_fastais_layout_and_size() -> None:
    head = concat_head(1024, 10)
    assert layer_names(head) == ["BatchNorm1d", "Dropout", "Linear", "ReLU", "BatchNorm1d", "Dropout", "Linear"]
    assert dropout_rates(head) == [0.25, 0.5]
    assert sum(parameter.numel() for parameter in head.parameters()) == 533_002
    assert sum(parameter.numel() for parameter in concat_head(4096, 10).parameters()) == 2_112_010
    assert len(list(head.parameters())) == 8


def test_concat_head_starts_he_normal_with_zero_biases() -> None:
    first, last = linears(concat_head(1024, 512))
    # 524,288 and 262,144 draws: their standard deviation is known to about 0.1 %.
    assert first.weight.std().item() == pytest.approx(0.04419, rel=5e-3)
    assert last.weight.std().item() == pytest.approx(math.sqrt(2 / 512), rel=5e-3)
    assert abs(first.weight.mean().item()) < 5e-4
    assert first.weight.abs().max() > 4 * 0.04419  # normal, not uniform
    assert not first.bias.any()
    assert not last.bias.any()


def test_he_weights_are_torchs_kaiming_normal_of_the_same_generator() -> None:
    generator = torch.Generator().manual_seed(3)
    for layer in linears(concat_head(20, 4, hidden=(8,), seed=3)):
        expected = nn.init.kaiming_normal_(torch.empty_like(layer.weight), nonlinearity="relu", generator=generator)
        assert torch.equal(layer.weight, expected)


def test_batch_norm_of_a_concat_head_keeps_torchs_defaults() -> None:
    for layer in concat_head(12, 3, hidden=(6,)):
        if isinstance(layer, nn.BatchNorm1d):
            expected = nn.BatchNorm1d(layer.num_features)
            assert repr(layer) == repr(expected)
            assert same_states(layer, expected)


def test_concat_head_without_hidden_layers_is_a_linear_probe() -> None:
    head = concat_head(64, 5, hidden=())
    assert layer_names(head) == ["BatchNorm1d", "Dropout", "Linear"]
    assert dropout_rates(head) == [0.5]


@pytest.mark.parametrize(
    ("hidden", "dropout", "rates"),
    [
        ((32,), 0.5, [0.5, 0.5]),
        ((32,), 0, []),
        ((32,), [0, 0.3], [0.3]),
        ((32, 16), (0.1, 0.2, 0.3), [0.1, 0.2, 0.3]),
        ((32, 16), None, [0.25, 0.25, 0.5]),
    ],
)
def test_dropout_is_one_rate_for_all_or_one_a_layer(
    hidden: tuple[int, ...], dropout: float | list[float] | None, rates: list[float]
) -> None:
    assert dropout_rates(concat_head(64, 5, hidden=hidden, dropout=dropout)) == rates


@pytest.mark.parametrize("dropout", [[0.1], [0.1, 0.2, 0.3], ()])
def test_dropout_rates_that_do_not_match_the_layers_are_refused(dropout: list[float]) -> None:
    with pytest.raises(ValueError, match=f"dropout has {len(dropout)} rates for 2 layers"):
        concat_head(64, 5, dropout=dropout)
    with pytest.raises(ValueError, match=f"dropout has {len(dropout)} rates for 4 layers"):
        mlp_head(64, 5, hidden=(9, 8, 7, 6), dropout=dropout)


@pytest.mark.parametrize("rate", [-0.1, 1.0, 1.5, math.nan])
def test_a_dropout_rate_outside_its_range_is_refused(rate: float) -> None:
    with pytest.raises(ValueError, match=f"dropout rate is {rate}"):
        concat_head(64, 5, dropout=rate)


def test_mlp_head_is_linear_relu_dropout() -> None:
    head = mlp_head(64, 5, hidden=(32, 16), dropout=(0.1, 0))
    assert layer_names(head) == ["Linear", "ReLU", "Dropout", "Linear", "ReLU", "Linear"]
    assert [tuple(layer.weight.shape) for layer in linears(head)] == [(32, 64), (16, 32), (5, 16)]
    assert layer_names(mlp_head(64, 5, hidden=())) == ["Linear"]


def rows(count: int = 400, width: int = 6, seed: int = 0) -> Tensor:
    """Features of very different means and spreads, float32."""
    generator = torch.Generator().manual_seed(seed)
    scale = torch.logspace(-1, 2, width)
    return 3 * scale + scale.flip(0) * torch.randn(count, width, generator=generator)


def trained(width: int = 6) -> LinearHead:
    """A linear head whose weights are no longer zero."""
    head = linear_head(width, 3)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        head.weight.normal_(generator=generator)
        head.bias.normal_(generator=generator)
    return head


def test_a_linear_head_starts_at_zero_where_every_class_is_as_likely() -> None:
    assert not linear_head(37, 11)(rows(width=37)).any()


@pytest.mark.parametrize("batch_size", [1, 7, 400])
def test_a_linear_head_standardises_by_the_exact_mean_and_spread_of_all_rows(batch_size: int) -> None:
    features, head = rows(), linear_head(6, 3)
    head.standardise(torch.split(features, batch_size))
    expected = StandardScaler().fit(features.double().numpy())
    assert head.num_rows == 400
    assert torch.equal(head.mean, torch.from_numpy(expected.mean_).float())
    # Sums in another order: a last digit of float32 at most.
    assert head.scale.numpy() == pytest.approx(SPREAD / expected.scale_, rel=2e-7)


def test_statistics_change_no_logit_and_fold_into_a_plain_layer() -> None:
    features, head = rows().double(), trained().double()
    before = head(features)
    head.standardise([features])
    # The statistics themselves are rounded to nothing here: all is float64.
    assert torch.allclose(head(features), before, rtol=1e-9, atol=1e-6)
    plain = head.float().folded()
    assert type(plain) is nn.Linear
    assert torch.allclose(plain(features.float()), head(features.float()), rtol=1e-4, atol=1e-2)


def test_features_that_do_not_vary_stay_without_weight() -> None:
    features = rows(20)
    features[:, 2], features[:, 4] = 0.1, 65504.0  # 0.1 has no exact mean in float32
    head = linear_head(6, 3)
    head.standardise(torch.split(features, 3))
    F.cross_entropy(head(features), torch.arange(20) % 3).backward()  # type: ignore[no-untyped-call]
    assert head.weight.grad is not None
    assert not head.weight.grad[:, [2, 4]].any()
    assert head.weight.grad[:, [0, 1, 3, 5]].all()


@pytest.mark.parametrize("scale", [6e-8, 65504.0, 1e30])
def test_extremes_of_float16_and_beyond_are_standardised_without_overflow(scale: float) -> None:
    head = linear_head(2, 3)
    features = torch.tensor([[0.0, 1.0], [1.0, -1.0]]) * scale
    head.standardise([features])
    assert torch.equal((features - head.mean) * head.scale, SPREAD * torch.tensor([[-1.0, 1.0], [1.0, -1.0]]))


def test_a_single_row_and_no_row_leave_finite_numbers() -> None:
    head = linear_head(2, 3)
    head.standardise([])
    assert head.num_rows == 0
    head.standardise([torch.tensor([[3.0, -4.0]])])
    assert torch.equal(head(torch.tensor([[3.0, -4.0]])), torch.zeros(1, 3))


@pytest.mark.parametrize("wrong", [math.nan, math.inf])
def test_a_training_row_that_is_not_finite_is_named_and_nothing_changes(wrong: float) -> None:
    features, head = rows(), trained()
    features[123, 4] = wrong
    before = copy.deepcopy(head)
    with pytest.raises(
        FloatingPointError, match=f"Value 4 of training row 123 is {wrong:g}; a linear head needs finite"
    ):
        head.standardise(torch.split(features, 50))
    assert same_states(head, before)


def test_programs_offer_the_heads_that_there_are() -> None:
    assert tuple(HEADS) == choices.HEADS


SHAPES = {"attention": (9, 64)}


@pytest.mark.parametrize("name", HEADS)
def test_heads_map_vectors_to_logits_without_a_final_activation(name: str) -> None:
    shape = SHAPES.get(name, (64,))
    head = build_head(name, shape, 5)
    for parameter in head.parameters():
        assert parameter.device.type == "cpu"
        assert parameter.requires_grad
    if name == "linear":
        nn.init.normal_(head.weight, generator=torch.Generator().manual_seed(0))  # type: ignore[arg-type]
    logits = head(torch.randn(16, *shape, generator=torch.Generator().manual_seed(0)))
    assert logits.shape == (16, 5)
    assert logits.min() < 0 < logits.max()
    assert not torch.allclose(logits.exp().sum(dim=1), torch.ones(16))


@pytest.mark.parametrize("name", HEADS)
def test_weights_come_from_the_seed_alone_and_leave_global_randomness(name: str) -> None:
    before = torch.get_rng_state()
    shape = SHAPES.get(name, (64,))
    head = build_head(name, shape, 5, seed=4)
    assert torch.equal(torch.get_rng_state(), before)
    with torch.random.fork_rng():
        torch.manual_seed(99)
        assert same_states(build_head(name, shape, 5, seed=4), head)
    assert same_states(build_head(name, shape, 5, seed=5), head) == (name == "linear")


@pytest.mark.parametrize("builder", [concat_head, linear_head, mlp_head])
@pytest.mark.parametrize(("in_features", "num_classes"), [(0, 3), (8, 0), (-1, 3)])
def test_widths_below_one_are_refused(
    builder: Callable[[int, int], nn.Module], in_features: int, num_classes: int
) -> None:
    with pytest.raises(ValueError, match="each must be at least 1"):
        builder(in_features, num_classes)


def test_an_unknown_head_lists_the_names() -> None:
    with pytest.raises(
        ValueError, match="'transformer' is unknown; pass one of concat, linear, mlp, attention, or your own"
    ):
        build_head("transformer", 64, 5)
    with pytest.raises(TypeError, match=r"instance of nn\.Module"):
        build_head(nn.Linear, 64, 5)  # type: ignore[arg-type]


def test_a_named_head_on_maps_says_to_reduce_them() -> None:
    with pytest.raises(ValueError, match=r"shape \(64, 7, 7\) don't fit the head 'concat', which takes vectors"):
        build_head("concat", (64, 7, 7), 5)
    assert same_states(build_head("concat", (64,), 5), build_head("concat", 64, 5))


def own_head() -> nn.Sequential:
    head = nn.Sequential(nn.BatchNorm1d(64), nn.Linear(64, 8), nn.Dropout(0.5), nn.BatchNorm1d(8), nn.Linear(8, 5))
    head[0].eval()  # a person's own choice, to be kept
    return head


def test_an_own_head_is_copied_with_its_weights_statistics_and_flags() -> None:
    head = own_head()
    before, modes = copy.deepcopy(head), [part.training for part in head.modules()]
    copied = build_head(head, 64, 5)
    assert copied is not head
    for one in (head, copied):
        assert same_states(one, before)
        assert [part.training for part in one.modules()] == modes
    with torch.no_grad():
        for parameter in copied.parameters():
            parameter.add_(1)
    assert same_states(head, before)


def test_an_own_head_keeps_its_flags_when_it_is_refused() -> None:
    head = own_head()
    modes = [part.training for part in head.modules()]
    with pytest.raises(ValueError, match="makes"):
        build_head(head, 64, 6)
    assert [part.training for part in head.modules()] == modes


def test_an_own_head_may_take_maps() -> None:
    head = nn.Sequential(nn.Conv2d(6, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5))
    assert same_states(build_head(head, (6, 7, 7), 5), head)


def test_an_own_head_without_parameters_is_tried_too() -> None:
    assert layer_names(build_head(nn.Sequential(nn.Identity()), 5, 5)) == ["Identity"]


def test_an_own_head_with_another_number_of_outputs_is_refused_with_both_shapes() -> None:
    with pytest.raises(ValueError, match=r"Linear makes \(2, 3\) from activations \(2, 64\); 5 classes need \(2, 5\)"):
        build_head(nn.Linear(64, 3), 64, 5)


def test_an_own_head_of_another_width_is_refused_with_its_error() -> None:
    with pytest.raises(ValueError, match=r"Linear fails on float32 activations \(2, 64\): .*shapes") as caught:
        build_head(nn.Linear(32, 5), 64, 5)
    assert isinstance(caught.value.__cause__, RuntimeError)


class TwoAnswers(nn.Module):
    def forward(self, vectors: Tensor) -> tuple[Tensor, Tensor]:
        return vectors, vectors


def test_an_own_head_that_returns_no_tensor_is_refused() -> None:
    with pytest.raises(ValueError, match="TwoAnswers returns a tuple"):
        build_head(TwoAnswers(), 5, 5)


def test_lazy_layers_of_an_own_head_get_seeded_weights_and_leave_global_randomness() -> None:
    head = nn.LazyLinear(5)
    before = torch.get_rng_state()
    copied = build_head(head, 64, 5, seed=7)
    assert torch.equal(torch.get_rng_state(), before)
    with torch.random.fork_rng():
        torch.manual_seed(7)
        assert same_states(copied, nn.Linear(64, 5))
    assert isinstance(head.weight, nn.UninitializedParameter)


def test_lazy_batch_norm_of_an_own_head_is_copied_and_its_owner_keeps_it_as_it_was() -> None:
    lazy: nn.Module = nn.LazyBatchNorm1d()
    head = nn.Sequential(lazy, nn.LazyLinear(5))
    for copied in (build_head(head, 64, 5, seed=7), build_head(head, 64, 5, seed=7)):
        assert type(copied.get_submodule("0")) is nn.BatchNorm1d
        assert same_states(copied.get_submodule("0"), nn.BatchNorm1d(64))
    assert isinstance(lazy.running_mean, nn.parameter.UninitializedBuffer)


def test_attention_pooling_is_that_of_torch() -> None:
    head = attention_head((9, 128), 5, queries=3, seed=1)
    assert isinstance(head, AttentionHead)
    assert head.num_heads == 2
    tokens = torch.randn(4, 9, 128, generator=torch.Generator().manual_seed(0))
    theirs = nn.MultiheadAttention(128, 2, batch_first=True)
    with torch.no_grad():
        theirs.in_proj_weight.copy_(torch.cat([torch.eye(128), head.key.weight, head.value.weight]))
        theirs.in_proj_bias.copy_(torch.cat([torch.zeros(128), head.key.bias, head.value.bias]))
        theirs.out_proj.weight.copy_(torch.eye(128))
        theirs.out_proj.bias.zero_()
        normed = head.norm(tokens)
        pooled, _ = theirs(head.queries.expand(4, -1, -1), normed, normed)
        expected = head.out(pooled.flatten(1))
        # Another order of sums.
        torch.testing.assert_close(head(tokens), expected, rtol=1e-5, atol=1e-6)


def test_attention_reads_maps_as_tokens_wherever_their_channels_lie() -> None:
    tokens = torch.randn(4, 12, 64, generator=torch.Generator().manual_seed(0))
    expected = attention_head((12, 64), 5)(tokens)
    last = tokens.reshape(4, 3, 4, 64)
    assert torch.equal(attention_head((3, 4, 64), 5, channels_last=True)(last), expected)
    torch.testing.assert_close(attention_head((64, 3, 4), 5)(last.movedim(-1, 1)), expected)
    with pytest.raises(ValueError, match="which takes tokens"):
        build_head("attention", 64, 5)


def test_a_heads_options_are_part_of_its_word() -> None:
    word = head_word("concat", hidden=(7, 6), dropout=0.2)
    assert word == "concat:hidden=7+6,dropout=0.2"
    assert read_head(word) == ("concat", {"hidden": (7, 6), "dropout": 0.2})
    assert same_states(build_head(word, 8, 3), concat_head(8, 3, hidden=(7, 6), dropout=0.2))
    assert [each.p for each in build_head(word, 8, 3).modules() if isinstance(each, nn.Dropout)] == [0.2] * 3
    assert read_head("mlp:hidden=") == ("mlp", {"hidden": ()})
    with pytest.raises(ValueError, match="has 'depth', and the options of mlp are: hidden, dropout"):
        build_head("mlp:depth=3", 8, 3)
    with pytest.raises(ValueError, match="has hidden=wide; expected a number"):
        build_head("mlp:hidden=wide", 8, 3)


class Scored(nn.Module):
    """Logits of a linear layer, after something that is done to its input in eval mode as well."""

    def __init__(self, change: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.last, self.change = nn.Linear(6, 3), change

    def forward(self, vectors: Tensor) -> Tensor:
        logits: Tensor = self.last(self.change(vectors))
        return logits


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda vectors: F.dropout(vectors, 0.5), "other logits for the same activations each time"),
        (lambda vectors: vectors - vectors.mean(0), "depend on the others in its batch"),
        (nn.BatchNorm1d(6, track_running_stats=False), "depend on the others in its batch"),
    ],
)
def test_a_head_whose_scores_could_not_be_repeated_is_refused(change: Callable[[Tensor], Tensor], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        build_head(Scored(change), 6, 3)
    assert build_head(Scored(nn.BatchNorm1d(6)), 6, 3) is not None
    assert (
        build_head(Scored(torch.sqrt), 6, 3) is not None
    )  # of numbers below zero not a number, which is equal to itself
