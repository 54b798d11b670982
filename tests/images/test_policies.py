"""Built-in policies: what they draw and how often, what they can be told, how they compose; the same views anywhere."""

from __future__ import annotations

import hashlib
import multiprocessing
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from scipy import stats  # type: ignore[import-untyped]
from sklearn.datasets import load_sample_images
from support.augmented import EVERY, digests_of_views, made_up, views_of
from support.processes import Processes
from torch import Tensor
from torchvision.transforms import ColorJitter, InterpolationMode, autoaugment

from featstore.digest import canonical_json
from featstore.images.augmentation import Policy, policy
from featstore.images.canvas import Canvas
from featstore.images.draws import Draws, random_box
from featstore.images.filters import mirrored
from featstore.images.geometry import Geometry, RenderError
from featstore.images.image_set import ImageSet
from featstore.images.parameters import Span, Word
from featstore.images.policies import BUILT_IN
from featstore.images.spelling import completed, read
from featstore.images.views import Augment, View
from featstore.images.warps import Affine

DIGEST = bytes(range(32))
PHOTO = torch.from_numpy(load_sample_images().images[0].copy()).permute(2, 0, 1)  # (3, 427, 640)
VIEW = View(size=64, resize=73)
NAMES = [name for name in BUILT_IN if name != "none"]


def rendered(name: Any, seed: int, image: Tensor = PHOTO, view: View = VIEW) -> Tensor:
    return view.with_seed(name, seed).render(image, DIGEST)


# --- what is drawn, and how often ---


class Noted(Canvas):
    """A canvas that notes what it was told about its geometry."""

    def __init__(self, height: int = 20, width: int = 27, size: int = 8) -> None:
        geometry = Geometry(size=size, resize=size, interpolation="bilinear", antialias=True)
        super().__init__(torch.zeros(3, height, width, dtype=torch.uint8), geometry)
        self.factors: list[float] = []
        self.maps: list[Affine] = []
        self.places: list[tuple[int, int, int, int]] = []

    def scale(self, factor: float = 1) -> None:
        self.factors.append(factor)
        super().scale(factor)

    def warp(self, where: Affine) -> None:
        self.maps.append(where)
        super().warp(where)

    def crop(self, top: int, left: int) -> None:
        self.places.append((top, left, self.height, self.width))
        super().crop(top, left)


def noted(name: str, number: int = 2000, **params: Any) -> list[Noted]:
    """What canvases were told by a policy of these parameters, each by other draws."""
    entry = BUILT_IN[name]
    canvases = []
    for seed in range(number):
        canvases.append(Noted())
        entry.method(canvases[-1], Draws([name, seed]), **entry.checked(name, params))
    return canvases


def is_uniform(values: list[float], low: float, high: float) -> bool:
    return len(values) > 300 and stats.kstest(values, stats.uniform(low, high - low).cdf).pvalue > 0.001


def is_share(count: int, number: int, probability: float) -> bool:
    return bool(stats.binomtest(count, number, probability).pvalue > 0.001)


@pytest.mark.parametrize("name", ["basic", "side_on", "top_down", "random_crop"])
def test_zooms_are_drawn_three_times_in_four_up_to_the_largest(name: str) -> None:
    factors = [each.factors[0] for each in noted(name, max_zoom=1.4)]
    drawn = [factor for factor in factors if factor != 1]
    assert is_share(len(drawn), 2000, 0.75)
    assert is_uniform(drawn, 1, 1.4)
    assert {each.factors[0] for each in noted(name, 50)} == {1}


@pytest.mark.parametrize(("name", "word"), [("basic", "rotation"), ("side_on", "rotation"), ("rotate", "degrees")])
def test_turns_are_drawn_three_times_in_four_both_ways(name: str, word: str) -> None:
    for degrees in (10, 45):
        canvases = noted(name, **{word: degrees})
        angles = [np.degrees(np.arctan2(each.d, each.a)) for canvas in canvases for each in canvas.maps]
        assert is_share(len(angles), 2000, 0.75)
        assert is_uniform(angles, -degrees, degrees)


