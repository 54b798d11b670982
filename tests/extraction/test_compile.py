"""Compiled extractions: the same rows in any order and after any restart; what is stored leads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support.extracting import counts, reduced, rows, run, up_to
from support.tiny import VIEW, arrays, net, rows_by_hand, staged
from torch import Tensor, nn
from torch._inductor import config as inductor

from featstore import Augment, FeatureStore, StagedModel, adopt, estimate, extract
from featstore.models.probe import TOLERANCES

TWO_CUTS: dict[str, Any] = {"cuts": ["layer1:none", "layer2:none"], "batch_size": 8}


def profiles(store: FeatureStore, key: str) -> list[Any]:
    """What each part, from the oldest on, says of being compiled."""
    parts = sorted(FeatureStore(store.root).set(key).parts, key=lambda part: str(part.facts["when"]))
    return [part.facts["profile"].get("compiled") for part in parts]


@pytest.fixture(scope="module")
def whole(compiler: None, tmp_path_factory: pytest.TempPathFactory) -> FeatureStore:
    """Twenty images' rows by one compiled job."""
    store = FeatureStore(tmp_path_factory.mktemp("compiled"))
    report = run(arrays(20), store, compile=True, **TWO_CUTS)
    assert report.notes == ("net runs as compiled code",)
    return store


def test_rows_lie_within_the_tolerance_and_say_how_they_were_computed(whole: FeatureStore, store: FeatureStore) -> None:
    keys = run(arrays(20), store, **TWO_CUTS).keys
    for key, cut in zip(keys, ("layer1", "layer2"), strict=True):
        compiled, plain = rows(whole, arrays(20), key), rows(store, arrays(20), key)
        by_hand = reduced(rows_by_hand(up_to(cut, net()), arrays(20), VIEW, batch_size=8), "none")
        assert torch.equal(plain, by_hand)
        assert float((compiled - by_hand).abs().max() / by_hand.abs().max()) <= TOLERANCES["fp32"]
        assert profiles(whole, key) == [["layer1", "layer2"]]
        assert profiles(store, key) == [None]


def test_parts_of_a_job_leave_the_rows_of_the_whole(whole: FeatureStore, store: FeatureStore) -> None:
    keys = run(arrays(20).select([17, 3, 12]), store, compile=True, **TWO_CUTS).keys
    run(arrays(20).select(range(20)[::-1]), store, cuts=TWO_CUTS["cuts"])  # as what is stored was
    for key in keys:
        assert profiles(store, key) == [["layer1", "layer2"]] * 2
        assert torch.equal(rows(store, arrays(20), key), rows(whole, arrays(20), key))
    store.remove(keys[1])
    report = run(arrays(20), FeatureStore(store.root), compile=True, **TWO_CUTS)
    assert counts(report) == (20, 20, 0)
    assert profiles(store, keys[1]) == [["layer1", "layer2"]]
    assert torch.equal(rows(store, arrays(20), keys[1]), rows(whole, arrays(20), keys[1]))


@pytest.mark.usefixtures("compiler")
def test_who_says_how_is_heard_and_what_is_stored_last_leads(store: FeatureStore) -> None:
    key = run(arrays(3), store).keys[0]
    for count, compiled in ((6, None), (9, True), (12, False), (15, None)):
        run(arrays(count), store, compile=compiled)
    assert profiles(store, key) == [None, None, ["layer2"], None, None]


@pytest.mark.usefixtures("compiler")
def test_an_estimate_tells_what_compiling_takes(store: FeatureStore) -> None:
    found = estimate(staged(), arrays(20), store, cuts=["layer2"], compile=True, device="cpu")
    assert 0 < found.compile_seconds < found.start_seconds
    assert estimate(staged(), arrays(20), store, cuts=["layer2"], device="cpu").compile_seconds == 0


@pytest.mark.usefixtures("compiler")
def test_adopting_compiled_rows_compiles_nothing(store: FeatureStore) -> None:
    class Renamed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = net().layer1

        def fingerprint(self) -> str:
            return "layer1 by another digest"

        def forward(self, values: Tensor) -> Tensor:
            maps: Tensor = self.layer(values)
            return maps

    other = StagedModel.from_stages({"layer1": Renamed(), "end": nn.Identity()}, view=VIEW)
    (key,) = run(arrays(3), store, compile=True, cuts=["layer1:none"]).keys
    with inductor.patch({"cpp.cxx": ("no-such-compiler",)}):
        assert adopt(store, key, other, arrays(3), device="cpu", workers=0).rows == 3


def test_without_a_compiler_nothing_is_read(store: FeatureStore, tmp_path: Path) -> None:
    with inductor.patch({"cpp.cxx": ("no-such-compiler",)}):
        for function in (extract, estimate):
            with pytest.raises(
                ValueError, match=r"there is no C\+\+ compiler .* compute without: featstore extract --no-compile"
            ):
                function(staged(), arrays(3), store, compile=True, augment=Augment("flip", seeds=[0]), device="cpu")
    assert not store.root.exists()
