"""Ray: actors leave the rows of a local run, whatever ends them; an image at which they end is named.

Real actors on a cluster of this machine, started once.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from support.extracting import counts, rows
from support.tiny import photos

from featstore import (
    Augment,
    FactsDifferError,
    FeatureStore,
    FeatureStoreError,
    ImageError,
    ImageSet,
    ProgressReport,
    Ray,
    StagedModel,
    View,
    backbone,
    extract,
    open_plan,
    plan,
)
from featstore.extraction import ray_actors
from featstore.extraction.failures import TooManyFailedError
from featstore.extraction.job import Job
from featstore.images.decoders import PIXEL_DIGEST
from featstore.images.render import Rendered
from featstore.models.probe import Probe

# Ends the process at an image that is red all over, which none of those is that the check of a model brings.
DEADLY = """
import os
from collections import OrderedDict

from torch import nn


class Gate(nn.Module):
    def fingerprint(self):
        return "gives back what it gets"

    def forward(self, values):
        is_red = (values[:, 0].amin((1, 2)) > 2) & (values[:, 1:].amax((1, 2, 3)) < -1)
        if bool(is_red.any()):
            os._exit(9)
        return values


def make():
    layers = [("gate", Gate()), ("conv", nn.Conv2d(3, 8, 3, 2)), ("pool", nn.AdaptiveAvgPool2d(1))]
    return nn.Sequential(OrderedDict([*layers, ("flat", nn.Flatten()), ("fc", nn.Linear(8, 5))]))
