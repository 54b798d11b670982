"""Views: torchvision's geometry, the same bits everywhere, augmentation that follows from content and seed."""

from __future__ import annotations

import hashlib
import itertools
import pickle
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torchvision.transforms.v2.functional as v2
from PIL import Image
from sklearn.datasets import load_sample_images
from support.processes import Processes
from torch import Tensor
from torchvision.models import (
    ResNet34_Weights,
    ResNet50_Weights,
    SqueezeNet1_1_Weights,
    VGG16_Weights,
    ViT_B_32_Weights,
    ViT_H_14_Weights,
)
from torchvision.transforms import InterpolationMode
from torchvision.transforms._presets import ImageClassification, SemanticSegmentation

from featstore.digest import canonical_json
from featstore.images.draws import random_box
from featstore.images.views import INTERPOLATIONS, MAX_SEED, Augment, RenderError, View, policy

DIGEST = bytes(range(32))
PHOTOS = [torch.from_numpy(photo.copy()).permute(2, 0, 1) for photo in load_sample_images().images]  # (3, 427, 640)
SHAPES = [(427, 640), (640, 427), (100, 100), (37, 301), (301, 37), (256, 256), (224, 224), (1, 1), (257, 999)]
PRESETS = [
    ResNet34_Weights.DEFAULT,
    ResNet50_Weights.IMAGENET1K_V2,
    ViT_B_32_Weights.DEFAULT,
    ViT_H_14_Weights.IMAGENET1K_SWAG_E2E_V1,
    SqueezeNet1_1_Weights.DEFAULT,
    VGG16_Weights.IMAGENET1K_FEATURES,
]


