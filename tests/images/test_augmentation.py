"""Policies: draws that follow from their key alone, and what a person's own function is keyed by."""

from __future__ import annotations

import os
import pickle
import random
import secrets
import sys
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy import stats  # type: ignore[import-untyped]
from support.own_modules import module_of
from torch import Tensor
from torchvision.transforms import RandomResizedCrop, v2

from featstore.images.augmentation import Policy, policy
from featstore.images.draws import ASPECT, Draws, random_box

DIGEST = bytes(range(32))
IMAGE = torch.arange(3 * 40 * 50).reshape(3, 40, 50).to(torch.uint8)


# --- draws ---


def test_draws_follow_from_their_key_alone() -> None:
    first, again, other = Draws(["a", 1]), Draws(["a", 1]), Draws(["a", 2])

    numbers = [first.uniform(0, 1) for _ in range(5)]

    assert numbers == [again.uniform(0, 1) for _ in range(5)]
    assert len(set(numbers) | {other.uniform(0, 1)}) == 6


def test_draws_are_those_of_every_release() -> None:
    draws = Draws(["policy", 0, "00"])

    assert [draws.uniform(0, 1), draws.integer(1000), draws.uniform(-1, 1)] == [
        0.011679781640305253,
        849,
        0.4009897392066575,
    ]


def test_draws_are_uniform() -> None:
    draws = Draws("uniform")
    assert stats.kstest([draws.uniform(2, 5) for _ in range(4000)], stats.uniform(2, 3).cdf).pvalue > 0.01
    assert stats.chisquare(np.bincount([draws.integer(7) for _ in range(7000)], minlength=7)).pvalue > 0.01


@pytest.mark.parametrize(("height", "width"), [(427, 640), (640, 427), (100, 1000), (32, 32)])
def test_random_boxes_are_distributed_as_torchvisions(height: int, width: int) -> None:
    draws = Draws([height, width])
    ours = np.array([random_box(height, width, draws) for _ in range(3000)])
    state = torch.get_rng_state()
    torch.manual_seed(0)
    image = torch.empty(3, height, width)
    theirs = np.array([RandomResizedCrop.get_params(image, [0.08, 1.0], list(ASPECT)) for _ in range(3000)])
    torch.set_rng_state(state)

    assert (ours[:, :2] >= 0).all()
    assert (ours[:, 0] + ours[:, 2] <= height).all()
    assert (ours[:, 1] + ours[:, 3] <= width).all()
    for column in range(4):
        assert stats.ks_2samp(ours[:, column], theirs[:, column]).pvalue > 0.001
    areas, their_areas = ours[:, 2] * ours[:, 3], theirs[:, 2] * theirs[:, 3]
    assert stats.ks_2samp(areas, their_areas).pvalue > 0.001
    if height == width:
        assert areas.min() < 0.1 * height * width
        assert areas.max() > 0.95 * height * width
    aspects = ours[:, 3] / ours[:, 2]
    if height > 32:  # whole pixels widen the range in small images
        assert aspects.min() > 0.74
        assert aspects.max() < 1.35


@pytest.mark.parametrize(("height", "width"), [(1, 1000), (1000, 1), (2, 3)])
def test_a_box_that_never_fits_is_torchvisions_central_one(height: int, width: int) -> None:
    box = random_box(height, width, Draws([height, width, "fallback"]))

    assert 1 <= box.height <= height
    assert 1 <= box.width <= width
    if height == 1:
        assert box == (0, (width - 1) // 2, 1, round(4 / 3))


# --- built-in policies ---


def test_an_unknown_name_is_refused_with_the_known_ones() -> None:
    with pytest.raises(
        ValueError, match=r"no augmentation policy 'sideon'; choose none, flip, random_resized_crop, basic"
    ):
        policy("sideon")


def test_facts_give_the_policy_back() -> None:
    for name in ("none", "flip", "random_resized_crop"):
        assert Policy.from_facts(policy(name).facts) == policy(name)


def test_another_version_or_parameter_is_another_policy() -> None:
    facts = policy("flip").facts

    for changed in ({**facts, "version": 2}, {**facts, "params": {"probability": 0.25}}):
        assert Policy.from_facts(changed) != policy("flip")


# --- a person's own policy ---


def darker(image: Tensor, generator: torch.Generator) -> Tensor:
    """Halves an image, or not."""
    return image // 2 if torch.rand(1, generator=generator) < 0.5 else image  # drawn once


OWN = '''\
from operator import floordiv as divide

from torch.nn.functional import pad

WIDTH = 3
BY = 2


def border(image):
    return pad(image, (WIDTH,) * 4)


def own(image, generator, value=BY):
    """Adds a border."""
    return divide(border(image), value)
'''


@pytest.fixture
def identity(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], str]:
    """The identity of the function `own` of a source text, each text in a folder of its own."""

    def of(source: str) -> str:
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        folder.mkdir()
        monkeypatch.setitem(sys.modules, "own_policy", ModuleType("own_policy"))
        return policy(module_of(folder, source).own).identity

    return of