"""
ONE, TWO = Ray(actors=1), Ray(actors=2)


@pytest.fixture(scope="module", autouse=True)
def _cluster() -> Iterator[None]:
    ray = pytest.importorskip("ray")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


@pytest.fixture
def model(tmp_path: Path) -> StagedModel:
    (tmp_path / "deadly.py").write_text(DEADLY, encoding="utf-8")
    return backbone(f"{tmp_path}/deadly.py:make").with_(view=View(size=16, resize=20))


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return photos(tmp_path / "photos", 22)


def test_actors_leave_the_rows_of_a_local_run(model: StagedModel, folder: Path) -> None:
    images, four = ImageSet.from_folder("photos"), Augment("flip", seeds=[0, 5])
    told: list[ProgressReport] = []
    report = extract(
        model, images, FeatureStore("by_ray"), augment=four, batch_size=2, engine=TWO, on_progress=told.append
    )
    local = extract(model, images, FeatureStore("local"), augment=four, batch_size=2)
    assert report.keys == local.keys
    assert counts(report) == counts(local) == (66, 0, 0)
    assert [each.images for each in report.rates] == pytest.approx([22] * 4)
    assert (told[-1].done, told[-1].rates) == (22, report.rates)
    for key in report.keys:
        assert torch.equal(rows(FeatureStore("by_ray"), images, key), rows(FeatureStore("local"), images, key))
    assert counts(extract(model, images, FeatureStore("by_ray"), augment=four, engine=TWO)) == (0, 66, 0)


@pytest.mark.usefixtures("compiler")
def test_an_actor_that_is_told_to_compile_does(
    model: StagedModel, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # An actor is a process of its own; this one would keep what it frees, under tests that measure memory.
    monkeypatch.setattr(ray_actors, "keep_freed_memory", lambda: False)
    planned = plan(model, ImageSet.from_folder("photos"), FeatureStore("by_ray"))
    told = ray_actors._Told(
        folder=str(folder.parent),
        sources=ray_actors._sources(planned),
        planned=ray_actors._pickled(planned),
        store="by_ray",
        options={"device": "cpu", "batch_size": 2, "compile": True, "workers": 0},
        threads=torch.get_num_threads(),
    )
    means = ray_actors._Worker().open(told)
    assert isinstance(means, list)
    assert [(each.profile["compiled"], each.pixels) for each in means] == [(["conv"], PIXEL_DIGEST)]


@pytest.mark.slow
@pytest.mark.usefixtures("compiler")
def test_actors_compile_as_a_local_run_does(model: StagedModel, folder: Path) -> None:
    images, stores = ImageSet.from_folder("photos").select(range(6)), (FeatureStore("by_ray"), FeatureStore("local"))
    for store, engine in zip(stores, (ONE, None), strict=True):
        report = extract(model, images, store, batch_size=2, compile=True, engine=engine)
        assert store.set(report.keys[0]).facts["profile"]["compiled"] == ["conv"]
    assert torch.equal(*(rows(store, images, report.keys[0]) for store in stores))


def test_an_image_that_ends_its_process_is_found_and_all_others_have_rows(
    model: StagedModel, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray_actors, "MOST_ENDED", 1)  # each one has torch to import
    red = np.zeros((24, 24, 3), np.uint8) + np.array([255, 0, 0], np.uint8)
    Image.fromarray(red).save(folder / "cat" / "red.png")
    images, store = ImageSet.from_folder("photos"), FeatureStore("by_ray")
    report = extract(model, images, store, batch_size=2, on_error="skip", engine=ONE)
    assert (report.computed, report.missing) == (22, 1)
    ((image, reason),) = report.failures
    assert image == "cat/red.png"
    assert "ended each time" in reason
    others = images.select([place for place, name in enumerate(images.ids) if name != "cat/red.png"])
    extract(model, others, FeatureStore("local"), batch_size=2)
    assert torch.equal(rows(store, others, report.keys[0]), rows(FeatureStore("local"), others, report.keys[0]))
    again = plan(model, images, store)
    (place,) = np.flatnonzero(again.is_to_read).tolist()
    with pytest.raises(ImageError, match=r"cat/red\.png: the process that computed it ended each time"):
        ray_actors._given_up(again, place, "raise")


def test_what_actors_can_not_do_is_said(model: StagedModel, folder: Path) -> None:
    images, store = ImageSet.from_folder("photos"), FeatureStore("by_ray")
    with pytest.raises(ValueError, match="2 actors with 1 GPUs each want more than the 0 that the cluster has"):
        extract(model, images, store, engine=Ray(actors=2, gpus_per_actor=1))
    named = plan(model, images, store)
    (folder / "cat" / "2.jpg").write_bytes(b"no image")
    with pytest.raises(TooManyFailedError, match=r"1 image failed \(cat/2\.jpg"):
        ray_actors.run_by_ray(ONE, named, store, on_error="skip", max_errors=0)
    Path("deadly.py").write_text(DEADLY + "\n# edited\n", encoding="utf-8")
    with pytest.raises(FeatureStoreError, match=r"actors can't load .* 'deadly__"):
        ray_actors.run_by_ray(ONE, named, store)


def test_pieces_are_whole_passes_and_hold_every_row_once() -> None:
    for num_rows, num_actors, size in [(1000, 2, 4), (7, 3, 4), (100_000, 8, 32), (1, 1, 256)]:
        pieces = [each.rows for each in ray_actors._dealt(range(num_rows), num_actors, size)]
        assert [row for rows in pieces for row in rows] == [*range(num_rows)]
        assert all(len(rows) % size == 0 for rows in pieces[:-1])
        assert len(pieces) >= min(num_rows // size, num_actors * ray_actors.PIECES_AN_ACTOR)


def test_a_piece_at_which_actors_end_is_tried_again_then_halved_and_a_single_image_given_up() -> None:
    piece = ray_actors._Piece([3, 4, 5])
    (again,) = piece.halves()
    assert again.rows == [3, 4, 5]
    one, two = again.halves()
    assert (one.rows, two.rows) == ([3], [4, 5])
    assert [each.rows for each in two.halves()] == [[4], [5]]
    assert not one.is_given_up
    (last,) = one.halves()
    assert last.is_given_up
    assert last.halves() == []


def test_actors_that_compute_on_another_thing_than_the_first_are_refused() -> None:
    crew = object.__new__(ray_actors._Crew)
    crew._first = None
    first = ray_actors._Means(
        name="set 7c41",
        precision="fp32",
        profile={"gpu": "A", "torch": "2.11"},
        pixels=PIXEL_DIGEST,
        probe=Probe(values=((1.0, 2.0), (0.5, -4.0)), largest=4.0),
    )
    crew._check_alike([first])
    crew._check_alike([replace(first, probe=Probe(values=((1.0003, 2.0), (0.5, -4.0)), largest=4.0))])
    others = {
        "gpu B, expected A as of the first": replace(first, profile={"gpu": "B", "torch": "2.11"}),
        f"pixels of the digest 00000000, expected {PIXEL_DIGEST[:8]}": replace(first, pixels="0" * 64),
        "set 7c41 differs by 0.00025 of the largest value from the first; fp32 allows 0.0001": replace(
            first, probe=Probe(values=((1.001, 2.0), (0.5, -4.0)), largest=4.0)
        ),
        "differs by inf of the largest": replace(first, probe=Probe(values=((1.0,), (0.5,)), largest=4.0)),
    }
    for said, other in others.items():
        with pytest.raises(FactsDifferError, match=re.escape(said)):
            crew._check_alike([other])


@pytest.mark.parametrize(
    ("nodes", "engine", "expected"),
    [
        ([8], Ray(actors=2), 4.0),
        ([8, 8, 8], Ray(actors=2), 8.0),  # no node has a half of them all
        ([1, 1], Ray(actors=1), 1.0),
        ([2], Ray(actors=5), 1 / 3),
        ([16], Ray(actors=4, gpus_per_actor=0.5), 4.0),
    ],
)
def test_an_actor_wants_no_more_than_a_node_has(nodes: list[int], engine: Ray, expected: float) -> None:
    alive = [{"Alive": True, "Resources": {"CPU": float(each), "GPU": 2.0}} for each in nodes]
    gone = {"Alive": False, "Resources": {"CPU": 64.0}}
    assert ray_actors._processors_each(SimpleNamespace(nodes=lambda: [*alive, gone]), engine) == expected


def test_where_actors_compute_follows_from_the_gpus_that_they_are_given(
    model: StagedModel, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)  # of the driver, which doesn't matter
    assert ray_actors._device(ONE, "auto") == torch.device("cpu")
    assert ray_actors._device(Ray(actors=1, gpus_per_actor=1), "auto") == torch.device("cuda")
    for engine, device in ((ONE, "cuda"), (Ray(actors=1, gpus_per_actor=1), "cpu"), (ONE, "tpu")):
        with pytest.raises(ValueError, match=f"device is {device}"):
            ray_actors._device(engine, device)
    images = ImageSet.from_folder("photos")
    with pytest.raises(ValueError, match="lies in this process, where no actor reaches it"):
        extract(model, images, FeatureStore("memory://bucket/store"), engine=ONE)


def test_a_session_that_is_stopped_files_what_it_has_and_runs_again(
    model: StagedModel, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images, store = ImageSet.from_folder("photos"), FeatureStore("store")
    planned = plan(model, images, store)
    with open_plan(planned, store, device="cpu", batch_size=4, workers=0) as session:
        take = Job._take

        def stopping(self: Job, rendered: Rendered) -> None:
            take(self, rendered)
            if rendered.index == 8:
                session.stop()

        monkeypatch.setattr(Job, "_take", stopping)
        filed = session.run()
        rest = session.run(range(9, 22))
    assert (filed.computed, rest.computed) == ([9], [13])
    assert (filed.is_stopped, rest.is_stopped) == (True, False)
    assert store.sets()[0].index.num_images == 22