def image(height: int, width: int, photo: int = 0) -> Tensor:
    tiles = PHOTOS[photo].repeat(1, -(-height // 427), -(-width // 640))
    return tiles[:, :height, :width].contiguous()


# --- the evaluation view against torchvision ---


@pytest.mark.parametrize("weights", PRESETS, ids=str)
def test_a_preset_gives_its_view(weights: Any) -> None:
    preset = weights.transforms()
    view = View.from_preset(preset)

    assert ([view.size], [view.resize]) == (preset.crop_size, preset.resize_size)
    assert (list(view.mean), list(view.std)) == (preset.mean, preset.std)
    assert (view.interpolation, view.antialias) == (preset.interpolation.value, preset.antialias)
    assert view.is_evaluation


@pytest.mark.parametrize(("height", "width"), SHAPES)
@pytest.mark.parametrize(("resize", "size"), [(256, 224), (232, 224), (64, 64), (57, 32)])
def test_geometry_is_torchvisions_pixel_for_pixel(height: int, width: int, resize: int, size: int) -> None:
    # With the nearest pixel, torchvision's arithmetic is exact, so equality shows that each pixel has its place.
    preset = ImageClassification(crop_size=size, resize_size=resize, interpolation=InterpolationMode.NEAREST)
    view = View.from_preset(preset)

    rendered = view.render(image(height, width), DIGEST)

    assert (rendered.dtype, rendered.shape) == (torch.uint8, (3, size, size))
    assert rendered.is_contiguous()
    assert torch.equal(view.normalise(rendered[None])[0], preset(image(height, width)))


@pytest.mark.parametrize("weights", PRESETS, ids=str)
@pytest.mark.parametrize("photo", [0, 1])
def test_pixels_are_those_of_torchvisions_uint8_resize(weights: Any, photo: int) -> None:
    view = View.from_preset(weights.transforms())
    mode = InterpolationMode(view.interpolation)
    if mode == InterpolationMode.BILINEAR and torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"):
        pytest.skip("here torchvision resizes in float")
    resized = v2.resize(PHOTOS[photo], [view.resize], interpolation=mode, antialias=view.antialias)

    rendered = view.render(PHOTOS[photo], DIGEST)

    assert torch.equal(rendered, v2.center_crop(resized, [view.size]))


@pytest.mark.parametrize("weights", PRESETS, ids=str)
def test_pixels_are_those_of_the_preset_but_for_rounding(weights: Any) -> None:
    # The preset itself resizes in float and rounds once; uint8 rounds, and clips what bicubic overshoots, after each
    # direction. In return it is the same on every CPU. A mean of 0 and a std of 1 / 255 show the preset's pixels.
    preset, view = weights.transforms(), View.from_preset(weights.transforms())
    preset.mean, preset.std = [0.0] * 3, [1 / 255] * 3

    difference = (view.render(PHOTOS[0], DIGEST) - preset(PHOTOS[0])).abs()

    assert difference.mean() < 0.2
    assert (difference > 1.01).float().mean() <= (0.001 if view.interpolation == "bicubic" else 0)


def cpu_level_digest() -> tuple[str, str]:
    """The level, and the digest of views of a made-up image, in all interpolations: many bits that could be wrong."""
    pixels = (torch.arange(3 * 97 * 141) * 2654435761 % 2**32 // 2**24).to(torch.uint8).reshape(3, 97, 141)
    digest = hashlib.sha256()
    for name, antialias, own in itertools.product(INTERPOLATIONS, (False, True), ("flip", "random_resized_crop")):
        view = View(size=64, resize=72, interpolation=name, antialias=antialias).with_seed(own, 1)
        digest.update(view.render(pixels, bytes(32)).numpy().tobytes())
    return torch.backends.cpu.get_cpu_capability(), digest.hexdigest()


def test_every_cpu_level_and_every_release_gives_the_same_bits(processes: Processes) -> None:
    lowest = processes.call(cpu_level_digest, environment={"ATEN_CPU_CAPABILITY": "default"})

    assert lowest == ("DEFAULT", GOLDEN_DIGEST)
    assert cpu_level_digest()[1] == GOLDEN_DIGEST


GOLDEN_DIGEST = "51958667332e9f824f03f2a7b1d2427802b0a37197d468a93270e65bc85eca66"


def test_strides_of_the_image_dont_matter() -> None:
    rows = PHOTOS[0]
    planes = rows.contiguous()
    assert rows.stride() != planes.stride()

    for view in (View(), View(interpolation="bicubic"), View().with_seed("random_resized_crop", 0)):
        assert torch.equal(view.render(rows, DIGEST), view.render(planes, DIGEST))


def test_a_view_shares_no_memory_with_its_image() -> None:
    square = image(224, 224)
    before = square.clone()

    View(size=224, resize=224).render(square, DIGEST).zero_()

    assert torch.equal(square, before)


def test_an_image_too_narrow_to_resize_is_refused_not_tried() -> None:
    with pytest.raises(RenderError, match=r"20000 x 1 pixels would be 5,120,000 x 256.*at most 178,956,970"):
        View().render(torch.zeros(3, 1, 20000, dtype=torch.uint8), DIGEST)


@pytest.mark.parametrize("wrong", [torch.zeros(3, 4, 4), torch.zeros(4, 4, 3, dtype=torch.uint8)])
def test_only_uint8_images_are_rendered(wrong: Tensor) -> None:
    with pytest.raises(ValueError, match=r"expected uint8 \(3, H, W\)"):
        View().render(wrong, DIGEST)


def test_normalise_takes_what_the_view_rendered() -> None:
    with pytest.raises(ValueError, match=r"expected uint8 \(N, 3, 224, 224\)"):
        View().normalise(torch.zeros(1, 3, 192, 192, dtype=torch.uint8))
    with pytest.raises(ValueError, match="expected uint8"):
        View().normalise(torch.zeros(1, 3, 224, 224))


# --- augmented views ---


def test_flip_mirrors_the_evaluation_view_half_the_time() -> None:
    view, photo = View(size=32, resize=36), image(50, 70)
    plain = view.render(photo, DIGEST)
    flipped = view.with_seed("flip", 0)

    results = [flipped.render(photo, hashlib.sha256(bytes([number])).digest()) for number in range(200)]

    mirrored = sum(torch.equal(result, plain.flip(-1)) for result in results)
    assert mirrored + sum(torch.equal(result, plain) for result in results) == 200
    assert 70 < mirrored < 130  # five standard deviations are 35


def test_random_resized_crop_is_the_drawn_box_resized_then_perhaps_mirrored() -> None:
    photo = image(200, 300)
    mirrored = 0
    for seed in range(40):
        view = View(size=48, resize=56).with_seed("random_resized_crop", seed)
        draws = policy("random_resized_crop").draws(seed, DIGEST)
        box = random_box(200, 300, draws)
        is_mirrored = draws.uniform(0, 1) < 0.5
        part = v2.crop(photo, *box)
        expected = torch.nn.functional.interpolate(part[None], (48, 48), mode="bilinear", antialias=True)[0]

        rendered = view.render(photo, DIGEST)

        assert rendered.is_contiguous()
        assert torch.equal(rendered, expected.flip(-1) if is_mirrored else expected)
        mirrored += is_mirrored
    assert 8 <= mirrored <= 32


def test_content_and_seed_decide_and_nothing_else() -> None:
    photo = image(90, 120)
    views = [View(size=24, resize=28).with_seed("random_resized_crop", seed) for seed in range(6)]
    first = [view.render(photo, DIGEST) for view in views]
    torch.manual_seed(99)

    again = [view.render(photo, DIGEST) for view in reversed(views)]

    assert all(torch.equal(*pair) for pair in zip(first, reversed(again), strict=True))
    assert len({result.numpy().tobytes() for result in first}) == 6
    assert not torch.equal(views[0].render(photo, bytes(32)), first[0])


def test_rendering_leaves_global_random_state_alone() -> None:
    state = torch.get_rng_state()

    for name in ("flip", "random_resized_crop"):
        View().with_seed(name, 0).render(PHOTOS[0], DIGEST)

    assert torch.equal(torch.get_rng_state(), state)


def top_left(image: Tensor, generator: torch.Generator) -> Tensor:
    return image[:, : 30 + int(torch.randint(10, (), generator=generator)), :50]


def test_a_persons_policy_comes_before_the_evaluation_geometry() -> None:
    view = View(size=24, resize=28)
    own = view.with_seed(top_left, 4)
    assert own.policy is not None

    rendered = own.render(PHOTOS[0], DIGEST)

    assert torch.equal(rendered, view.render(own.policy.apply(PHOTOS[0], 4, DIGEST), DIGEST))


def test_a_failing_policy_is_named() -> None:
    def picky(image: Tensor, generator: torch.Generator) -> Tensor:
        if image.shape[1] != 240:
            raise RuntimeError("not my size")
        return image

    with pytest.raises(RenderError, match="the policy picky failed: RuntimeError: not my size"):
        View().with_seed(picky, 0).render(PHOTOS[0], DIGEST)


# --- fields and facts ---

SEVERAL = [
    View(),
    View(size=192, resize=192, interpolation="bicubic", antialias=False, apply_exif=False),
    View(mean=(0, 0, 0), std=(1, 1, 1), interpolation="nearest"),
    View().with_seed("flip", 0),
    View().with_seed("random_resized_crop", 12),
    View().with_seed(top_left, 1),
]


@pytest.mark.parametrize("view", SEVERAL, ids=View.label)
def test_facts_hold_everything_and_give_the_view_back(view: View) -> None:
    canonical_json(view.facts())
    again = View.from_facts(view.facts())

    assert again == view
    assert again.facts() == view.facts()
    assert hash(again) == hash(view)


def test_every_field_is_in_the_facts() -> None:
    base = View()
    others = [
        View(size=200),
        View(resize=257),
        View(interpolation="bicubic"),
        View(antialias=False),
        View(mean=(0.5, 0.456, 0.406)),
        View(std=(0.5, 0.224, 0.225)),
        View(apply_exif=False),
        base.with_seed("flip", 0),
        base.with_seed("flip", 1),
        base.with_seed("random_resized_crop", 1),
        base.with_seed(top_left, 1),
    ]

    assert len({canonical_json(view.facts()) for view in [base, *others]}) == 12
    for view in others:
        assert base.differences(view)
    assert base.differences(View()) == []


def test_an_evaluation_views_facts_hold_no_policy_and_no_seed() -> None:
    assert View().with_seed("flip", 3).evaluation.facts() == View().facts()
    assert not {"policy", "seed"} & View().facts().keys()


def test_equal_values_have_equal_facts() -> None:
    assert View(interpolation="nearest", antialias=True) == View(interpolation="nearest", antialias=False)
    assert canonical_json(View(mean=(0, 0, 0)).facts()) == canonical_json(View(mean=(0.0, 0.0, 0.0)).facts())
    assert View(mean=[0.1, 0.2, 0.3]) == View(mean=(0.1, 0.2, 0.3))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("given", "plain"),
    [
        ({"apply_exif": 1}, {"apply_exif": True}),
        ({"apply_exif": np.False_}, {"apply_exif": False}),
        ({"antialias": 0}, {"antialias": False}),
        ({"size": np.int64(192), "resize": np.uint8(200)}, {"size": 192, "resize": 200}),
        ({"mean": np.array([0.5, -0.0, 0.25], dtype=np.float32)}, {"mean": (0.5, 0.0, 0.25)}),
        ({"policy": policy("flip"), "seed": np.int32(3)}, {"policy": policy("flip"), "seed": 3}),
    ],
)
def test_values_that_are_equal_in_python_have_equal_facts(given: dict[str, Any], plain: dict[str, Any]) -> None:
    assert View(**given) == View(**plain)
    assert canonical_json(View(**given).facts()) == canonical_json(View(**plain).facts())


def test_facts_of_another_version_or_another_thing_are_refused() -> None:
    with pytest.raises(ValueError, match="a view of version 2; this featstore has version 1"):
        View.from_facts({**View().facts(), "version": 2})
    with pytest.raises(ValueError, match="the facts of a view are"):
        View.from_facts({**View().facts(), "rotation": 3})


def test_differences_are_in_words() -> None:
    mine, other = View(), View(size=192, resize=219, apply_exif=False).with_seed("flip", 2)

    assert mine.differences(other) == [
        ("size", "224", "192"),
        ("resize", "256", "219"),
        ("EXIF orientation", "applied", "ignored"),
        ("augmentation", "none", "flip"),
        ("seed", "none", "2"),
    ]


@pytest.mark.parametrize(
    ("change", "size", "resize"),
    [
        ({"size": 112}, 112, 128),
        ({"size": 299}, 299, 342),  # 341.71
        ({"size": 7}, 7, 8),
        ({"resize": 300}, 224, 300),
        ({"size": 64, "resize": 64}, 64, 64),
        ({}, 224, 256),
    ],
)
def test_a_size_alone_takes_the_resize_along(change: dict[str, int], size: int, resize: int) -> None:
    view = View().resized(**change)

    assert (view.size, view.resize) == (size, resize)


def test_half_a_pixel_of_resize_is_rounded_up() -> None:
    assert View(size=2, resize=3).resized(size=3).resize == 5


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"size": 256, "resize": 224}, "resize 224 is less than size 256"),
        ({"size": 0}, "size is 0; expected an integer from 1 on"),
        ({"size": 224.0}, r"size is 224.0"),
        ({"antialias": None}, "antialias is None; expected True or False"),
        ({"apply_exif": 2}, "apply_exif is 2; expected True or False"),
        ({"interpolation": "lanczos"}, "interpolation 'lanczos' is none of bilinear, bicubic"),
        ({"std": (1, 0, 1)}, "not above 0"),
        ({"mean": (0.5, 0.5)}, "expected three finite numbers"),
        ({"mean": (0.5,), "std": (0.5,)}, "expected three finite numbers"),
        ({"channels": 1, "mean": (0.1, 0.2, 0.3)}, "expected one finite number, for gray"),
        ({"channels": 2}, "channels is 2; expected 3, for R, G and B, or 1, for gray"),
        ({"channels": True}, "channels is True; expected an integer"),
        ({"decode": "other"}, "decode policy 'other' is unknown"),
        ({"seed": 3}, "belong together"),
        ({"policy": policy("flip")}, "belong together"),
        ({"policy": policy("flip"), "seed": -1}, "seed is -1"),
        ({"policy": policy("flip"), "seed": 2**63}, r"seed 9223372036854775808 is too large; expected at most 2\*\*63"),
        ({"policy": policy("flip"), "seed": 10**5000}, r"seed a number of 16,610 bits is too large; .* give a smaller"),
        ({"policy": policy("none"), "seed": 0}, "the policy none has no seeds"),
    ],
)
def test_fields_that_make_no_view_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        View(**fields)