@pytest.mark.parametrize("name", ["side_on", "random_crop"])
def test_crops_are_anywhere_the_last_place_included(name: str) -> None:
    places = [each.places[0] for each in noted(name)]
    assert {place[2:] for place in places} == {(8, 10)}  # 20 x 27 with the shorter side 8
    assert stats.chisquare(np.bincount([left for _, left, _, _ in places], minlength=3)).pvalue > 0.001
    assert {top for top, _, _, _ in places} == {0}
    padded = [each.places[0] for each in noted(name, pad=3)]
    assert stats.chisquare(np.bincount([top for top, _, _, _ in padded], minlength=7)).pvalue > 0.001


def test_zooms_and_stretches_are_uniform() -> None:
    zooms = [canvas.maps[0] for canvas in noted("zoom", amount=(0.2, 0.9))]
    assert {each.a == each.e for each in zooms} == {True}
    assert is_uniform([1 / each.a - 1 for each in zooms], 0.2, 0.9)
    stretches = [canvas.maps[0] for canvas in noted("stretch", max_stretch=0.5)]
    wide = [1 / each.a - 1 for each in stretches if each.e == 1]
    high = [1 / each.e - 1 for each in stretches if each.a == 1]
    assert is_share(len(wide), 2000, 0.5)
    assert is_uniform(wide, 0, 0.5)
    assert is_uniform(high, 0, 0.5)


def test_one_of_four_is_done_by_rotate_zoom() -> None:
    counts = {"nothing": 0, "turn": 0, "zoom": 0, "stretch": 0}
    for canvas in noted("rotate_zoom"):
        if not canvas.maps:
            counts["nothing"] += 1
        else:
            (found,) = canvas.maps
            counts["turn" if found.b else "zoom" if found.a == found.e else "stretch"] += 1
    assert stats.chisquare(list(counts.values())).pvalue > 0.001


def squares(name: str, pixels: NDArray[np.uint8], /, number: int = 2000, **params: Any) -> list[NDArray[np.uint8]]:
    """A square under a policy, by other draws each time."""
    side = pixels.shape[1]
    view = View(size=side, resize=side).with_seed(policy(name, **params), 0)
    image = torch.from_numpy(pixels)
    return [view.render(image, hashlib.sha256(b"%d" % place).digest()).numpy() for place in range(number)]


def test_brightness_and_contrast_are_uniform_in_what_fastai_draws() -> None:
    pixels = np.full((3, 8, 8), 70, np.uint8)
    pixels[:, :4] = 185
    brighter = [
        float(each.mean() - pixels.mean()) / 255 for each in squares("lighting", pixels, brightness=0.2, contrast=0)
    ]
    assert is_uniform(brighter, -0.2, 0.2)
    factors = [(int(each[0, 0, 0]) - int(each[0, 7, 0])) / 115 for each in squares("lighting", pixels, contrast=0.5)]
    drawn = [factor - 1 if factor >= 1 else 1 - 1 / factor for factor in factors]
    assert is_uniform(drawn, -0.5, 0.5)


def test_the_eight_positions_are_equally_likely() -> None:
    pixels = np.arange(48, dtype=np.uint8).reshape(3, 4, 4)
    positions = [np.rot90(pixels, turns, axes=(1, 2)) for turns in range(4)]
    positions += [position[:, :, ::-1] for position in positions]
    places = {position.tobytes(): place for place, position in enumerate(positions)}
    counts = np.bincount([places[each.tobytes()] for each in squares("dihedral", pixels)], minlength=8)
    assert stats.chisquare(counts).pvalue > 0.001


