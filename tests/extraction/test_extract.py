"""Extraction: rows that equal the plain module's, of the model that was planned, whatever runs beside it."""

from __future__ import annotations

import copy
import errno
import os
import pickle
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.extracting import counts, reduced, rows, run, up_to
from support.processes import Processes
from support.tiny import SIZE, VIEW, arrays, jpeg, net, photos, pixels, rows_by_hand, staged
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from featstore import (
    Augment,
    FactsDifferError,
    FeatureStore,
    Filed,
    ImageError,
    ImageSet,
    ModelError,
    StagedModel,
    extract,
    finish,
    open_plan,
    plan,
)
from featstore.extraction import job as job_module
from featstore.extraction import opening
from featstore.extraction.extract import run_plan
from featstore.extraction.job import Job
from featstore.extraction.progress import Progress
from featstore.files.part import Part
from featstore.images import processes
from featstore.models.probe import take_probes
from featstore.models.trunk import Trunk

# ---- values


def test_each_cut_and_reduction_of_one_pass_is_what_the_plain_module_gives(store: FeatureStore) -> None:
    images = arrays(37)  # two batches of 32, the second one short
    cuts = ["layer1", "layer1:none", "layer2:avg", "layer2:max", "layer2", "flatten"]
    report = run(images, store, cuts=cuts)
    assert counts(report) == (6 * 37, 0, 0)
    parts = {"layer1": up_to("layer1", net()), "layer2": up_to("layer2", net())}
    parts["flatten"] = nn.Sequential(parts["layer2"], nn.AdaptiveAvgPool2d(1), nn.Flatten())  # sums in its own order
    by_hand = {name: rows_by_hand(part, images, VIEW) for name, part in parts.items()}
    for key, cut, reduction in zip(
        report.keys,
        ["layer1", "layer1", "layer2", "layer2", "layer2", "flatten"],
        ["concat", "none", "avg", "max", "concat", "none"],
        strict=True,
    ):
        assert torch.equal(rows(store, images, key), reduced(by_hand[cut], reduction))


@pytest.mark.parametrize(
    ("dtype", "torch_dtype"),
    [("float16", torch.float16), ("float32", torch.float32), ("bfloat16", torch.bfloat16)],
)
def test_values_are_stored_in_the_type_asked_for(store: FeatureStore, dtype: str, torch_dtype: torch.dtype) -> None:
    images = arrays(5)
    report = run(images, store, dtype=dtype)
    by_hand = reduced(rows_by_hand(up_to("layer2", net()), images, VIEW), "concat")
    assert torch.equal(rows(store, images, report.keys[0]), by_hand.to(torch_dtype))


def test_stored_vectors_are_the_trunks_output_and_not_normalised(store: FeatureStore) -> None:
    images = arrays(6)
    report = run(images, store)
    norms = rows(store, images, report.keys[0]).norm(dim=1)
    assert (norms.max() - norms.min()) / norms.mean() > 0.01
    assert torch.equal(norms, reduced(rows_by_hand(up_to("layer2", net()), images, VIEW), "concat").norm(dim=1))


def test_all_seeds_are_kept_and_each_is_the_view_of_its_seed(store: FeatureStore) -> None:
    images = arrays(7)
    augment = Augment("random_resized_crop", seeds=[0, 1, 5])
    report = run(images, store, augment=augment)
    assert len(set(report.keys)) == 4
    assert [each["seed"] for each in report.sets] == [None, 0, 1, 5]
    views = [VIEW, *(VIEW.with_seed("random_resized_crop", seed) for seed in (0, 1, 5))]
    kept = [rows(store, images, key) for key in report.keys]
    for values, view in zip(kept, views, strict=True):
        assert torch.equal(values, reduced(rows_by_hand(up_to("layer2", net()), images, view), "concat"))
    assert not any(torch.equal(kept[0], others) for others in kept[1:])


def test_seeds_can_be_added_later(store: FeatureStore) -> None:
    images = arrays(4)
    run(images, store, augment=Augment("flip", seeds=[0]))
    report = run(images, store, augment=Augment("flip", seeds=[0, 1, 2]))
    assert counts(report) == (2 * 4, 2 * 4, 0)
    assert [(each["seed"], each["computed"]) for each in report.sets] == [(None, 0), (0, 0), (1, 4), (2, 4)]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_row_depends_on_its_image_alone(store: FeatureStore, tmp_path: Path, workers: int) -> None:
    images = arrays(40)
    augment = Augment("random_resized_crop", seeds=[3])
    whole = run(images, store, augment=augment, workers=workers)
    other = FeatureStore(tmp_path / "other")
    backwards = images.select(list(range(39, 2, -1)))
    for few in (backwards.select(range(5)), backwards):  # in other company each time
        again = run(few, other, augment=augment, workers=2 - workers)
    for mine, others in zip(whole.keys, again.keys, strict=True):
        assert torch.equal(rows(store, backwards, mine), rows(other, backwards, others))