def test_a_smaller_resize_alone_is_refused() -> None:
    with pytest.raises(ValueError, match="resize 200 is less than size 224"):
        View().resized(resize=200)


@pytest.mark.parametrize("change", [{"size": 0}, {"resize": 0}])
def test_no_pixels_are_refused_and_not_taken_for_no_change(change: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="ize is 0; expected an integer from 1 on"):
        View().resized(**change)


def test_other_presets_are_refused() -> None:
    with pytest.raises(TypeError, match="no preset for image classification: it has no crop_size"):
        View.from_preset(SemanticSegmentation(resize_size=520))
    oblong = ImageClassification(crop_size=224)
    oblong.crop_size = [224, 192]
    with pytest.raises(ValueError, match="expected one side"):
        View.from_preset(oblong)


@pytest.mark.parametrize("view", SEVERAL, ids=View.label)
def test_views_pickle(view: View) -> None:
    again = pickle.loads(pickle.dumps(view))

    assert again == view
    assert torch.equal(again.render(PHOTOS[1], DIGEST), view.render(PHOTOS[1], DIGEST))


# --- Augment ---


def test_seeds_are_distinct_and_sorted() -> None:
    augment = Augment("flip", seeds=np.array([3, 0, 3, 1]))

    assert augment.seeds == (0, 1, 3)
    assert not augment.is_fresh
    assert augment == Augment(policy("flip"), seeds=iter((0, 1, 3)))
    assert [view.seed for view in augment.views(View().with_seed("random_resized_crop", 9))] == [0, 1, 3]
    assert {view.policy for view in augment.views(View())} == {policy("flip")}