def test_holes_are_made_half_the_time_with_middles_anywhere() -> None:
    white = np.full((3, 12, 12), 255, np.uint8)
    holed = [each for each in squares("cutout", white, length=0.5) if not each.all()]
    assert is_share(len(holed), 2000, 0.5)
    middles = []
    for each in holed:
        assert np.array_equal(each[0], each[1])
        rows = np.flatnonzero((each[0] == 0).any(1))
        middles.append(rows[0] + 3 if rows[0] else rows[-1] - 2)  # six pixels, fewer at the edges
    assert stats.chisquare(np.bincount(middles, minlength=12)).pvalue > 0.001
    several = squares("cutout", np.full((3, 40, 40), 255, np.uint8), 40, holes=5, length=0.05, probability=1)
    assert max(int((each[0] == 0).sum()) for each in several) == 5 * 4


def test_blurs_are_drawn_half_the_time_and_equally_from_their_strengths() -> None:
    pulse = np.zeros((3, 15, 15), np.uint8)
    pulse[:, 7, 7] = 255
    peaks = [int(each[0, 7, 7]) for each in squares("blur", pulse, strength=(2, 4))]
    counts = [peaks.count(peak) for peak in sorted(set(peaks))]
    assert len(counts) == 4
    assert is_share(counts.pop(), 2000, 0.5)
    assert stats.chisquare(counts).pvalue > 0.001


@pytest.mark.parametrize(
    ("name", "colour", "start", "end"),  # of the way from start to end, the colour's red level goes the drawn factor
    [
        ("brightness", (100, 100, 100), 0, 100),
        ("contrast", (100, 100, 100), 50, 100),
        ("saturation", (140, 100, 100), 112, 140),
    ],
)
def test_colour_jitter_draws_torchvisions_factors(name: str, colour: tuple[int, ...], start: int, end: int) -> None:
    pixels = np.zeros((3, 8, 8), np.uint8)
    pixels[:, :4] = np.array(colour)[:, None, None]
    params: dict[str, Any] = {each: 0.3 if each == name else 0.0 for each in BUILT_IN["color_jitter"].params}
    levels = [int(each[0, 0, 0]) for each in squares("color_jitter", pixels, **params)]
    low, high = getattr(ColorJitter(**params), name)
    assert (low, high) == (0.7, 1.3)
    factors = (np.array(levels) + 0.5 - start) / (end - start)  # Pillow cuts fractions off
    step = 1 / (end - start)
    assert low - step < factors.min() < low + step
    assert high - step < factors.max() < high + step
    assert stats.kstest(factors, stats.uniform(low, high - low).cdf).statistic < 0.04 + step


def test_colour_jitters_order_is_any() -> None:
    orders = [tuple(Draws(["order", seed]).order(4)) for seed in range(2400)]
    counts = [orders.count(each) for each in sorted(set(orders))]
    assert len(counts) == 24
    assert stats.chisquare(counts).pvalue > 0.001


@pytest.mark.parametrize(("name", "theirs"), [("trivial_augment", "wide"), ("rand_augment", "usual")])
def test_automatic_operations_are_torchvisions_on_pillow(name: str, theirs: str) -> None:
    pixels = np.ascontiguousarray(PHOTO[:, 100:324, 200:424].numpy())
    image = Image.fromarray(pixels.transpose(1, 2, 0).copy())
    if theirs == "wide":
        space = autoaugment.TrivialAugmentWide()._augmentation_space(31)
        one = policy("trivial_augment")
    else:
        space = autoaugment.RandAugment()._augmentation_space(31, (224, 224))
        one = policy("rand_augment", operations=1, magnitude=17)
    names, seen = list(space), set()
    for seed in range(60):
        draws = one.draws(seed, DIGEST)
        magnitude = draws.integer(31) if theirs == "wide" else 17
        operation = names[draws.integer(14)]
        magnitudes, is_signed = space[operation]
        amount = float(magnitudes[magnitude]) if magnitudes.ndim else 0.0
        amount = -amount if draws.chance(0.5) and is_signed else amount
        expected = np.asarray(
            autoaugment._apply_op(image, operation, amount, InterpolationMode.BILINEAR, None)
        ).transpose(2, 0, 1)

        found = rendered(one, seed, torch.from_numpy(pixels), View(size=224, resize=224)).numpy()

        seen.add(operation)
        if operation in ("Rotate", "ShearX", "ShearY"):  # Pillow interpolates in float, and cuts at the edge
            assert (np.abs(found.astype(int) - expected) > 2).mean() < 0.02
        elif operation in ("Brightness", "Color", "Contrast", "Sharpness"):  # torchvision's magnitudes are float32
            assert np.abs(found.astype(int) - expected).max() <= 1
            assert (found != expected).mean() < 0.001
        else:
            assert np.array_equal(found, expected)
    assert len(seen) > 10


