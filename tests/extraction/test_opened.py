"""What a session files agrees with what is stored when it opens, and with what others file meanwhile."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.decoders import by_pillow, fast, flat, jpegs_by
from support.extracting import counts, reduced, rows, run, up_to
from support.programs import photographs
from support.tiny import VIEW, arrays, net, photos, rows_by_hand, staged

from featstore import Augment, FactsDifferError, FeatureStore, ImageSet, finish, open_plan, plan
from featstore.extraction import job as job_module
from featstore.extraction.extract import run_plan
from featstore.files.part import Part, write_part
from featstore.images.decode import decode
from featstore.images.decoders import PIXEL_DIGEST, PIXEL_DIGESTS, POLICY, REDUCED
from featstore.images.pixel_digest import pixel_digest

AUGMENT = Augment("flip", seeds=[0])
HALF = replace(VIEW, decode="reduced")


@pytest.fixture
def images(tmp_path: Path) -> ImageSet:
    return ImageSet.from_folder(photos(tmp_path / "photos", 6))


def forget_pixels(part: Part) -> None:
    """The part as it was written before parts had a pixel digest."""
    rewritten(part, {name: value for name, value in part.facts.items() if name != "pixels"})


def rewritten(part: Part, facts: dict[str, Any]) -> None:
    """The part with other facts in its place."""
    features = [part.features.clone()]
    part.path.unlink()
    write_part(part.path, features=features, digests=part.digests, decoders=part.decoders, facts=facts)


@pytest.mark.parametrize("is_from_before", [False, True])
def test_decoders_that_give_other_pixels_add_nothing_to_a_set(
    images: ImageSet, store: FeatureStore, is_from_before: bool
) -> None:
    (key,) = run(images.select([0, 1, 2]), store).keys
    (part,) = store.set(key).parts
    assert part.facts["pixels"] == PIXEL_DIGEST
    if is_from_before:
        forget_pixels(part)
        store = FeatureStore(store.root)
    with jpegs_by(fast):
        with pytest.raises(FactsDifferError) as refused:
            run(images, store)
        again = run(images.select([0, 1, 2]), store)  # all that is asked for is there
    assert counts(again) == (0, 3, 0)
    assert f"images of set {key[:8]} (layer2 concat) were decoded to other pixels" in str(refused.value)
    assert "Install those that it was made with, extract into another store, or remove the set" in str(refused.value)
    assert store.set(key).index.num_images == 3
    with jpegs_by(by_pillow):  # another library with the same pixels
        assert counts(run(images, store)) == (3, 3, 0)
    assert FeatureStore(store.root).set(key).pixels == {PIXEL_DIGEST}


def test_what_other_decoders_began_they_go_on_with_alone(images: ImageSet, store: FeatureStore, tmp_path: Path) -> None:
    with jpegs_by(fast):
        (key,) = run(images.select([0, 1, 2]), store).keys
        assert counts(run(images, store)) == (3, 3, 0)
        assert store.set(key).pixels == {pixel_digest()} != {PIXEL_DIGEST}
    more = ImageSet.from_folder(photos(tmp_path / "more", 9))
    for decoder in (flat, by_pillow):
        with jpegs_by(decoder), pytest.raises(FactsDifferError, match="were decoded to other pixels"):
            run(more, store)


def test_rows_of_two_decoders_that_began_at_once_are_found_whoever_goes_on(
    images: ImageSet, store: FeatureStore, tmp_path: Path
) -> None:
    (key,) = run(images.select([0, 1, 2]), store).keys
    with jpegs_by(fast):
        other = FeatureStore(tmp_path / "other")
        run(images.select([3]), other)
    (part,) = other.set(key).parts
    part.path.rename(store.set(key).folder / part.path.name)
    for decoder in (fast, by_pillow):
        with jpegs_by(decoder), pytest.raises(FactsDifferError, match=f"was .*{PIXEL_DIGEST[:8]}.*, is "):
            run(images, FeatureStore(store.root))


@contextmanager
def relu_scaled() -> Iterator[None]:
    """An operator as another version of the library may have it."""
    relu = torch.nn.functional.relu
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.functional, "relu", lambda *args, **kwargs: relu(*args, **kwargs) * 1.01)
        yield


@pytest.mark.parametrize(
    ("otherwise", "why"),
    [(partial(jpegs_by, fast), f"digests of the pixels .* {PIXEL_DIGEST[:8]}"), (relu_scaled, "fp32 allows 0.0001")],
)
def test_of_jobs_that_begin_at_once_and_disagree_one_leaves_rows(
    store: FeatureStore,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    otherwise: Callable[[], AbstractContextManager[None]],
    why: str,
) -> None:
    (photos(tmp_path / "photos") / "dog/0.jpg").write_bytes(b"no image")
    images, cuts = ImageSet.from_folder(tmp_path / "photos"), ["layer1", "layer2"]
    halves = images.select(range(3)), images.select(range(3, 7))
    planned = [plan(staged(), each, store, cuts=cuts, dtype="float32") for each in halves]
    keys = run_plan(planned[0], store, device="cpu", workers=0).keys
    monkeypatch.setattr(job_module, "COMMIT_SECONDS", 0.0)
    how: dict[str, Any] = {"device": "cpu", "workers": 0, "batch_size": 1, "on_error": "skip"}
    with (
        otherwise(),
        open_plan(planned[1], store, **how) as session,
        pytest.raises(FactsDifferError, match=why) as said,
    ):
        session.run()
    for key in keys:
        (part,) = FeatureStore(store.root).set(key).parts
        aside = {path.name[1:].partition(".h5")[0] for path in part.path.parent.glob(".part-*")}
        assert len(aside) == 2  # one of the image that fails and one of the first row, before which nothing shows
        if key == keys[0]:
            assert str(part.path) in str(said.value)
            assert any(name in str(said.value) for name in aside)
    with jpegs_by(by_pillow):
        assert counts(run_plan(planned[1], store, **how)) == (6, 0, 1)


def test_rows_that_others_have_filed_before_a_job_ends_are_compared_once_more(
    images: ImageSet, store: FeatureStore, tmp_path: Path
) -> None:
    cuts, other = ["layer1", "layer2"], FeatureStore(tmp_path / "other")
    planned = plan(staged(), images.select([0, 1, 2]), store, cuts=cuts, dtype="float32")
    with open_plan(planned, store, device="cpu", workers=0) as session:
        filed = session.run()
    with jpegs_by(fast):
        keys = run(images.select([3]), other, cuts=cuts).keys
        parts = [part for key in keys for part in other.set(key).parts]
        for key, part in zip(keys, parts, strict=True):
            part.path.rename(store.set(key).folder / part.path.name)
        said = rf"{parts[0].path.name}.* What this one has written of set {keys[0][:8]} \(1 part\) is set aside"
        with pytest.raises(FactsDifferError, match=said):
            finish(planned, store, [filed])
        assert [FeatureStore(store.root).set(key).pixels for key in keys] == [{pixel_digest()}] * 2


def test_the_probe_of_every_part_is_compared_not_the_newest_ones_alone(images: ImageSet, store: FeatureStore) -> None:
    run(images.select([0, 1]), store)
    (key,) = run(images.select([2, 3]), store).keys
    oldest = min(store.set(key).parts, key=lambda part: str(part.facts["when"]))
    values = [[value + 1 for value in row] for row in oldest.facts["probe"]["values"]]
    rewritten(oldest, {**oldest.facts, "probe": {**oldest.facts["probe"], "values": values}})
    with pytest.raises(FactsDifferError, match=f"computes other values than set {key[:8]}"):
        run(images, FeatureStore(store.root))


def test_rows_of_arrays_are_those_of_any_decoder(store: FeatureStore) -> None:
    run(arrays(4), store)
    with jpegs_by(fast):
        assert counts(run(arrays(7), store)) == (3, 4, 0)


def test_features_of_both_decode_policies_lie_side_by_side(store: FeatureStore, tmp_path: Path) -> None:
    images = ImageSet.from_folder(photographs(tmp_path / "photos", 3))
    keys = {view.decode: run(images, store, view=view, augment=AUGMENT).keys for view in (VIEW, HALF)}
    assert len({*keys[POLICY], *keys[REDUCED]}) == 4
    for policy, (key, augmented) in keys.items():
        decoded = [decode(images.read(place), policy=policy, resize=VIEW.resize) for place in range(len(images))]
        as_arrays = ImageSet.from_arrays(np.stack([np.asarray(each.pixels.permute(1, 2, 0)) for each in decoded]))
        by_hand = reduced(rows_by_hand(up_to("layer2", net()), as_arrays, VIEW), "concat")
        assert torch.equal(rows(store, images, key), by_hand)
        assert store.set(augmented).pixels == store.set(key).pixels == {PIXEL_DIGESTS[policy]}
    assert not torch.equal(rows(store, images, keys[POLICY][0]), rows(store, images, keys[REDUCED][0]))
    assert counts(run(images, store, view=HALF, augment=AUGMENT)) == (0, 12, 0)


def test_decoders_that_give_other_reduced_pixels_add_nothing_to_their_sets(
    images: ImageSet, store: FeatureStore
) -> None:
    run(images.select([0, 1, 2]), store, view=HALF)
    with jpegs_by(flat), pytest.raises(FactsDifferError, match=f"they give the pixels of {REDUCED}"):
        run(images, store, view=HALF)
    assert counts(run(images, store, view=HALF)) == (3, 3, 0)