def test_fresh_seeds_have_no_fixed_views() -> None:
    augment = Augment(top_left, "fresh")

    assert augment.is_fresh
    with pytest.raises(ValueError, match="fresh seeds have no fixed views"):
        augment.views(View())


@pytest.mark.parametrize(
    ("name", "seeds", "error", "message"),
    [
        ("flip", 4, TypeError, 'neither integers, such as range\\(4\\), nor "fresh"'),
        ("flip", "0-3", TypeError, "seeds '0-3' are neither"),
        ("flip", [], ValueError, "one or more integers from 0 on"),
        ("flip", [-1, 2], ValueError, "one or more integers from 0 on"),
        ("flip", [0.5], TypeError, "integer"),
        ("flip", [0, 2**63], ValueError, r"seed 9223372036854775808 is too large; expected at most 2\*\*63 - 1"),
        ("flip", [10**300], ValueError, "seed a number of 997 bits is too large"),
        ("sideon", range(4), ValueError, "choose none, flip, random_resized_crop"),
        ("none", range(4), ValueError, "the policy none has no seeds"),
    ],
)
def test_what_is_no_augmentation_is_refused(name: str, seeds: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        Augment(name, seeds)


def test_the_largest_seed_has_a_view() -> None:
    (view,) = Augment("flip", [MAX_SEED]).views(View())
    assert view.seed == MAX_SEED == 2**63 - 1
    assert View.from_facts(view.facts()) == view


def test_seeds_have_no_default() -> None:
    with pytest.raises(TypeError, match="seeds"):
        Augment("flip")  # type: ignore[call-arg]


def test_the_callers_default_type_does_not_change_a_models_input() -> None:
    batch = torch.arange(2 * 3 * 8 * 8, dtype=torch.uint8).reshape(2, 3, 8, 8)
    view = View(size=8, resize=8)
    expected = view.normalise(batch)
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.float64)
        found = view.normalise(batch)
    finally:
        torch.set_default_dtype(before)
    assert found.dtype == torch.float32
    assert torch.equal(found, expected)