def test_comments_docstrings_and_layout_dont_matter(identity: Callable[[str], str]) -> None:
    changed = OWN.replace('    """Adds a border."""\n', "    # other words\n\n").replace(
        "border(image), ", "border( image ),\n        "
    )
    assert changed != OWN

    assert identity(changed) == identity("\n\n# a comment\n" + OWN) == identity(OWN)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("border(image), value", "border(image), value + 1"),
        ("BY = 2", "BY = 3"),
        ("WIDTH = 3", "WIDTH = 4"),
        ("(WIDTH,) * 4", "(WIDTH,) * 2"),
        ("floordiv", "mod"),
    ],
)
def test_code_defaults_globals_and_called_functions_matter(identity: Callable[[str], str], old: str, new: str) -> None:
    changed = OWN.replace(old, new)
    assert changed != OWN

    assert identity(changed) != identity(OWN)


def test_own_modules_that_a_policy_uses_matter(identity: Callable[[str], str], tmp_path: Path) -> None:
    source = "import beside\n\ndef own(image, generator):\n    return image // beside.by()\n"
    identities = []
    for number in (2, 3):
        (folder := tmp_path / f"beside{number}").mkdir()
        module_of(folder, f"def by():\n    return {number}\n", "beside")
        identities.append(identity(source))
    del sys.modules["beside"]

    assert identities[0] != identities[1]


def test_captured_values_matter_and_need_a_form() -> None:
    def divided_by(divisor: Any) -> Callable[[Tensor, torch.Generator], Tensor]:
        return lambda image, generator: image // divisor

    assert policy(divided_by(2)) == policy(divided_by(2))
    assert policy(divided_by(2)) != policy(divided_by(3))
    two, three = (torch.tensor(number, dtype=torch.uint8) for number in (2, 3))
    assert policy(divided_by(two)) == policy(divided_by(two.clone())) != policy(divided_by(three))
    with pytest.raises(ValueError, match=r"can't be keyed: it uses divisor, a uint8.*fingerprint"):
        policy(divided_by(np.uint8(2)))


SETTINGS = """\
STRENGTH = 2

class Config:
    amount = 2

def divided(image):
    return image // STRENGTH
"""