def test_the_models_mode_and_thawed_stages_change_nothing(store: FeatureStore, tmp_path: Path) -> None:
    images = arrays(5)
    report = run(images, store, cuts=["layer2", "dropout"])
    training = staged()
    training.unfreeze()
    training.train()
    before = {name: value.clone() for name, value in training.tensors().items()}
    again = run(images, FeatureStore(tmp_path / "other"), model=training, cuts=["layer2", "dropout"])
    assert again.keys == report.keys
    for key in report.keys:
        assert torch.equal(rows(store, images, key), rows(FeatureStore(tmp_path / "other"), images, key))
    assert training.training
    assert all(torch.equal(value, before[name]) for name, value in training.tensors().items())


def test_a_plain_module_is_extracted_at_the_view_that_is_asked_for(store: FeatureStore) -> None:
    module = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * (SIZE - 2) ** 2, 5))
    report = extract(module, arrays(3), store, cuts=["3"], view=VIEW, dtype="float32", device="cpu")
    assert torch.equal(rows(store, arrays(3), report.keys[0]), rows_by_hand(module, arrays(3), VIEW))


# ---- the model that runs is the one that was planned


def scale(model: StagedModel, factor: float) -> None:
    """Behind the back of torch's counters of versions; exact for powers of two."""
    for tensor in model.parameters():
        tensor.data.mul_(factor)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_weights_edited_after_the_plan_are_refused_before_anything_is_filed(
    store: FeatureStore, precision: Any
) -> None:
    model, images = staged(), arrays(6)
    planned = plan(model, images, store, cuts=["layer1", "layer2"], precision=precision)
    scale(model, 2.0)
    with pytest.raises(
        FactsDifferError,
        match=r"net was changed after the extraction was planned: up to stage layer1\.0 its digest is \w{8}, expected "
        r"\w{8}\. None of what it computes now was filed\. Plan and extract anew; .*copy\.deepcopy\(model\)",
    ):
        run_plan(planned, store, device="cpu")
    assert not store.root.exists()
    scale(model, 0.5)
    assert run_plan(planned, store, device="cpu").computed == 12
    planned = plan(model, images, store, cuts=["layer1", "layer2"], precision=precision)
    scale(model, 2.0)
    with pytest.raises(FactsDifferError, match="was changed after the extraction was planned"):  # whatever is missing
        run_plan(planned, store, device="cpu")


def test_weights_edited_behind_the_last_cut_are_not_asked_for(store: FeatureStore) -> None:
    model, images = staged(), arrays(6)
    planned = plan(model, images, store, cuts=["layer2"])
    with torch.no_grad():
        model.tensors()["fc.weight"].mul_(2.0)
    assert run_plan(planned, store, device="cpu").computed == 6


@pytest.mark.parametrize("is_undone", [False, True])
def test_weights_edited_while_a_job_runs_are_never_filed(
    store: FeatureStore, monkeypatch: pytest.MonkeyPatch, is_undone: bool
) -> None:
    images, model, passes = arrays(20), staged(), iter(range(100))
    trunk_pass, close = Trunk.__call__, Progress.__exit__

    def edited(trunk: Trunk, values: Tensor) -> list[Tensor]:
        if next(passes) == 2:  # after the probe and four rows
            scale(model, 2.0)
        return trunk_pass(trunk, values)

    def undone(progress: Any, *error: Any) -> None:
        close(progress, *error)
        if is_undone:
            scale(model, 0.5)

    with monkeypatch.context() as patched:
        patched.setattr(job_module, "COMMIT_BYTES", 1)
        patched.setattr(Trunk, "__call__", edited)
        patched.setattr(Progress, "__exit__", undone)
        with pytest.raises(FactsDifferError, match=r"up to stage layer1\.0") as refused:
            run(images, store, model=model, batch_size=4)
    assert refused.value.__context__ is None  # told once
    (found,) = store.sets()
    by_hand = reduced(rows_by_hand(up_to("layer2", net()), images.select(range(4)), VIEW, batch_size=4), "concat")
    assert torch.equal(rows(store, images.select(range(4)), found.key), by_hand)
    assert counts(run(images, store, batch_size=4)) == (16, 4, 0)
    again = run(images, store, model=copy.deepcopy(model), batch_size=4)  # the advice
    assert again.keys[0] != found.key or is_undone