# --- gray views ---


def test_a_gray_view_is_what_pillow_makes_of_the_square_bit_for_bit() -> None:
    levels = torch.arange(0, 256, 5, dtype=torch.uint8)
    colours = torch.cartesian_prod(levels, levels, levels).T.reshape(3, 52 * 26, 104)  # all corners of the cube
    view = View(size=104, resize=104, channels=1)
    for top in range(0, 52 * 26, 104):
        square = colours[:, top : top + 104]
        expected = np.array(Image.fromarray(square.permute(1, 2, 0).numpy()).convert("L"))
        assert np.array_equal(view.render(square, DIGEST).numpy(), expected[None])


@pytest.mark.parametrize("seed", [None, 0, 1])
def test_a_gray_view_is_the_coloured_one_made_gray_at_the_end(seed: int | None) -> None:
    view = View(size=48, resize=56)
    gray = replace(view, channels=1)
    if seed is not None:
        view, gray = (each.with_seed("random_resized_crop", seed) for each in (view, gray))
    coloured = view.render(PHOTOS[0], DIGEST).permute(1, 2, 0).numpy()
    rendered = gray.render(PHOTOS[0], DIGEST)
    assert np.array_equal(rendered.numpy(), np.array(Image.fromarray(coloured).convert("L"))[None])
    assert rendered.is_contiguous()
    batch = rendered[None]
    assert torch.equal(gray.normalise(batch), (batch.float() / 255 - 0.5) / 0.5)
    with pytest.raises(ValueError, match=r"expected uint8 \(N, 1, 48, 48\)"):
        gray.normalise(torch.zeros(1, 3, 48, 48, dtype=torch.uint8))


