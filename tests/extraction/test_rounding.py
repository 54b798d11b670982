"""Rows stored as whole numbers: what they are, what their error is said to be, and what becomes of them in a store."""

from __future__ import annotations

import math
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from support.extracting import counts, reduced, rows, run, up_to
from support.parts import extent, flip_bit
from support.scaled import rounded
from support.tiny import VIEW, arrays, net, photos, rows_by_hand, staged
from torch import nn

from featstore import Augment, FeatureStore, FeatureStoreError, ImageSet, StagedModel, adopt, finish, open_plan, plan
from featstore.extraction.job import Session
from featstore.extraction.narrowing import Narrowing, refuse_too_small
from featstore.files.part import Part
from featstore.files.scaled import ScaledRows
from featstore.models.probe import Probe
from featstore.store.spec import FeatureSpec


def by_hand(images: ImageSet, cut: str = "layer2", reduction: str = "concat") -> NDArray[np.float32]:
    values: NDArray[np.float32] = reduced(rows_by_hand(up_to(cut, net()), images, VIEW), reduction).numpy()
    return values


def parts(store: FeatureStore, key: str) -> tuple[Part, ...]:
    return FeatureStore(store.root).set(key).parts


# ---- values and their error


@pytest.mark.parametrize(("cut", "reduction"), [("layer1", "none"), ("layer2", "concat")])
def test_rows_are_those_that_numpy_rounds_and_their_error_is_said_and_filed(
    store: FeatureStore, cut: str, reduction: str
) -> None:
    images = arrays(40)  # fewer than are sampled, and two passes
    report = run(images, store, cuts=[f"{cut}:{reduction}"], dtype="int8")
    exact = by_hand(images, cut, reduction)
    stored = rows(store, images, report.keys[0])
    assert stored.dtype == torch.float32
    assert np.array_equal(stored.numpy(), rounded(exact))
    error = math.sqrt(
        np.square(rounded(exact) - exact, dtype=np.float64).sum() / np.square(exact, dtype=np.float64).sum()
    )
    assert 0 < error < 0.02
    (part,) = parts(store, report.keys[0])
    assert part.facts["rounding"] == {"error": pytest.approx(error, rel=1e-6), "images": 40}
    assert report.notes == (
        f"int8 at {cut}:{reduction} of net: relative error {error:.2g} against float32 (40 images)",
    )