# --- geometry: one interpolation, the rest as the evaluation view has it ---


def test_whatever_draws_nothing_is_the_evaluation_view() -> None:
    plain = VIEW.render(PHOTO, DIGEST)
    still: dict[str, dict[str, Any]] = {
        "basic": {"rotation": 0, "brightness": 0, "contrast": 0, "crop": "centre"},
        "flip": {"probability": 0},
        "rotate": {"probability": 0},
        "zoom": {"amount": (0, 0)},
        "stretch": {"max_stretch": 0},
        "rotate_zoom": {"degrees": 0, "max_zoom": 1, "max_stretch": 0},
        "lighting": {"brightness": 0, "contrast": 0},
        "cutout": {"probability": 0},
        "blur": {"strength": (1, 1)},
        "color_jitter": {"brightness": 0, "contrast": 0, "saturation": 0, "hue": 0},
    }
    for name, params in still.items():
        for seed in range(4):
            assert torch.equal(rendered(policy(name, **params), seed), plain), name


def test_crops_and_positions_are_pieces_of_the_scaled_image() -> None:
    scaled = Geometry(size=64, resize=73, interpolation="bilinear", antialias=True).scaled(PHOTO)
    height, width = scaled.shape[1:]
    pieces = {
        scaled[:, top : top + 64, left : left + 64].contiguous().numpy().tobytes()
        for top in range(height - 63)
        for left in range(width - 63)
    }
    assert all(rendered("random_crop", seed).numpy().tobytes() in pieces for seed in range(8))
    assert len(pieces) > 400


@pytest.mark.parametrize("shape", [(73, 109), (500, 375), (40, 40), (1, 300), (300, 7)])
def test_crop_without_a_crop_is_the_whole_image_made_square(shape: tuple[int, int]) -> None:
    image = PHOTO.repeat(1, 2, 1)[:, : shape[0], : shape[1]].contiguous()
    geometry = Geometry(size=64, resize=73, interpolation="bilinear", antialias=True)
    still = policy("basic", rotation=0, brightness=0, contrast=0, crop="no")
    assert torch.equal(rendered(still, 0, image), geometry.fitted(geometry.scaled(image)))


def test_googlenets_crop_is_a_box_of_the_image_itself() -> None:
    still = policy("side_on", rotation=0, brightness=0, contrast=0, flip_probability=0, crop="googlenet", max_zoom=2)
    for seed in range(8):
        box = random_box(PHOTO.shape[1], PHOTO.shape[2], still.draws(seed, DIGEST))
        part = PHOTO[:, box.top : box.top + box.height, box.left : box.left + box.width]
        expected = torch.nn.functional.interpolate(part[None], (64, 64), mode="bilinear", antialias=True)[0]
        assert torch.equal(rendered(still, seed), expected)


def test_fastais_centre_crop_is_the_evaluation_views() -> None:
    pixels = torch.zeros(3, 3, 4, dtype=torch.uint8)
    pixels[:, 1, 2] = 230
    assert View(size=1, resize=3).render(pixels, DIGEST).flatten().tolist() == [230] * 3


def test_an_image_too_narrow_for_any_crop_is_refused_by_every_policy_that_scales_it() -> None:
    with pytest.raises(RenderError, match="20000 x 1 pixels would be"):
        View().with_seed("side_on", 0).render(torch.zeros(3, 1, 20000, dtype=torch.uint8), DIGEST)


