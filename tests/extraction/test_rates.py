"""What each stage of an extraction did and how long it was busy; which one the others wait for."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.extracting import run
from support.tiny import arrays, photos, staged

from featstore import Augment, FeatureStore, Filed, ImageSet, StageRate, Trunk, View, plan
from featstore.extraction import job as job_module
from featstore.extraction.rates import STAGES, Rates, StageName, bound_by, joined, rates_text
from featstore.images.render import Cost
from featstore.store.gathering import Gathered

SECONDS = 0.02


def stage(
    name: StageName, busy: float, *, images: float = 30, workers: int = 1, queue: float | None = None
) -> StageRate:
    return StageRate(
        stage=name, images=images, num_bytes=7, busy_seconds=busy, seconds=10.0, workers=workers, queue=queue
    )


def stages(read: float, decode: float, forward: float, write: float, *, workers: int = 4) -> list[StageRate]:
    return [
        stage("read", read, workers=workers),
        stage("decode", decode, workers=workers),
        stage("forward", forward, queue=0.5),
        stage("write", write),
    ]


def slow(call: Callable[..., Any]) -> Callable[..., Any]:
    """`call`, which takes longer for each image."""

    def called(*arguments: Any, **options: Any) -> Any:
        time.sleep(SECONDS)
        return call(*arguments, **options)

    return called


@pytest.mark.parametrize(
    ("owner", "name", "expected", "is_full"),
    [
        (ImageSet, "read", "read", False),
        (View, "render", "decode", False),
        (Trunk, "__call__", "forward", True),
        (Gathered, "write", "write", True),
    ],
)
def test_the_slow_stage_binds_and_the_queue_before_the_passes_shows_on_which_side_of_them_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, owner: type, name: str, expected: str, is_full: bool
) -> None:
    images = ImageSet.from_folder(photos(tmp_path / "photos", 24))
    monkeypatch.setattr(owner, name, slow(getattr(owner, name)))
    if expected == "write":
        monkeypatch.setattr(job_module, "COMMIT_BYTES", 1)  # a part after each pass
    report = run(images, FeatureStore(tmp_path / "feats"), batch_size=1, workers=2)
    assert report.bound_by == expected
    found = {each.stage: each for each in report.rates}
    assert found["forward"].queue is not None
    assert (found["forward"].queue > 0.3) == is_full
    rate = found[expected].rate
    assert rate is not None
    assert rate <= found[expected].workers / SECONDS


def test_all_that_is_done_is_counted_in_images_however_many_views_and_rows_each_has(tmp_path: Path) -> None:
    images, store = ImageSet.from_folder(photos(tmp_path / "photos", 9)), FeatureStore(tmp_path / "feats")
    report = run(images, store, cuts=["layer1", "layer2"], augment=Augment("flip", seeds=[0, 1]), workers=2)
    assert [each.stage for each in report.rates] == list(STAGES)
    assert [each.images for each in report.rates] == pytest.approx([9] * 4)  # divided by views and rows
    num_bytes = [each.num_bytes for each in report.rates]
    assert num_bytes[0] == sum(len(images.read(index)) for index in range(9))
    assert num_bytes[3] == sum(part.num_bytes for each in store.sets() for part in each.parts)
    assert [each.workers for each in report.rates] == [2, 2, 1, 1]
    assert run(images, store).rates == ()


@pytest.mark.parametrize(
    ("rates", "expected"),
    [
        (stages(1, 10, 9, 2), "forward"),  # four workers are busy for less than a third of their time
        (stages(11, 28, 9, 2), "decode"),  # 39 of their 40 seconds, reading with it
        (stages(28, 11, 9, 2), "read"),
        (stages(1, 10, 7, 8), "write"),
    ],
)
def test_who_reads_and_decodes_is_busy_with_both(rates: list[StageRate], expected: str) -> None:
    assert bound_by(rates) == expected


def test_nothing_binds_where_nothing_is_done() -> None:
    assert bound_by(()) is None
    assert bound_by(Rates().since(Rates().start)) is None


def test_rates_are_said_in_one_sentence() -> None:
    assert rates_text(stages(1, 10, 9.5, 0.001)) == (
        "read 120, decode 12, forward 3.16, write 30,000 images a second when busy; forward binds, 95 % busy"
    )


def test_pieces_of_a_job_have_the_rates_of_one_process_together() -> None:
    planned = plan(staged(), arrays(3), FeatureStore("nowhere"))
    pieces = [Filed.nothing(planned), Filed.nothing(planned)]
    pieces[0].rates = tuple(stages(1, 10, 9, 2))
    pieces[1].rates = tuple(stages(3, 10, 6, 0))
    assert Filed.together(planned, pieces).rates == joined([each.rates for each in pieces])
    read, _, forward, write = Filed.together(planned, pieces).rates
    assert (read.images, read.num_bytes, read.busy_seconds, read.workers) == (60, 14, 4.0, 4)
    assert (read.rate, forward.share, forward.queue, write.rate) == (60.0, 0.75, 0.5, 30.0)
    assert Filed.together(planned, []).rates == ()


def test_the_queue_is_as_full_as_images_waited_in_it() -> None:
    rates = Rates()
    rates.room = 10
    before = rates.mark()
    for _ in range(4):
        rates.add_cost(Cost(5, 0.5, 0.25, time.perf_counter() - 1.0))
    time.sleep(0.5)  # four that waited for a second each are eight on average over this half
    queue = rates.since(before)[2].queue
    assert queue is not None
    assert 0.4 < queue <= 0.8  # it is longer than half a second on a busy machine