def test_the_error_is_said_before_the_first_row_is_filed(
    store: FeatureStore, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    said: list[str] = []
    session_run = Session.run

    def after(session: Session, *args: Any, **options: Any) -> Any:
        said.append(capsys.readouterr().err)
        assert FeatureStore(store.root).sets() == []
        return session_run(session, *args, **options)

    monkeypatch.setattr(Session, "run", after)
    run(arrays(5), store, cuts=["layer1:none", "layer2"], dtype="int8", progress=True)
    assert [line.partition(": relative error")[0] for line in said[0].splitlines()] == [
        "int8 at layer1:none of net",
        "int8 at layer2:concat of net",
    ]


def test_the_sample_is_of_64_images_and_passes_over_those_that_cannot_be_read(
    store: FeatureStore, tmp_path: Path
) -> None:
    folder = photos(tmp_path / "photos", 80)
    for number in range(0, 80, 3):
        (folder / ("cat", "dog")[number % 2] / f"{number}.png").write_bytes(b"no image")
    report = run(ImageSet.from_folder(folder), store, dtype="int8", on_error="skip")
    assert report.failed == 27
    sampled = [part.facts["rounding"]["images"] for part in parts(store, report.keys[0])]
    assert len(set(sampled)) == 1
    assert 64 - 27 <= sampled[0] < 64


def test_of_images_that_all_cannot_be_read_nothing_is_said(store: FeatureStore, tmp_path: Path) -> None:
    folder = photos(tmp_path / "photos", 4)
    for path in folder.glob("*/*"):
        path.write_bytes(b"no image")
    report = run(ImageSet.from_folder(folder), store, dtype="int8", on_error="skip")
    assert (report.failed, counts(report)) == (4, (0, 0, 4))
    assert not any("error" in note for note in report.notes)


def test_pieces_of_one_plan_say_their_error_once(store: FeatureStore) -> None:
    images = arrays(10)
    planned = plan(staged(), images, store, cuts=["layer2"], dtype="int8")
    pieces = []
    for some in (range(4), range(4, 10)):
        with open_plan(planned, store, device="cpu", workers=0) as session:
            pieces.append(pickle.loads(pickle.dumps(session.run(some))))
    report = finish(planned, store, pieces)
    assert report.computed == 10
    (note,) = report.notes
    assert note.endswith("against float32 (10 images)")


def test_floats_have_no_such_fact(store: FeatureStore) -> None:
    report = run(arrays(3), store, dtype="float16")
    assert all("rounding" not in part.facts for part in parts(store, report.keys[0]))


def test_zeros_and_small_values_are_no_loss_and_all_seeds_have_the_fact(store: FeatureStore) -> None:
    report = run(arrays(6), store, dtype="int8", augment=Augment("flip", seeds=[0, 1]))
    assert [len(parts(store, key)) for key in report.keys] == [1, 1, 1]
    assert len({parts(store, key)[0].facts["rounding"]["error"] for key in report.keys}) == 1
    assert len(report.notes) == 1
    assert "zeros" not in report.notes[0]


# ---- what can't be stored


def spec() -> FeatureSpec:
    return FeatureSpec(trunk="0" * 64, pool={"reduction": "none"}, view=VIEW.facts(), precision="fp32", dtype="int8")


def test_rows_that_are_no_numbers_and_those_beyond_all_are_unfit() -> None:
    largest = torch.finfo(torch.float32).max
    values = torch.tensor([[1.0, 2.0], [math.nan, 1.0], [1.0, -math.inf], [0.0, 0.0], [largest, 1.0], [1e38, 0.0]])
    found = Narrowing(values, spec(), "layer4").narrowed()
    assert isinstance(found.rows, ScaledRows)
    assert found.rows[[0, 3, 5]].values().isfinite().all()
    assert {row: "aren't finite" in reason for row, reason in found.unfit.items() if row != 4} == {1: True, 2: True}
    read = ScaledRows.of(values[4:5]).values()
    assert (4 in found.unfit) == (not bool(read.isfinite().all()))


def test_values_too_small_for_a_scale_are_refused() -> None:
    def probe(largest: float) -> Probe:
        return Probe(((largest,), (largest,)), largest)

    refuse_too_small(probe(1e-40), spec(), name="net", cut="layer4")
    refuse_too_small(probe(0.0), spec(), name="net", cut="layer4")
    with pytest.raises(FeatureStoreError, match=r"int8 has steps of 1\.8e-43 there.*--dtype float32"):
        refuse_too_small(probe(1e-41), spec(), name="net", cut="layer4")


# ---- in a store


def test_compaction_keeps_numbers_and_scales_whatever_their_jobs_measured(store: FeatureStore) -> None:
    images = arrays(30)
    for count in (7, 20, 30):
        key = run(images.select(range(count)), store, dtype="int8").keys[0]
    before = rows(store, images, key)
    assert len({part.facts["rounding"]["error"] for part in parts(store, key)}) == 3
    report = store.compact(key)
    assert (len(report.merges), report.left) == (1, ())
    (part,) = parts(store, key)
    assert part.facts["rounding"]["images"] in (7, 13, 10)
    assert torch.equal(rows(store, images, key), before)
    assert np.array_equal(before.numpy(), rounded(by_hand(images)))
    assert FeatureStore(store.root).verify().damaged == ()


def test_a_flipped_bit_in_the_scales_is_damage_that_a_repair_sets_aside(store: FeatureStore) -> None:
    key = run(arrays(5), store, dtype="int8").keys[0]
    (part,) = parts(store, key)
    flip_bit(part.path, extent(part.path, "scale").start + 2)
    (bad,) = FeatureStore(store.root).verify(repair=True).damaged
    assert (bad.path, bad.is_damage) == (part.path, True)
    assert "bytes are altered in its scales" in bad.reason
    assert counts(run(arrays(5), store, dtype="int8")) == (5, 0, 0)


def test_diff_compares_what_is_read(store: FeatureStore) -> None:
    images = arrays(20)
    exact, whole = (run(images, store, dtype=dtype).keys[0] for dtype in ("float32", "int8"))
    found = store.diff(exact, whole)
    values = by_hand(images)
    assert found.values is not None
    assert found.facts == (("storage type", "float32", "int8"),)
    assert found.values.largest == np.abs(values.astype(np.float64) - rounded(values)).max()
    same = store.diff(whole, whole).values
    assert same is not None
    assert same.is_equal


def test_adoption_files_numbers_scales_and_the_measured_error(store: FeatureStore) -> None:
    images = arrays(12)
    key = run(images, store, dtype="int8").keys[0]
    (old,) = parts(store, key)

    class Spelled(nn.Module):  # another graph of the same values
        def __init__(self) -> None:
            super().__init__()
            self.net = net()
            self.layer1, self.layer2 = self.net.layer1, self.net.layer2

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            maps: torch.Tensor = self.layer2(torch.relu(self.layer1(images)))
            return maps.mean((2, 3))

    report = adopt(store, key, StagedModel.from_module(Spelled(), view=VIEW, name="other"), images, cut="layer2")
    (new,) = parts(store, report.key_to)
    assert (report.rows, new.facts["rounding"]) == (12, old.facts["rounding"])
    assert torch.equal(rows(store, images, report.key_to), rows(store, images, key))