@pytest.mark.parametrize("shape", [(1, 1), (1, 40), (9, 300), (64, 64)])
@pytest.mark.parametrize("name", EVERY)
def test_images_of_any_shape_can_be_augmented(name: str, shape: tuple[int, int]) -> None:
    image = PHOTO[:, : shape[0], : shape[1]]
    before = image.clone()
    for seed in range(2):
        found = rendered(name, seed, image, View(size=16, resize=18))
        assert (found.shape, found.dtype, found.is_contiguous()) == ((3, 16, 16), torch.uint8, True)
    assert torch.equal(image, before)


# --- several that follow one another ---


def test_changes_of_the_square_are_done_in_the_order_of_the_list() -> None:
    jitter, holes = ("blur", {"probability": 1}), ("cutout", {"probability": 1})
    first, second = rendered([jitter, holes], 3), rendered([holes, jitter], 3)
    black = (first == 0).all(0)
    assert black.sum() >= 16 * 16 // 4  # sharp holes come last
    assert not torch.equal(first, second)
    mirror = policy("flip", probability=1)
    assert torch.equal(rendered([mirror, mirror], 0), VIEW.render(PHOTO, DIGEST))


def test_a_box_that_is_cropped_and_changed_is_the_crop_changed() -> None:
    chain = policy([("random_resized_crop", {"flip_probability": 0}), ("flip", {"probability": 1})])
    draws = chain.draws(5, DIGEST)
    alone = Canvas(PHOTO, Geometry(size=64, resize=73, interpolation="bilinear", antialias=True))
    crop = BUILT_IN["random_resized_crop"]
    crop.method(alone, draws, **crop.checked("random_resized_crop", {"flip_probability": 0}))
    assert torch.equal(rendered(chain, 5), torch.from_numpy(mirrored(alone.finished().numpy()).copy()))


def brighter(image: Tensor, generator: torch.Generator) -> Tensor:
    return image.clamp(max=200) + torch.randint(55, (), generator=generator, dtype=torch.uint8)


def half(image: Tensor, generator: torch.Generator) -> Tensor:
    return image[:, ::2, ::2]


def test_a_persons_policy_may_come_first_or_later() -> None:
    first, later = policy([brighter, "flip"]), policy(["flip", brighter])
    assert first != later
    for chain in (first, later):
        assert chain.spelled is None
        assert chain.label == chain.name
        chain.check_unchanged()
        assert len({rendered(chain, seed).numpy().tobytes() for seed in range(4)}) > 1
    assert rendered([half, "flip"], 0).shape == (3, 64, 64)
    with pytest.raises(
        RenderError, match=r"the policy half returned \(3, 32, 32\) of a square \(3, 64, 64\).*put it before"
    ):
        rendered(["flip", half], 0)


def test_what_follows_one_another_is_named_and_flattened() -> None:
    word = "side_on:max_zoom=1.1,rotation=15+cutout:holes=2"
    made = policy([("side_on", {"rotation": 15, "max_zoom": 1.1}), ("cutout", {"holes": 2})])
    assert made == policy(word) == policy([policy("side_on", max_zoom=1.1, rotation=15.0), "cutout:holes=2"])
    assert made.name == "side_on+cutout"
    assert made.spelled == made.describe() == word
    assert repr(made) == "policy([policy('side_on', max_zoom=1.1, rotation=15.0), policy('cutout', holes=2)])"
    assert policy(["flip"]) == policy("flip")
    assert policy([made, ["flip"]]) == policy(f"{word}+flip")
    assert policy("flip+cutout") != policy("cutout+flip")
    again = Policy.from_facts(made.facts)
    assert again == made
    assert torch.equal(rendered(again, 3), rendered(made, 3))


# --- what they can be told ---