@pytest.mark.parametrize(
    ("source", "change"),
    [
        ("return image // settings.STRENGTH", "settings.STRENGTH = 3"),
        ("return settings.divided(image)", "settings.STRENGTH = 3"),
        ("return image // settings.Config.amount", "settings.Config.amount = 3"),
        ("return image // Config.amount", "Config.amount = 3"),
        ("import settings as late; return image // late.STRENGTH", "settings.STRENGTH = 3"),
        ("from settings import STRENGTH; return image // STRENGTH", "settings.STRENGTH = 3"),
        ("return image // own.amount", "own.amount = 3"),
        ("return image // AMOUNT", "AMOUNT = 3"),
        ("return (lambda: image // AMOUNT)()", "AMOUNT = 3"),
    ],
)
def test_what_a_policy_reads_and_finds_changed_is_another_policy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, change: str
) -> None:
    for name in ("own_policy", "settings"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    module_of(tmp_path, SETTINGS, "settings")
    head = "import settings\nfrom settings import Config\nAMOUNT = 2\n"
    module = module_of(tmp_path, f"{head}def own(image, generator):\n    {source}\nown.amount = 2\n")
    before = policy(module.own)
    before.check_unchanged()

    exec(change, vars(module))

    assert policy(module.own) != before
    with pytest.raises(ValueError, match=r"policy own has changed since this Augment was made.*make it again"):
        before.check_unchanged()


def test_own_modules_that_hold_each_other_can_be_keyed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("own_policy", "settings"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    module = module_of(
        tmp_path, "import settings\ndef own(image, generator):\n    return settings.back.AMOUNT * image\n"
    )
    settings = module_of(tmp_path, "", "settings")
    vars(module).update(settings=settings, back=settings, AMOUNT=1)
    vars(settings).update(back=module)
    before = policy(module.own)
    vars(module).update(AMOUNT=2)
    assert policy(module.own) != before


@dataclass
class Amount:
    by: int = 2

    def of(self, image: Tensor) -> Tensor:
        return image // self.by


def with_dataclass(image: Tensor, generator: torch.Generator) -> Tensor:
    return Amount().of(image)


def test_a_policy_that_makes_a_dataclass_is_keyed_by_its_attributes(monkeypatch: pytest.MonkeyPatch) -> None:
    before = policy(with_dataclass)
    monkeypatch.setattr(Amount, "by", 3)
    assert policy(with_dataclass) != before


@torch.no_grad()
def decorated(image: Tensor, generator: torch.Generator) -> Tensor:
    return image // FACTOR


FACTOR = 2


def test_a_policy_with_a_decorator_of_torchs_is_keyed_by_what_it_decorates(monkeypatch: pytest.MonkeyPatch) -> None:
    before = policy(decorated)
    monkeypatch.setitem(globals(), "FACTOR", 3)
    assert policy(decorated) != before


def test_a_function_that_calls_itself_has_a_key(identity: Callable[[str], str]) -> None:
    source = (
        "def own(image, generator, depth=2):\n    return own(image // 2, generator, depth - 1) if depth else image\n"
    )

    assert identity(source) == identity(source)


class Darker:
    def __init__(self, fingerprint: Any) -> None:
        self.fingerprint = fingerprint

    def __call__(self, image: Tensor, generator: torch.Generator) -> Tensor:
        return image // 2


def test_a_fingerprint_replaces_the_source() -> None:
    assert policy(Darker("v1")) == policy(Darker(lambda: "v1")) != policy(Darker("v2"))
    assert policy(Darker("v1")).facts == {"name": "Darker", "fingerprint": "v1"}
    with pytest.raises(ValueError, match="fingerprint of the policy Darker is 3"):
        policy(Darker(3))


def test_what_has_no_source_needs_a_fingerprint() -> None:
    namespace: dict[str, Any] = {}
    exec("def typed_in(image, generator):\n    return image // 2\n", namespace)

    with pytest.raises(ValueError, match=r"typed_in can't be keyed: its source can't be found.*fingerprint"):
        policy(namespace["typed_in"])
    with pytest.raises(ValueError, match=r"Darker can't be keyed: it is a Darker, not a plain function"):
        policy(Darker(None))


def test_a_file_edited_since_its_import_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "own_policy", ModuleType("own_policy"))
    module = module_of(tmp_path, OWN)
    (tmp_path / "own_policy.py").write_text(OWN.replace("border(image), value", "border(image), value + 1"))

    with pytest.raises(ValueError, match="no longer what was imported"):
        policy(module.own)


GENERATORS = np.random.default_rng()
numpys = np.random.default_rng


def test_random_numbers_from_elsewhere_are_refused() -> None:
    with pytest.raises(ValueError, match="two results for one image and one generator"):
        policy(lambda image, generator: image // int(GENERATORS.integers(1, 200)))


@pytest.mark.parametrize(
    ("function", "whose"),
    [
        (lambda image, generator: image // int(torch.randint(1, 200, ())), "torch"),
        (lambda image, generator: image // np.random.randint(1, 200), "numpy"),  # noqa: NPY002
        (lambda image, generator: image // random.randint(1, 200), "Python"),
        (
            lambda image, generator: (
                image + int(torch.rand(1, generator=generator) < 0.5) * int(torch.randint(0, 200, ()))
            ),
            "torch",
        ),
        # These change one image in a million, so two results hardly ever differ.
        (lambda image, generator: image.flip(2) if torch.rand(1) < 1e-6 else image, "torch"),
        (lambda image, generator: image.flip(2) if np.random.rand() < 1e-6 else image, "numpy"),  # noqa: NPY002
        (lambda image, generator: image.flip(2) if random.random() < 1e-6 else image, "Python"),
        (lambda image, generator: v2.RandomHorizontalFlip(1e-6)(image), "torch"),
        (lambda image, generator: image // torch.manual_seed(3).initial_seed(), "torch"),
    ],
)
def test_a_policy_that_moves_a_global_random_state_is_refused(function: Callable[..., Tensor], whose: str) -> None:
    with pytest.raises(ValueError, match=f"moved the global random state of {whose}, .*generator=generator"):
        policy(function)


@pytest.mark.parametrize(
    ("function", "what"),
    [
        (lambda image, generator: image.flip(2) if np.random.default_rng().random() < 1e-6 else image, "of numpy"),
        (lambda image, generator: image.flip(2) if numpys().random() < 1e-6 else image, "of numpy"),
        (lambda image, generator: image.flip(2) if np.random.RandomState().rand() < 1e-6 else image, "of numpy"),
        (lambda image, generator: image.flip(2) if random.Random().random() < 1e-6 else image, "random.Random"),
        (
            lambda image, generator: image // int(torch.randint(1, 9, (), generator=torch.Generator())),
            "torch.Generator",
        ),
    ],
)
def test_a_generator_without_a_seed_is_refused(function: Callable[..., Tensor], what: str) -> None:
    with pytest.raises(ValueError, match=f"took random numbers from a .*{what} without a seed"):
        policy(function)


@pytest.mark.parametrize(
    "draw",
    [
        lambda: random.SystemRandom().random(),
        lambda: secrets.randbelow(10**6) / 10**6,
        lambda: int.from_bytes(os.urandom(8)) / 2**64,
        lambda: uuid.uuid4().int / 2**128,
    ],
)
def test_a_policy_that_draws_from_the_systems_entropy_is_refused(draw: Callable[[], float]) -> None:
    with pytest.raises(ValueError, match="took random numbers from the system's entropy"):
        policy(lambda image, generator: image.flip(2) if draw() < 1e-6 else image)


@pytest.mark.parametrize(
    "is_special",
    [
        lambda image: image.shape[1] < 100,
        lambda image: image.shape[1:] == (1, 1),
        lambda image: image.shape[1] > 2 * image.shape[2],
        lambda image: image.shape[2] > 2 * image.shape[1],
        lambda image: image.shape[1] > 500,
        lambda image: image.float().mean() < 20,
        lambda image: image.float().mean() > 220,
        lambda image: image.float().std() < 1,
        lambda image: torch.equal(image[0], image[1]),
    ],
)
def test_a_policy_that_draws_from_elsewhere_for_some_images_only_is_refused(
    is_special: Callable[[Tensor], bool],
) -> None:
    def sometimes(image: Tensor, generator: torch.Generator) -> Tensor:
        return image.flip(2) if is_special(image) and torch.rand(1) < 0.5 else image

    with pytest.raises(ValueError, match="sometimes moved the global random state of torch"):
        policy(sometimes)


def test_a_policy_may_refuse_images_that_are_too_small_for_it() -> None:
    own = policy(lambda image, generator: F.pad(image.float(), (8,) * 4, mode="reflect").to(torch.uint8))
    assert own.apply(IMAGE, 0, DIGEST).shape == (3, 56, 66)


def seeded_again(image: Tensor, generator: torch.Generator) -> Tensor:
    """Generators of other libraries, seeded by the one that is given."""
    seed = int(torch.randint(2**31, (), generator=generator))
    other = torch.Generator()
    other.manual_seed(seed)
    copy = torch.Generator()
    copy.set_state(other.get_state())
    numbers = [
        int(np.random.default_rng(seed).integers(1, 9)),
        random.Random(seed).randint(1, 9),
        int(torch.randint(1, 9, (), generator=copy)),
    ]
    are_generators = isinstance(generator, torch.Generator) and isinstance(other, torch.Generator)
    return image // sum(numbers) if are_generators else image[0]


def test_generators_that_the_given_one_seeds_are_accepted() -> None:
    own, kinds = policy(seeded_again), (torch.Generator, random.Random.seed)
    assert torch.equal(own.apply(IMAGE, 3, DIGEST), own.apply(IMAGE, 3, DIGEST))
    assert not torch.equal(own.apply(IMAGE, 3, DIGEST), own.apply(IMAGE, 4, DIGEST))
    with pytest.raises(ValueError, match="without a seed"):
        policy(lambda image, generator: image // (1 + (torch.Generator() is None)))
    assert (torch.Generator, random.Random.seed) == kinds


def test_global_random_states_are_left_as_they_were() -> None:
    def draws() -> list[float]:
        return [torch.rand(1).item(), np.random.rand(), random.random()]  # noqa: NPY002

    torch.manual_seed(5)
    np.random.seed(5)  # noqa: NPY002
    random.seed(5)
    expected = draws()
    torch.manual_seed(5)
    np.random.seed(5)  # noqa: NPY002
    random.seed(5)

    own = policy(darker)
    own.apply(IMAGE, 3, DIGEST)
    with pytest.raises(ValueError, match="global random state"):
        policy(lambda image, generator: image // int(torch.randint(1, 200, ())))

    assert draws() == expected


@pytest.mark.parametrize(
    ("function", "found"),
    [
        (lambda image, generator: image.float(), r"torch.float32 \(3, 240, 320\)"),
        (lambda image, generator: image[0], r"torch.uint8 \(240, 320\)"),
        (lambda image, generator: image[:, :0], r"torch.uint8 \(3, 0, 320\)"),
        (lambda image, generator: image.numpy(), "ndarray"),
        (lambda image, generator: image.no_such_name, "failed: AttributeError: "),
    ],
)
def test_a_policy_that_returns_no_image_is_refused(function: Callable[..., Any], found: str) -> None:
    with pytest.raises(ValueError, match=f"the policy <lambda> .*{found}.*made-up image"):
        policy(function)


def test_a_policy_cant_change_its_input() -> None:
    before = IMAGE.clone()

    darkened = policy(lambda image, generator: image.zero_()).apply(IMAGE, 0, DIGEST)

    assert darkened.sum() == 0
    assert torch.equal(IMAGE, before)


def test_results_depend_on_seed_and_content_alone() -> None:
    own = policy(darker)
    results = [own.apply(IMAGE, seed, DIGEST) for seed in range(20)]

    assert [torch.equal(result, IMAGE) for result in results].count(True) in range(3, 18)
    for seed in reversed(range(20)):
        assert torch.equal(own.apply(IMAGE, seed, DIGEST), results[seed])
    others = [own.apply(IMAGE, seed, bytes(32)) for seed in range(20)]
    assert any(not torch.equal(*pair) for pair in zip(results, others, strict=True))


def test_a_policy_known_by_its_facts_can_be_compared_but_not_used() -> None:
    own = policy(darker)
    known = Policy.from_facts(own.facts)

    assert known == own
    assert hash(known) == hash(own)
    with pytest.raises(ValueError, match=r"darker is known by its facts only.*with_seed"):
        known.apply(IMAGE, 0, DIGEST)


def test_a_policy_pickles_with_its_function() -> None:
    own = policy(darker)
    again = pickle.loads(pickle.dumps(own))

    assert again == own
    assert torch.equal(again.apply(IMAGE, 1, DIGEST), own.apply(IMAGE, 1, DIGEST))


def test_two_of_one_name_are_told_apart_in_words() -> None:
    def named(divisor: int) -> Policy:
        def own(image: Tensor, generator: torch.Generator) -> Tensor:
            return F.pad(image, (divisor,) * 4)

        return policy(own)

    assert named(1).name == named(2).name == "own"
    assert named(1).describe() != named(2).describe()
    assert policy("flip").describe() == "flip"
    later = Policy.from_facts({**policy("flip").facts, "version": 2})
    assert later.describe() == "flip (params {'probability': 0.5}, version 2)"
