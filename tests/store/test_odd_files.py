"""Odd files in a store, which checksums call sound: each is named, and harms no other set."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from support import released
from support.tiny import VIEW, arrays, net, staged

from featstore import DamagedFileError, FeatureStore, StagedModel, extract
from featstore.exchange.export import export
from featstore.exchange.imports import import_file
from featstore.files.hdf5 import own_dataset
from featstore.files.part import Part, write_part
from featstore.files.table import Table, write_table

IMAGES = arrays(6)


@pytest.fixture
def store(tmp_path: Path) -> FeatureStore:
    """Two sets of one model."""
    made = FeatureStore(tmp_path / "features")
    extract(staged(), IMAGES, made, cuts=["layer1", "layer2"], dtype="float32")
    return made


def rewritten(part: Part, path: Path, **facts: Any) -> None:
    """The part again at `path`, with right checksums and other facts."""
    write_part(
        path, features=part.features, digests=part.digests, decoders=part.decoders, facts={**part.facts, **facts}
    )


@pytest.mark.parametrize("name", [".tiny.py:make", "..", ".hidden@x"])
def test_a_set_is_found_again_whatever_its_model_is_called(name: str, tmp_path: Path) -> None:
    store = FeatureStore(tmp_path / "features")
    model = StagedModel.from_module(net(), view=VIEW, name=name)
    for computed in (6, 0):
        assert extract(model, IMAGES, store, cuts=["layer2"]).computed == computed
    assert len(store.sets()) == 1


def test_features_imported_under_a_name_that_begins_with_a_dot_are_found(store: FeatureStore, tmp_path: Path) -> None:
    file = tmp_path / "layer2.h5"
    export(store, store.sets()[1].key, file, images=IMAGES)
    other = FeatureStore(tmp_path / "other")
    for written in (6, 0):
        assert import_file(other, file, name=".hidden").written == written
    assert len(other.sets()) == 1


def test_of_parts_of_two_sets_in_a_folder_the_one_that_it_is_not_named_after_is_the_intruder(
    store: FeatureStore,
) -> None:
    first, second = store.sets()
    intruder = second.folder / "part-0000000000000000.h5"  # whose name sorts first
    shutil.copy(first.parts[0].path, intruder)
    fresh = FeatureStore(store.root)
    (error,) = fresh.damaged()
    assert str(intruder) in str(error)
    with pytest.raises(DamagedFileError, match=intruder.name):
        fresh.set(second.key)
    assert [each.key for each in fresh.sets()] == [first.key]
    assert [each.path for each in fresh.verify().damaged] == [intruder]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("supersedes", None),
        ("supersedes", [5]),
        ("failed", 5),
        ("failed", {"x": "reason"}),
        ("failed", {"0" * 64: None}),
        ("stages", {}),
        ("stages", [{"name": "layer2"}]),
        ("profile", None),
        ("when", 7),
        ("class_tokens", "1"),
        ("backbone", None),
        ("pixels", None),
        ("pixels", "0eccce17"),
    ],
)
def test_a_part_with_facts_of_another_kind_is_named_and_the_other_set_is_listed(
    store: FeatureStore, name: str, value: Any
) -> None:
    first, second = store.sets()
    odd = second.folder / "part-0123456789abcdef.h5"
    rewritten(second.parts[0], odd, **{name: value})
    fresh = FeatureStore(store.root)
    (error,) = fresh.damaged()
    assert str(odd) in str(error)
    assert f"its fact {name} is " in str(error)
    assert [each.key for each in fresh.sets()] == [first.key]
    (bad,) = fresh.verify().damaged
    assert (bad.path, bad.is_damage) == (odd, False)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda columns, facts: columns.pop("id_ends"), "it lacks id_ends"),
        (lambda columns, facts: facts.pop("classes"), "it lacks classes"),
        (lambda columns, facts: facts.update(groups=5), "its fact groups is 5"),
        (lambda columns, facts: columns.update(digest=columns["digest"][:, :8]), "digest has the shape"),
        (lambda columns, facts: columns.update(target=columns["target"][:2]), "target has 2 values for 7 images"),
        (lambda columns, facts: columns.update(split=columns["split"] + 9), "its column split holds 12"),
        (lambda columns, facts: columns.update(id_ends=columns["id_ends"][::-1].copy()), "ids don't end"),
    ],
)
def test_an_image_table_without_what_the_format_has_is_not_called_sound(
    change: Any, words: str, tmp_path: Path
) -> None:
    columns, facts = dict(released.COLUMNS), dict(released.TABLE_FACTS)
    change(columns, facts)
    path = tmp_path / "features" / "images" / "photos-01234567.h5"
    path.parent.mkdir(parents=True)
    write_table(path, columns=columns, facts=facts)
    assert Table.open(path).facts == facts
    (bad,) = FeatureStore(tmp_path / "features").verify().damaged
    assert bad.path == path
    assert words in bad.reason
    with pytest.raises(DamagedFileError, match=words):
        FeatureStore(tmp_path / "features").images()


def test_image_tables_that_cannot_be_listed_are_not_called_sound(store: FeatureStore) -> None:
    shutil.rmtree(store.root / "images", ignore_errors=True)
    (store.root / "images").write_text("")
    (bad,) = FeatureStore(store.root).verify().damaged
    assert bad.path == store.root / "images"


# ---- values in other files


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """Two files of four rows, joined by one without values of its own."""
    for number in range(2):
        with h5py.File(tmp_path / f"shard{number}.h5", "w") as file:
            file["features"] = np.ones((4, 3), np.float32)
    layout = h5py.VirtualLayout((8, 3), np.float32)
    for number in range(2):
        layout[number * 4 : number * 4 + 4] = h5py.VirtualSource(tmp_path / f"shard{number}.h5", "features", (4, 3))
    with h5py.File(tmp_path / "joined.h5", "w") as file:
        file.create_virtual_dataset("features", layout)
        file["id"] = np.array([name.encode() for name in map(str, range(8))])
        file["linked"] = h5py.ExternalLink(str(tmp_path / "shard0.h5"), "features")
        file["led"] = h5py.SoftLink("/linked")
        file.create_dataset("secret", (64,), np.uint8, external=[(str(tmp_path / "shard0.h5"), 0, 64)])
    return tmp_path / "joined.h5"


def test_links_that_lead_nowhere_are_named(shards: Path) -> None:
    with h5py.File(shards, "r+") as file:
        file["nowhere"] = h5py.ExternalLink("shard9.h5", "/x")
        del file["id"]
        file["id"] = h5py.SoftLink("/nothing")
        file["rows"] = np.ones((8, 3), np.float32)
    store = FeatureStore(shards.parent / "features")
    for dataset, words in (("nowhere", "/nowhere is a link into another file"), ("rows", "/id is a soft link")):
        with pytest.raises(ValueError, match=words):
            import_file(store, shards, name="clip", dataset=dataset)


@pytest.mark.parametrize(
    ("dataset", "words"),
    [
        ("features", "/features is a virtual dataset"),
        ("secret", "/secret has its values in other files"),
        ("linked", "/linked is a link into another file"),
        ("led", "/led is a soft link to /linked"),
    ],
)
def test_values_that_lie_in_other_files_are_not_imported(shards: Path, dataset: str, words: str) -> None:
    store = FeatureStore(shards.parent / "features")
    with pytest.raises(ValueError, match=words):
        import_file(store, shards, name="clip", dataset=dataset)
    assert not store.root.exists()


def test_the_reader_of_parts_takes_no_values_of_another_file(shards: Path) -> None:
    """By the function that it has them from; a whole part so made needs a forger who mends checksums."""
    with h5py.File(shards) as file:
        for name in ("features", "secret", "linked"):
            with pytest.raises(ValueError, match=name):
                own_dataset(file, name)
        assert own_dataset(file, "id").shape == (8,)
    with pytest.raises(KeyError), h5py.File(shards) as file:
        own_dataset(file, "nothing")