def test_parameters_of_one_value_make_one_policy_with_one_key() -> None:
    plain = policy("rotate", degrees=10, probability=1)
    for given in (
        {"degrees": np.float32(10), "probability": True + 0.0},
        {"degrees": 10.0, "probability": np.int64(1)},
    ):
        assert policy("rotate", **given) == plain
    assert policy("zoom", amount=(0, 0.1)) == policy("zoom")
    assert canonical_json(policy("zoom", amount=[-0.0, 0.1]).facts) == canonical_json(policy("zoom").facts)
    assert Augment("rotate:degrees=20", range(2), probability=1).policy == policy("rotate", degrees=20, probability=1)


@pytest.mark.parametrize(
    ("given", "params", "error", "sentence"),
    [
        (
            "rotate",
            {"angle": 3},
            ValueError,
            "the policy rotate has no parameter 'angle'; its parameters are degrees, prob",
        ),
        ("trivial_augment", {"bins": 3}, ValueError, "has no parameter 'bins'; it has no parameters"),
        (
            "rotate",
            {"degrees": 181},
            ValueError,
            "degrees of the policy rotate is 181; expected a number from 0 to 180",
        ),
        ("rotate", {"degrees": float("nan")}, ValueError, "is nan; expected a number from 0 to 180"),
        ("rotate", {"degrees": 10**400}, ValueError, "expected a number from 0 to 180"),
        ("rotate", {"degrees": "10"}, ValueError, "is '10'; expected a number"),
        (
            "flip",
            {"probability": True},
            ValueError,
            "probability of the policy flip is True; expected a number from 0 to 1",
        ),
        (
            "cutout",
            {"holes": 1.5},
            ValueError,
            "holes of the policy cutout is 1.5; expected a whole number from 1 to 100",
        ),
        ("side_on", {"crop": "center"}, ValueError, "is 'center'; expected random, centre, no or googlenet"),
        ("zoom", {"amount": (0.3, 0.1)}, ValueError, r"expected two numbers from 0 to 9, the smaller first"),
        ("zoom", {"amount": 0.3}, ValueError, "expected two numbers from 0 to 9"),
        ("blur", {"strength": (1, 2.5)}, ValueError, "expected two whole numbers from 1 to 50, the smaller first"),
        (
            "flip+cutout",
            {"holes": 2},
            TypeError,
            r"parameters holes are given for flip\+cutout; only one built-in policy",
        ),
        (policy("flip"), {"probability": 1}, TypeError, "the parameters probability are given for flip"),
        (brighter, {"by": 1}, TypeError, "the parameters by are given for brighter"),
        ("rotate:degrees", {}, ValueError, "degrees of the policy rotate is ''; expected a number"),
        ("rotate:degrees=", {}, ValueError, "degrees of the policy rotate is ''; expected a number"),
        ("rotate:degrees=1,degrees=2", {}, ValueError, "degrees is given twice"),
        ("flip+", {}, ValueError, "there is no augmentation policy ''; choose none, flip"),
        ("flip+none", {}, ValueError, "the policy none is the evaluation view and does nothing to others"),
        ([], {}, ValueError, "a list of no policies"),
        (7, {}, TypeError, "a name, a function or a list of these, not a int"),
    ],
)
def test_what_makes_no_policy_is_refused_in_words(
    given: Any, params: dict[str, Any], error: type[Exception], sentence: str
) -> None:
    with pytest.raises(error, match=sentence):
        policy(given, **params)


@pytest.mark.parametrize("name", NAMES)
def test_every_parameter_is_spelled_and_read_back(name: str) -> None:
    for word, parameter in BUILT_IN[name].params.items():
        values: list[Any]
        if isinstance(parameter, Span):
            values = [(parameter.end.low, parameter.end.high), (parameter.default[0], parameter.end.high)]
        else:
            values = [*parameter.words] if isinstance(parameter, Word) else [parameter.low, parameter.high]
        for value in values:
            made = policy(name, **{word: value})
            assert made.spelled is not None
            assert policy(made.spelled) == made == Policy.from_facts(made.facts)
            assert eval(repr(made), {"policy": policy}) == made


