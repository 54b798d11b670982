"""Built-in policies: what each draws for an image, what it does with it, and what it can be told.

Another one is a function such as those here, in this file or one of its own, and its line in `BUILT_IN`; or it is in
another package, which names its `BuiltIn` as an entry point (see `plugins`). It draws what it needs from `draws`, which
is of the image's content and the seed, and tells the canvas: geometry is done first and in one step, changes of pixels
then to the square, each in the order in which it came. So several policies compose.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

from featstore.digest import Json
from featstore.images import filters, levels
from featstore.images.draws import AREA, ASPECT, ATTEMPTS, Box, Draws, random_box
from featstore.images.parameters import Number, Parameter, Span, Whole, Word
from featstore.images.warps import Affine, stretched, turned, warped
from featstore.plugins import POLICIES, plugged_in

if TYPE_CHECKING:
    from featstore.images.canvas import Canvas, Change

Method: TypeAlias = "Callable[..., None]"
"""``(canvas, draws, **params)``: what a policy does with an image."""


class BuiltIn(NamedTuple):
    """One entry of `BUILT_IN`.

    Attributes:
        method: what it does; the first line of its docstring tells people.
        version: of the method: another one for other pixels.
        params: what it can be told. With name and version the values are in every key.
        elsewhere: what it is called in fastai 0.7 or torchvision.
    """

    method: Method
    version: int
    params: Mapping[str, Parameter]
    elsewhere: str

    def checked(self, name: str, given: Mapping[str, Any]) -> dict[str, Json]:
        """The value of every parameter, the default where none is given.

        Raises:
            ValueError: for a parameter that `name`, this policy, hasn't, and for a value that it can't have.
        """
        for unknown in given.keys() - self.params.keys():
            can = f"its parameters are {', '.join(self.params)}" if self.params else "it has no parameters"
            raise ValueError(f"the policy {name} has no parameter {unknown!r}; {can}")
        values = {}
        for word, parameter in self.params.items():
            value = given.get(word, parameter.default)
            try:
                values[word] = parameter.checked(value)
            except (ValueError, OverflowError):
                raise ValueError(f"{word} of the policy {name} is {value!r}; expected {parameter.expected}") from None
        return values


# --- nothing, and the classics of torchvision ---


def unchanged(canvas: Canvas, draws: Draws) -> None:
    """The evaluation view."""


def flip(canvas: Canvas, draws: Draws, *, probability: float) -> None:
    """Mirrors left and right, or not."""
    if draws.chance(probability):
        canvas.change(filters.mirrored)


def random_resized_crop(
    canvas: Canvas,
    draws: Draws,
    *,
    area: tuple[float, float],
    aspect: tuple[float, float],
    attempts: int,
    flip_probability: float,
) -> None:
    """Resizes a box of random area, shape and place to the square, and mirrors it or not."""
    canvas.fit(random_box(canvas.height, canvas.width, draws, area=area, aspect=aspect, attempts=attempts))
    flip(canvas, draws, probability=flip_probability)


def color_jitter(
    canvas: Canvas, draws: Draws, *, brightness: float, contrast: float, saturation: float, hue: float
) -> None:
    """Changes brightness, contrast, saturation and hue by random factors (a hue: turns it), in random order."""
    methods: list[tuple[Callable[..., Any], float]] = [
        (levels.brightened, draws.uniform(max(0, 1 - brightness), 1 + brightness)),
        (levels.contrasted, draws.uniform(max(0, 1 - contrast), 1 + contrast)),
        (filters.saturated, draws.uniform(max(0, 1 - saturation), 1 + saturation)),
        (filters.hue_turned, draws.uniform(-hue, hue)),
    ]
    for place in draws.order(4):
        method, amount = methods[place]
        canvas.change(_by(method, amount))


# --- fastai's ---


def random_crop(canvas: Canvas, draws: Draws, *, max_zoom: float, zoom_probability: float, pad: int) -> None:
    """Zooms in or not, then cuts the square out at a random place."""
    _scale(canvas, draws, max_zoom, zoom_probability, pad)
    _cut(canvas, draws, "random")


def rotate(canvas: Canvas, draws: Draws, *, degrees: float, probability: float) -> None:
    """Turns about the middle by up to so many degrees, or not; what comes in at the edges is the mirror image."""
    if draws.chance(probability):
        canvas.warp(turned(draws.uniform(-degrees, degrees)))


def zoom(canvas: Canvas, draws: Draws, *, amount: tuple[float, float]) -> None:
    """Zooms into the middle, by 1 + a random amount."""
    factor = 1 + draws.uniform(*amount)
    canvas.warp(stretched(factor, factor))


def stretch(canvas: Canvas, draws: Draws, *, max_stretch: float) -> None:
    """Stretches in width or in height about the middle, by 1 + up to so much."""
    factor = 1 + draws.uniform(0, max_stretch)
    canvas.warp(stretched(factor, 1) if draws.chance(0.5) else stretched(1, factor))


def rotate_zoom(canvas: Canvas, draws: Draws, *, degrees: float, max_zoom: float, max_stretch: float) -> None:
    """One of rotate, zoom, stretch and nothing, all equally likely."""
    match draws.integer(4):
        case 0:
            rotate(canvas, draws, degrees=degrees, probability=1)
        case 1:
            zoom(canvas, draws, amount=(0, max_zoom - 1))
        case 2:
            stretch(canvas, draws, max_stretch=max_stretch)


def lighting(canvas: Canvas, draws: Draws, *, brightness: float, contrast: float) -> None:
    """Adds up to so much brightness (1 is black to white) and changes contrast by up to so much, around the mean."""
    added, more = draws.uniform(-brightness, brightness), draws.uniform(-contrast, contrast)
    canvas.change(lambda square: levels.lit(square, added, 1 + more if more >= 0 else 1 / (1 - more)))


def dihedral(canvas: Canvas, draws: Draws, *, flip_probability: float) -> None:
    """One of the four quarter turns, then mirrored or not."""
    times = draws.integer(4)
    canvas.change(lambda square: filters.quarter_turned(square, times))
    flip(canvas, draws, probability=flip_probability)


def cutout(canvas: Canvas, draws: Draws, *, holes: int, length: float, probability: float) -> None:
    """Blackens square holes whose middles are anywhere, or does nothing."""
    if not draws.chance(probability):
        return
    side = max(1, round(length * canvas.side))
    boxes = []
    for _ in range(holes):
        (top, height), (left, width) = (_part(draws.integer(canvas.side), side, canvas.side) for _ in range(2))
        boxes.append(Box(top, left, height, width))
    canvas.change(lambda square: filters.holed(square, boxes))


def blur(canvas: Canvas, draws: Draws, *, strength: tuple[int, int], probability: float) -> None:
    """Blurs by a Gaussian kernel of 2 * strength - 1 pixels, or not."""
    if draws.chance(probability):
        drawn = strength[0] + draws.integer(strength[1] - strength[0] + 1)
        canvas.change(lambda square: filters.blurred(square, drawn))


def basic(
    canvas: Canvas,
    draws: Draws,
    *,
    max_zoom: float,
    zoom_probability: float,
    pad: int,
    rotation: float,
    rotation_probability: float,
    brightness: float,
    contrast: float,
    crop: str,
) -> None:
    """Zooms in or not, turns or not, changes the lighting, and makes the square as `crop` says."""
    if crop == "googlenet":  # before the rest, of the image itself: a large one would be turned for hours
        canvas.fit(random_box(canvas.height, canvas.width, draws))
    else:
        _scale(canvas, draws, max_zoom, zoom_probability, pad)
    rotate(canvas, draws, degrees=rotation, probability=rotation_probability)
    lighting(canvas, draws, brightness=brightness, contrast=contrast)
    if crop != "googlenet":
        _cut(canvas, draws, crop)


def side_on(canvas: Canvas, draws: Draws, *, flip_probability: float, **params: Any) -> None:
    """As basic, and mirrored or not: photographs from the side."""
    basic(canvas, draws, **params)
    flip(canvas, draws, probability=flip_probability)


def top_down(canvas: Canvas, draws: Draws, *, flip_probability: float, **params: Any) -> None:
    """As basic, in one of eight positions: pictures from above, in which no side is up."""
    basic(canvas, draws, **params)
    dihedral(canvas, draws, flip_probability=flip_probability)


# --- automatic ones ---


def trivial_augment(canvas: Canvas, draws: Draws) -> None:
    """One of 14 operations on the square, each as strong as chance has it."""
    _operate(canvas, draws, draws.integer(_MOST + 1), _WIDE)


def rand_augment(canvas: Canvas, draws: Draws, *, operations: int, magnitude: int) -> None:
    """So many of 14 operations on the square, one after the other, each of this strength."""
    for _ in range(operations):
        _operate(canvas, draws, magnitude, _USUAL)


class _Limits(NamedTuple):
    """How far the operations of an automatic policy go at most."""

    shear: float
    shift: float  # in sides of the square
    degrees: float
    factor: float
    bits: int  # that posterising takes away


_MOST = 30
"""The magnitude at which operations go as far as they do."""

_WIDE = _Limits(shear=0.99, shift=32 / 224, degrees=135, factor=0.99, bits=6)
_USUAL = _Limits(shear=0.3, shift=150 / 331, degrees=30, factor=0.9, bits=4)


def _operate(canvas: Canvas, draws: Draws, magnitude: int, limits: _Limits) -> None:
    """One of torchvision's 14 operations, which are Pillow's."""
    place = draws.integer(14)
    signed = (-magnitude if draws.chance(0.5) else magnitude) / _MOST
    shift = int(signed * limits.shift * canvas.side)
    middle = (canvas.side - 1) / 2
    factor = 1 + signed * limits.factor
    operations: list[Change | None] = [
        None,
        _mapped(Affine(b=signed * limits.shear).about(-0.5, -0.5)),
        _mapped(Affine(d=signed * limits.shear).about(-0.5, -0.5)),
        _mapped(Affine(c=-shift)),
        _mapped(Affine(f=-shift)),
        _mapped(turned(signed * limits.degrees).about(middle, middle)),
        _by(levels.brightened, factor),
        _by(filters.saturated, factor),
        _by(levels.contrasted, factor),
        _by(filters.sharpened, factor),
        _by(levels.posterised, 8 - round(magnitude * limits.bits / _MOST)),
        _by(levels.solarised, 255 * (_MOST - magnitude) / _MOST),
        levels.stretched_to_full,
        levels.equalised,
    ]
    if (chosen := operations[place]) is not None:
        canvas.change(chosen)


# --- what several of them do ---


def _scale(canvas: Canvas, draws: Draws, max_zoom: float, probability: float, pad: int) -> None:
    canvas.scale(draws.uniform(1, max_zoom) if draws.chance(probability) else 1)
    if pad:
        canvas.pad(pad)


def _cut(canvas: Canvas, draws: Draws, crop: str) -> None:
    if crop == "no":
        canvas.fit()
    elif crop == "random":
        top = draws.integer(canvas.height - canvas.side + 1)
        canvas.crop(top, draws.integer(canvas.width - canvas.side + 1))


def _part(middle: int, length: int, side: int) -> tuple[int, int]:
    """Start and length of what lies within 0 ... side."""
    start, stop = max(0, middle - length // 2), min(side, middle - length // 2 + length)
    return start, stop - start


def _by(method: Callable[..., Any], amount: float) -> Change:
    return lambda square: method(square, amount)


def _mapped(where: Affine) -> Change:
    return lambda square: warped(square, where, square.shape[1], square.shape[2], "black")


# --- their names ---

_MAX_ZOOM = Number(1.0, 1.0, 10.0)
_HALF = Number(0.5)
_THREE_QUARTERS = Number(0.75)
_DEGREES = Number(10.0, 0.0, 180.0)
_LIGHTING: dict[str, Parameter] = {"brightness": Number(0.05), "contrast": Number(0.05)}
_SCALING: dict[str, Parameter] = {"max_zoom": _MAX_ZOOM, "zoom_probability": _THREE_QUARTERS, "pad": Whole(0, 0, 1000)}
_BASIC: dict[str, Parameter] = {
    **_SCALING,
    "rotation": _DEGREES,
    "rotation_probability": _THREE_QUARTERS,
    **_LIGHTING,
    "crop": Word("random", ("random", "centre", "no", "googlenet")),
}

BUILT_IN: dict[str, BuiltIn] = {
    "none": BuiltIn(unchanged, 1, {}, "CropType.CENTER"),
    "flip": BuiltIn(flip, 1, {"probability": _HALF}, "RandomFlip"),
    "random_resized_crop": BuiltIn(
        random_resized_crop,
        1,
        {
            "area": Span(AREA, Number(0, 0.001, 1.0)),
            "aspect": Span(ASPECT, Number(0, 0.01, 100.0)),
            "attempts": Whole(ATTEMPTS, 1, 1000),
            "flip_probability": _HALF,
        },
        "RandomResizedCrop of torchvision; CropType.GOOGLENET and RandomFlip",
    ),
    "basic": BuiltIn(basic, 1, _BASIC, "transforms_basic"),
    "side_on": BuiltIn(side_on, 1, {**_BASIC, "flip_probability": _HALF}, "transforms_side_on"),
    "top_down": BuiltIn(top_down, 1, {**_BASIC, "flip_probability": _HALF}, "transforms_top_down"),
    "random_crop": BuiltIn(random_crop, 1, _SCALING, "RandomScale, AddPadding and RandomCrop"),
    "rotate": BuiltIn(rotate, 1, {"degrees": _DEGREES, "probability": _THREE_QUARTERS}, "RandomRotate"),
    "zoom": BuiltIn(zoom, 1, {"amount": Span((0.0, 0.1), Number(0, 0.0, 9.0))}, "RandomZoom"),
    "stretch": BuiltIn(stretch, 1, {"max_stretch": Number(0.1, 0.0, 9.0)}, "RandomStretch"),
    "rotate_zoom": BuiltIn(
        rotate_zoom,
        1,
        {"degrees": _DEGREES, "max_zoom": Number(1.1, 1.0, 10.0), "max_stretch": Number(0.1, 0.0, 9.0)},
        "RandomRotateZoom",
    ),
    "lighting": BuiltIn(lighting, 1, _LIGHTING, "RandomLighting"),
    "dihedral": BuiltIn(dihedral, 1, {"flip_probability": _HALF}, "RandomDihedral"),
    "cutout": BuiltIn(cutout, 1, {"holes": Whole(1, 1, 100), "length": Number(0.25), "probability": _HALF}, "Cutout"),
    "blur": BuiltIn(blur, 1, {"strength": Span((5, 5), Whole(1, 1, 50)), "probability": _HALF}, "RandomBlur"),
    "color_jitter": BuiltIn(
        color_jitter,
        1,
        {
            "brightness": Number(0.4, 0.0, 10.0),
            "contrast": Number(0.4, 0.0, 10.0),
            "saturation": Number(0.4, 0.0, 10.0),
            "hue": Number(0.1, 0.0, 0.5),
        },
        "ColorJitter of torchvision",
    ),
    "trivial_augment": BuiltIn(trivial_augment, 1, {}, "TrivialAugmentWide of torchvision"),
    "rand_augment": BuiltIn(
        rand_augment, 1, {"operations": Whole(2, 1, 14), "magnitude": Whole(9, 0, _MOST)}, "RandAugment of torchvision"
    ),
}
"""All policies that have a name of featstore's own."""


def named(name: str) -> BuiltIn:
    """The policy of that name, of featstore's own or of an installed package's.

    Raises:
        ValueError: for a name that there is not.
    """
    if name in BUILT_IN:
        return BUILT_IN[name]
    plugins = plugged_in(POLICIES)
    if name in plugins:
        policy: BuiltIn = plugins[name].value
        return policy
    raise ValueError(f"there is no augmentation policy {name!r}; choose {', '.join([*BUILT_IN, *plugins])}")


def package_of(name: str) -> str | None:
    """The package, with its version, that brings the policy of that name; None for featstore's own."""
    return None if name in BUILT_IN else plugged_in(POLICIES)[name].package