def test_a_job_that_runs_a_copy_lets_the_model_train(
    store: FeatureStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images, model, trunk_pass = arrays(12), staged(), Trunk.__call__

    def edited(trunk: Trunk, values: Tensor) -> list[Tensor]:
        if trunk.batch_size == 4:  # not the probe
            scale(model, 2.0)
        return trunk_pass(trunk, values)

    expected = run(images, FeatureStore(tmp_path / "other"), precision="bf16", batch_size=4).keys[0]
    monkeypatch.setattr(job_module, "COMMIT_BYTES", 1)
    monkeypatch.setattr(Trunk, "__call__", edited)
    assert run(images, store, model=model, precision="bf16", batch_size=4).keys == (expected,)
    assert torch.equal(rows(store, images, expected), rows(FeatureStore(tmp_path / "other"), images, expected))


def test_a_probe_of_edited_weights_is_not_filed_with_rows_of_a_copy(
    store: FeatureStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = staged()

    def edited(*args: Any, **options: Any) -> Any:
        scale(model, 2.0)
        return take_probes(*args, **options)

    monkeypatch.setattr(opening, "take_probes", edited)
    with pytest.raises(FactsDifferError, match="was changed after the extraction was planned"):
        run(arrays(3), store, model=model, precision="bf16")
    assert not store.root.exists()


class Doubling(TorchFunctionMode):
    """Doubles what each ReLU gives."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        return result * 2 if func is nn.functional.relu else result


@pytest.mark.parametrize("num_stored", [0, 2])
def test_rows_computed_in_a_mode_that_changes_results_are_never_filed(store: FeatureStore, num_stored: int) -> None:
    if num_stored:
        run(arrays(num_stored), store)
    files = sorted(store.root.rglob("*"))
    with (
        Doubling(),
        pytest.raises(ModelError, match=r"net can't be cached at layer2 while test_extract\.Doubling is act"),
    ):
        run(arrays(3), store)
    assert sorted(store.root.rglob("*")) == files
    assert run(arrays(3), store).computed == 3 - num_stored  # the advice


# ---- nothing of the caller's is touched


def test_random_states_settings_and_arguments_are_left_as_they_were(store: FeatureStore) -> None:
    def states() -> list[Any]:
        return [
            torch.get_rng_state().tolist(),
            random.getstate(),
            str(np.random.get_state()),  # noqa: NPY002
            torch.get_num_threads(),
            torch.is_grad_enabled(),
            torch.get_default_dtype(),
            torch.backends.mkldnn.conv.fp32_precision,  # type: ignore[attr-defined]
            torch.backends.cudnn.benchmark,
            torch.backends.cudnn.deterministic,
            torch.get_float32_matmul_precision(),
        ]

    cuts = ["layer2", "layer1"]
    model = staged()
    requires_grad = [parameter.requires_grad for parameter in model.parameters()]
    before = states()
    run(arrays(6), store, model=model, cuts=cuts, workers=2, augment=Augment("random_resized_crop", seeds=[0]))
    assert states() == before
    assert cuts == ["layer2", "layer1"]
    assert [parameter.requires_grad for parameter in model.parameters()] == requires_grad
    assert model.num_frozen == 0
    assert model.view == VIEW


def test_jobs_are_drawn_as_they_are_needed(store: FeatureStore, monkeypatch: pytest.MonkeyPatch) -> None:
    most = 0
    jobs = Job._jobs

    def counted(self: Any, is_wanted: Any) -> Iterator[Any]:
        nonlocal most
        for job in jobs(self, is_wanted):
            most = max(most, len(self.drawn))
            yield job

    monkeypatch.setattr(Job, "_jobs", counted)
    run(arrays(60), store, workers=2, batch_size=8)
    assert 0 < most <= 2 * 8 + 1  # two batches


def test_images_rendered_by_processes_have_the_rows_that_threads_give_them(
    store: FeatureStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = photos(tmp_path / "photos", 20)
    first = sorted(folder.rglob("*.*"))[0]
    first.write_bytes(b"no image")
    images = ImageSet.from_folder(folder)
    how: dict[str, Any] = {"batch_size": 4, "augment": Augment("flip", seeds=[0]), "on_error": "skip"}
    expected = run(images, FeatureStore(tmp_path / "other"), **how)
    monkeypatch.setattr(processes, "MANY_IMAGES", 1)
    delivered = processes.Renderers._delivered
    session = open_plan(plan(staged(), images, store, cuts=["layer2"]), store, workers=5)
    assert session.renderers is not None
    held = []

    def is_idle(each: processes.Renderers) -> bool:
        held.append(session.running.locked())
        return not each._left_over

    with monkeypatch.context() as noting:
        noting.setattr(processes.Renderers, "is_idle", property(is_idle))
        with pytest.raises(ImageError, match=first.name):
            session.run()
    assert held == [True]  # else it might close what another run has begun to use
    rendered = []
    monkeypatch.setattr(
        processes.Renderers,
        "_delivered",
        lambda *args: rendered.append(1) or delivered(*args),  # type: ignore[func-returns-value]
    )
    report = run(images, store, workers=5, **how)
    assert len(rendered) == 20
    assert counts(report) == counts(expected) == (2 * 19, 0, 1)
    assert report.failures == expected.failures
    assert [name for name, _ in report.failures] == [first.relative_to(folder).as_posix()]
    for key in report.keys:
        good = images.select([at for at, name in enumerate(images.ids) if name != report.failures[0][0]])
        assert torch.equal(rows(store, good, key), rows(FeatureStore(tmp_path / "other"), good, key))


def test_pieces_of_a_plan_run_by_several_sessions_are_the_whole(store: FeatureStore, tmp_path: Path) -> None:
    images = arrays(23)
    expected = run(images, FeatureStore(tmp_path / "other"), batch_size=4, augment=Augment("flip", seeds=[0]))
    planned = plan(staged(), images, store, cuts=["layer2"], augment=Augment("flip", seeds=[0]), dtype="float32")
    pieces = []
    for start in (0, 1, 2):
        with open_plan(planned, store, batch_size=4) as session:
            pieces.append(pickle.loads(pickle.dumps(session.run(range(start, 23, 3)))))
            assert session.run(range(0)).computed == [0, 0]
    whole = Filed.together(planned, pieces)
    assert [len(parts) for parts in whole.parts] == [3, 3]
    assert whole.has_row.all()
    report = finish(planned, store, pieces)
    assert (report.computed, report.keys, report.notes) == (46, expected.keys, expected.notes)
    for each in planned.sets:
        assert len(store.set(each.spec.key).parts) == 1
        found = rows(store, images, each.spec.key)
        assert torch.equal(found, rows(FeatureStore(tmp_path / "other"), images, each.spec.key))


def test_images_of_pieces_that_were_not_run_are_missing_and_have_no_row(store: FeatureStore) -> None:
    contents = pixels(6)[[5, 0, 1, 2, 3, 4, 5, 0]]  # of what is there twice the one is in both splits
    images = ImageSet.from_arrays(contents, [0, 1] * 4, splits=["valid"] + ["train"] * 7)
    planned = plan(staged(), images, store, cuts=["layer2"], augment=Augment("flip", seeds=[0]))
    with open_plan(planned, store, device="cpu", workers=0) as session:
        report = finish(planned, store, [session.run([1, 2, 6])])
        session.stop()
        stopped = finish(planned, store, [session.run([3, 4])])
    assert [(each["rows"], each["computed"]) for each in report.sets] == [(3, 2), (4, 3)]
    assert (report.missing, report.failed) == (5, 0)
    assert report.notes == ("5 images not computed, since no run was given them: run it again",)
    assert (stopped.missing, stopped.notes[-1]) == (7, "7 images not computed, since the run was stopped: run it again")
    assert run(images, store, dtype="float16", augment=Augment("flip", seeds=[0])).computed == 3 + 2


# ---- at once


def extract_beside_another(root: Path, ready: Path) -> None:
    """Begins when two files lie in the folder `ready`, of which one is its own."""
    (ready / str(os.getpid())).touch()
    while len(list(ready.iterdir())) < 2:
        time.sleep(0.001)
    run(arrays(30), FeatureStore(root), batch_size=4, augment=Augment("flip", seeds=[0]))


def test_two_jobs_at_once_leave_each_row_once_for_every_reader(
    tmp_path: Path, store: FeatureStore, processes: Processes
) -> None:
    (tmp_path / "ready").mkdir()
    program = f"""
        from pathlib import Path
        from test_extract import extract_beside_another
        extract_beside_another(Path({str(store.root)!r}), Path({str(tmp_path / "ready")!r}))
    """
    for job in [processes.start(program) for _ in range(2)]:
        ended = processes.end(job)
        assert ended.returncode == 0, ended.stderr
    images = arrays(30)
    report = run(images, store, augment=Augment("flip", seeds=[0]))
    assert report.computed == 0
    for key, view in zip(report.keys, [VIEW, VIEW.with_seed("flip", 0)], strict=True):
        found = store.set(key)
        assert found.index.num_images == 30
        by_hand = reduced(rows_by_hand(up_to("layer2", net()), images, view, batch_size=4), "concat")
        assert torch.equal(store.features(images, key)[:], by_hand)
    assert not list(store.root.rglob(".*"))
    assert len(list((store.root / "images").iterdir())) == 1
    assert store.damaged() == []
    assert all(Part.open(path).verify() == [] for path in store.root.rglob("part-*.h5"))


def test_memory_does_not_grow_with_the_number_of_images(tmp_path: Path, processes: Processes) -> None:
    """A process whose rows are 164 MB in all, and parts of 8 MB, which it merges at its end."""
    if not Path("/proc/self/statm").exists():
        pytest.skip("the system doesn't tell how much memory a process has")
    (tmp_path / "photos" / "one").mkdir(parents=True)
    for number in range(2500):  # a decoder doesn't look behind the end of a JPEG
        (tmp_path / "photos" / "one" / f"{number:04d}.jpg").write_bytes(jpeg(0) + str(number).encode())
    program = f"""
        import resource, sys, threading, time
        from pathlib import Path
        import torch
        from support.tiny import VIEW
        from featstore import FeatureStore, ImageSet, StagedModel, extract
        from featstore.extraction import job

        job.COMMIT_BYTES = 8 << 20
        model = StagedModel.from_module(torch.nn.Sequential(torch.nn.Conv2d(3, 256, 2, 2), torch.nn.ReLU()), view=VIEW)

        def resident():
            return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()

        def run(images):
            return extract(model, images, FeatureStore({str(tmp_path)!r} + "/features"), dtype="float32", device="cpu",
                           cuts=["0:none"], batch_size=32)

        images = ImageSet.from_folder({str(tmp_path / "photos")!r})
        assert run(images.select(range(200))).computed == 200
        before, most, is_done = resident(), [0], threading.Event()

        def watch():
            while not is_done.is_set():
                most[0] = max(most[0], resident())
                time.sleep(0.002)

        watcher = threading.Thread(target=watch)
        watcher.start()
        assert run(images).computed == 2300
        is_done.set()
        watcher.join()
        (found,) = FeatureStore({str(tmp_path)!r} + "/features").sets()
        assert sorted(part.num_rows for part in found.parts) == [200, 2300]
        print(most[0] - before)
    """
    assert int(processes.answer(program)) < 60 << 20


# ---- the image set beside the rows


def test_where_nothing_is_computed_a_store_that_cannot_be_written_is_no_error(
    tmp_path: Path, store: FeatureStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = ImageSet.from_folder(photos(tmp_path / "photos", 8)).split(valid=0.25)
    run(images, store)

    def read_only(*arguments: Any, **options: Any) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr("featstore.store.store.write_table", read_only)
    fresh = FeatureStore(store.root)
    report = run(images.split(valid=0.5, seed=7), fresh)
    assert counts(report) == (0, 8, 0)
    assert report.notes == (f"the image set isn't noted in {store.root} (Read-only file system)",)
    with pytest.raises(OSError, match="Read-only file system"):
        run(images.split(valid=0.5, seed=7), fresh, cuts=["layer1"])


def test_another_image_set_of_the_same_name_is_noted_and_stays(tmp_path: Path, store: FeatureStore) -> None:
    first = ImageSet.from_folder(photos(tmp_path / "photos", 8))
    assert run(first, store).notes == ()
    (tmp_path / "photos" / "cat" / "new.jpg").write_bytes(jpeg(99))
    assert run(ImageSet.from_folder(tmp_path / "photos"), store).notes == ()  # the same, with one more
    stems = {path.stem for path in (store.root / "images").iterdir()}
    other = tmp_path / "elsewhere" / "photos" / "bird"
    other.mkdir(parents=True)
    (other / "a.jpg").write_bytes(jpeg(50))
    (note,) = run(ImageSet.from_folder(other.parent), store).notes
    assert note.startswith(f"{store.root} had an image set called photos of other images; this one is the newest")
    (stem,) = [stem for stem in stems if stem in note]
    assert ImageSet.from_store(store).ids == ("bird/a.jpg",)
    assert set(ImageSet.from_store(store, stem).ids) == {*first.ids, "cat/new.jpg"}