def test_a_word_is_completed() -> None:
    assert completed("ran") == ["random_resized_crop", "random_crop", "rand_augment"]
    assert completed("flip+cut") == ["flip+cutout"]
    assert completed("flip+cutout:holes=2,") == [f"flip+cutout:holes=2,{each}=" for each in BUILT_IN["cutout"].params]
    assert completed("cutout:le") == ["cutout:length="]
    assert completed("nothing:") == []
    assert read("cutout:length=0.5") == [("cutout", {"length": 0.5})]


# --- the same keys and views, always and everywhere ---

GOLDEN_FACTS: dict[str, Any] = {
    "flip": {"name": "flip", "params": {"probability": 0.5}, "version": 1},
    "random_resized_crop": {
        "name": "random_resized_crop",
        "params": {"area": [0.08, 1.0], "aspect": [3 / 4, 4 / 3], "attempts": 10, "flip_probability": 0.5},
        "version": 1,
    },
}


@pytest.mark.parametrize("name", GOLDEN_FACTS)
def test_facts_of_policies_are_those_of_every_release(name: str) -> None:
    assert canonical_json(policy(name).facts) == canonical_json(GOLDEN_FACTS[name])


GOLDEN_VIEWS = {
    "flip": "a8bf6ae17ff0715a",
    "random_resized_crop": "22d7e08e844d4539",
    "basic": "dff158cbc1038e18",
    "side_on": "9e1240dc28ab2f0d",
    "top_down": "7c7d21b6766cc6a1",
    "random_crop": "f846b6d11404379e",
    "rotate": "d15a248c6afb1eda",
    "zoom": "9972a2535754d31b",
    "stretch": "ee7cf71ee0dea495",
    "rotate_zoom": "9e212031efaf97a6",
    "lighting": "4bdddcb5bb99ceee",
    "dihedral": "ae0e40ca22753898",
    "cutout": "729df7518d00d511",
    "blur": "2ac8212f399f5234",
    "color_jitter": "806c7f977e30aaf3",
    "trivial_augment": "a9e7eea529e7790a",
    "rand_augment": "6c05710517f716fb",
    "side_on:max_zoom=1.3,crop=googlenet": "3b98c8c2b3cd0c09",
    "side_on:crop=no": "6369a6614cf939a8",
    "basic:crop=centre,pad=9,rotation_probability=1": "a4b24817dcf1777e",
    "rotate:probability=1+random_resized_crop+trivial_augment": "25a56cd856fcfc34",
}


@pytest.mark.parametrize("level", ["default", "avx2"])
def test_every_processor_and_every_release_gives_the_same_views(new_processes: Processes, level: str) -> None:
    lower = {"ATEN_CPU_CAPABILITY": level}
    if level == "default":
        features: Any = np._core._multiarray_umath  # type: ignore[attr-defined]
        lower["NPY_DISABLE_CPU_FEATURES"] = " ".join(
            name for name in features.__cpu_dispatch__ if features.__cpu_features__[name]
        )

    found = new_processes.call(digests_of_views, environment=lower)  # numpy asks for its level when it is imported

    assert found.pop("level").split()[:2] == ["DEFAULT"] if level == "default" else found.pop("level")
    assert found == GOLDEN_VIEWS


# Python 3.12 and later warn about every fork beside threads; that this one works is the claim.
@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
def test_views_are_the_same_by_any_number_of_threads_and_in_new_and_forked_processes(processes: Processes) -> None:
    images = ImageSet.from_arrays(np.stack([made_up().permute(1, 2, 0).numpy() + np.uint8(each) for each in range(6)]))
    expected = views_of(images, 0)
    assert len(expected) == 6 * len(EVERY)
    for workers in (1, 4):
        assert views_of(images, workers) == expected
    assert processes.call(views_of, images, 4) == expected
    with multiprocessing.get_context("fork").Pool(1) as pool:
        assert pool.apply(views_of, (images, 2)) == expected
