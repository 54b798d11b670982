"""Lowering: passes of half as many images where memory has no room, until there are rows."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

import pytest
import torch
from support.extracting import run
from support.tiny import VIEW, arrays, rows_by_hand, views_by_hand
from torch import Tensor, nn

from featstore import FeatureStore, FeatureStoreError, ModelError, StagedModel, estimate, extract, open_plan, plan

IMAGES = arrays(21)


class Limited(nn.Module):
    """Raises what a GPU does for more images than it has room for, which is told from outside as by other processes."""

    room = 1000
    sizes: ClassVar[list[int]] = []  # of the passes that were tried

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(width)
            self.conv = nn.Conv2d(3, width, 3)

    def fingerprint(self) -> str:
        return "limited"

    def forward(self, values: Tensor) -> Tensor:
        Limited.sizes.append(len(values))
        if len(values) > Limited.room:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.50 GiB. GPU 0 is full. Including ...")
        maps: Tensor = self.conv(values)
        return maps.mean((2, 3))


@pytest.fixture(autouse=True)
def roomy() -> Iterator[None]:
    yield
    Limited.room = 1000
    Limited.sizes.clear()


def limited(width: int = 4) -> StagedModel:
    return StagedModel.from_stages({"limited": Limited(width), "end": nn.Identity()}, view=VIEW, name=f"net{width}")


def run_limited(store: FeatureStore, **options: Any) -> Any:
    images = options.pop("images", IMAGES)
    return run(images, store, model=limited(), cuts=["limited"], **options)


def batch_sizes(store: FeatureStore, key: str) -> list[int]:
    return [part.facts["profile"]["batch_size"] for part in store.set(key).parts]


def by_hand(batch_size: int, width: int = 4) -> Tensor:
    return rows_by_hand(Limited(width).eval(), IMAGES, VIEW, batch_size=batch_size)


@pytest.mark.parametrize(("room", "batch_size", "found"), [(9, None, 8), (9, 19, 9)])
def test_a_new_set_is_computed_in_passes_that_memory_has_room_for(
    store: FeatureStore, room: int, batch_size: int | None, found: int
) -> None:
    Limited.room = room
    report = run_limited(store, batch_size=batch_size)
    (key,) = report.keys
    assert batch_sizes(store, key) == [found]
    assert torch.equal(store.features(IMAGES, key)[:], by_hand(found))
    what = f"net4 runs in passes of {found} images: cpu has no memory for {batch_size or 32}"
    assert report.notes == (what,)
    assert run_limited(store, images=arrays(25)).notes == ()  # what is stored leads


def test_memory_that_is_short_at_the_first_pass_makes_it_smaller_and_that_size_is_judged(store: FeatureStore) -> None:
    planned = plan(limited(), IMAGES, store, cuts=["limited"], dtype="float32")
    with open_plan(planned, store, device="cpu", batch_size=16, workers=0) as session:
        Limited.room = 5
        Limited.sizes.clear()
        filed = session.run(range(10))
        assert Limited.sizes[:2] == [16, 5]  # the pass that failed, and the judge's first, of a few images
        assert Limited.sizes.count(4) > 3  # which are the passes
        again = session.run(range(10, 21))
    assert filed.said == again.said == ["net4 runs in passes of 4 images: cpu has no memory for 16"]
    assert (sum(filed.computed), sum(again.computed)) == (10, 11)
    forward = next(each for each in filed.rates if each.stage == "forward")
    assert forward.images == 10
    (key,) = (each.spec.key for each in planned.sets)
    assert batch_sizes(store, key) == [4, 4]
    assert torch.equal(store.features(IMAGES, key)[:], by_hand(4))


def test_a_model_that_mixes_images_in_the_smaller_passes_is_refused(store: FeatureStore) -> None:
    class Ghost(Limited):
        def forward(self, values: Tensor) -> Tensor:
            rows = super().forward(values)
            return rows if len(values) % 8 else rows - rows.mean(0)

    model = StagedModel.from_stages({"ghost": Ghost(), "end": nn.Identity()}, view=VIEW)
    planned = plan(model, IMAGES, store, cuts=["ghost"])
    with open_plan(planned, store, device="cpu", batch_size=17, workers=0) as session:
        Limited.room = 9
        with pytest.raises(ModelError, match="in batches of 8"):
            session.run()
    assert not store.root.exists()


@pytest.mark.usefixtures("compiler")
def test_compiled_code_of_the_smaller_passes_is_compared_before_a_row_is_filed(store: FeatureStore) -> None:
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def check_room(num: int) -> None:
        if num > Limited.room:
            raise torch.OutOfMemoryError("CUDA out of memory.")

    class Shifted(Limited):
        def forward(self, values: Tensor) -> Tensor:
            check_room(len(values))
            is_shifted = torch.compiler.is_compiling() and len(values) == 4
            return values.mean((2, 3)) + int(is_shifted)

    model = StagedModel.from_stages({"shifted": Shifted(), "end": nn.Identity()}, view=VIEW, name="shifted")
    planned = plan(model, IMAGES, store, cuts=["shifted"])
    with open_plan(planned, store, device="cpu", batch_size=8, compile=True, workers=0) as session:
        Limited.room = 7
        with pytest.raises(ModelError, match=r"^Compiled, shifted computes other values at shifted"):
            session.run()
    assert not store.root.exists()


def test_each_of_several_models_has_a_batch_size_of_its_own(store: FeatureStore) -> None:
    class Small(nn.Module):
        def fingerprint(self) -> str:
            return "small"

        def forward(self, values: Tensor) -> Tensor:
            return values.mean((2, 3))

    Limited.room = 6
    other = StagedModel.from_stages({"small": Small(), "end": nn.Identity()}, view=VIEW)
    both: Any = [(limited(), ["limited"]), (other, ["small"])]
    report = extract(both, IMAGES, store, dtype="float32", device="cpu", batch_size=10, workers=0)
    assert [batch_sizes(store, key) for key in report.keys] == [[5], [10]]
    assert torch.equal(store.features(IMAGES, report.keys[0])[:], by_hand(5))
    assert torch.equal(store.features(IMAGES, report.keys[1])[:], rows_by_hand(Small(), IMAGES, VIEW, batch_size=10))


def test_no_room_for_the_images_that_judge_a_model_is_an_error_that_says_so(store: FeatureStore) -> None:
    Limited.room = 4
    with pytest.raises(
        FeatureStoreError,
        match=r"^cpu has no memory for passes of any size through net4 \(CUDA out of memory\. Tried to allocate 1\.50 "
        r"GiB\. GPU 0 is full\)\. Expected room for the five images that judge a model\. Free memory there, or take a "
        r"device that has more \(--device\)\.$",
    ):
        run_limited(store)
    assert not store.root.exists()


def test_stored_rows_keep_their_batch_size_and_the_advice_computes_the_rest_in_smaller_passes(
    store: FeatureStore,
) -> None:
    (key,) = run_limited(store, images=IMAGES.select(range(10)), batch_size=8).keys
    Limited.room = 5
    with pytest.raises(
        FeatureStoreError, match=r"images through net4 \(.*, and rows are filed .*featstore extract --batch-size 4\.$"
    ):
        run_limited(store)
    assert batch_sizes(store, key) == [8]
    assert run_limited(store, batch_size=4).computed == 11  # the advice
    assert sorted(batch_sizes(store, key)) == [4, 8]


def test_memory_that_is_short_behind_the_first_rows_leaves_those_filed(store: FeatureStore) -> None:
    planned = plan(limited(), IMAGES, store, cuts=["limited"], dtype="float32")
    with open_plan(planned, store, device="cpu", batch_size=8, workers=0) as session:
        session.run(range(8))
        Limited.room = 5
        with pytest.raises(FeatureStoreError, match=r"cpu has no memory for a pass of 8 .*extract --batch-size 4\.$"):
            session.run()
    (found,) = store.sets()
    assert (batch_sizes(store, found.key), found.index.num_images) == ([8], 8)


@pytest.mark.parametrize("how", ["a shard", "others at once"])
def test_jobs_that_share_a_set_are_told_to_take_one_batch_size(store: FeatureStore, how: str) -> None:
    planned = plan(limited(), IMAGES, store, cuts=["limited"], shard="0/2" if how == "a shard" else None)
    Limited.room = 20
    with pytest.raises(
        FeatureStoreError,
        match=r"other jobs may .*Give all of them a smaller one: featstore extract --batch-size 16\.$",
    ):
        open_plan(planned, store, device="cpu", workers=0, is_alone=how == "a shard")
    open_plan(planned, store, device="cpu", workers=0, batch_size=16, is_alone=False).close()  # the advice


def test_an_estimate_is_of_the_passes_that_memory_has_room_for(store: FeatureStore) -> None:
    Limited.room = 6
    found = estimate(limited(), IMAGES, store, cuts=["limited"], device="cpu", workers=0, batch_size=12)
    assert found.images == 21
    assert max(Limited.sizes[-3:]) == 6


@pytest.mark.cuda
def test_a_pass_under_way_is_computed_again_where_the_one_behind_it_has_no_room(store: FeatureStore) -> None:
    class Filling(Limited):
        """With what one pass of 16 leaves on the device there is no room for another."""

        is_filling = False

        def forward(self, values: Tensor) -> Tensor:
            rows = super().forward(values)
            if Filling.is_filling and len(values) == 16:
                Limited.room = 8
            return rows

    model = StagedModel.from_stages({"filling": Filling(), "end": nn.Identity()}, view=VIEW, name="net4")
    planned = plan(model, arrays(40), store, cuts=["filling"], dtype="float32")
    with open_plan(planned, store, device="cuda", batch_size=16, workers=0) as session:
        Filling.is_filling = True
        filed = session.run()
        (expected,) = session.opened[0].trunk(views_by_hand(arrays(40), VIEW))
    assert filed.said == ["net4 runs in passes of 8 images: cuda:0 has no memory for 16"]
    (key,) = (each.spec.key for each in planned.sets)
    assert batch_sizes(store, key) == [8]
    assert torch.equal(store.features(arrays(40), key)[:], expected.cpu())