def test_gray_pictures_stay_as_they_are_in_gray_views() -> None:
    picture = torch.arange(256, dtype=torch.uint8).reshape(1, 16, 16)
    assert torch.equal(View(size=16, resize=16, channels=1).render(picture.repeat(3, 1, 1), DIGEST), picture)


def test_a_squashed_view_shows_the_whole_image_also_to_a_policy() -> None:
    landscape = image(30, 52)
    view = View(size=16, resize=20, squash=True)
    whole = torch.nn.functional.interpolate(landscape[None], size=(20, 20), mode="bilinear", antialias=True)[0]
    expected = whole[:, 2:18, 2:18]
    assert torch.equal(view.render(landscape, DIGEST), expected)
    flipped = [view.with_seed("flip", seed).render(landscape, DIGEST) for seed in range(8)]
    assert all(any(torch.equal(each, other) for other in (expected, expected.flip(2))) for each in flipped)
    assert torch.equal(View(size=16, resize=20).render(image(30, 30), DIGEST), view.render(image(30, 30), DIGEST))


def test_that_a_view_is_squashed_is_a_fact_where_it_is() -> None:
    squashed = View(squash=1)  # type: ignore[arg-type]
    assert squashed.facts() == {**View().facts(), "squash": True}
    assert "squash" not in View().facts()
    assert View.from_facts(squashed.facts()) == squashed
    assert View().differences(squashed) == [("squashed", "no", "yes")]


def test_channels_are_a_fact_of_gray_views_alone() -> None:
    gray = View(channels=1, mean=(0.1,), std=(0.3,))
    assert gray.facts() == {**View().facts(), "channels": 1, "mean": [0.1], "std": [0.3]}
    assert "channels" not in View().facts()
    for view in (gray, View(channels=1), View()):
        assert View.from_facts(view.facts()) == view
        assert view.evaluation == view.resized() == view
    assert View().differences(View(channels=1)) == [
        ("channels", "3", "1"),
        ("mean", "0.485, 0.456, 0.406", "0.5"),
        ("std", "0.229, 0.224, 0.225", "0.5"),
    ]
