"""Shards: any number of jobs, which know nothing of each other, leave the rows of one."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.extracting import counts, rows, run
from support.processes import Processes
from support.programs import Program, Run, extract_flags
from support.tiny import jpeg, pixels, staged

from featstore import Augment, ExtractReport, FeatureStore, ImageError, ImageSet, plan
from featstore.cli.app import ExtractFlags
from featstore.extraction.shards import Shard, local_device, local_threads, local_workers, shard_of
from featstore.machine import num_processors

SLURM = {f"SLURM_ARRAY_TASK_{name}": str(value) for name, value in {"ID": 5, "MIN": 3, "MAX": 6, "COUNT": 4}.items()}


@pytest.fixture
def featstore(run: Run) -> Program:
    return lambda *arguments: run("featstore", *arguments)


# ---- Which images are whose


@pytest.mark.parametrize("count", [1, 2, 3, 7, 1000])
def test_the_owner_of_an_image_is_a_hash_of_its_id_modulo_the_number_of_jobs(count: int) -> None:
    ids = [f"cat/{number}.jpg" for number in range(100)] + ["ümläut.png", "cat/f\udcfcr.jpg"]
    owner = [int(hashlib.sha256(each.encode("utf-8", "surrogateescape")).hexdigest()[:16], 16) % count for each in ids]
    for index in range(min(count, 7)):
        assert Shard(index, count).owned(ids).tolist() == [each == index for each in owner]


def test_owners_stay_those_they_were() -> None:
    ids = [f"{number}.jpg" for number in range(12)]
    owned = [np.flatnonzero(Shard(index, 3).owned(ids)).tolist() for index in range(3)]
    assert owned == [[0, 2, 5, 7, 11], [1, 3, 4, 9], [6, 8, 10]]


@pytest.mark.parametrize(
    ("text", "environment", "expected"),
    [
        ("0/4", {}, Shard(0, 4)),
        ("3/4", {"RANK": "0", "WORLD_SIZE": "2"}, Shard(3, 4)),
        ("slurm", SLURM, Shard(2, 4)),
        ("kubernetes/8", {"JOB_COMPLETION_INDEX": "7"}, Shard(7, 8)),
        ("torchrun", {"RANK": "1", "WORLD_SIZE": "2"}, Shard(1, 2)),
    ],
)
def test_a_shard_is_given_by_number_or_told_by_what_started_the_job(
    text: str, environment: dict[str, str], expected: Shard
) -> None:
    assert shard_of(text, environment) == expected


@pytest.mark.parametrize(
    ("text", "environment", "sentence"),
    [
        ("4/4", {}, "shard is '4/4'. Expected i/n with i from 0 to n - 1, such as 0/4"),
        ("0/0", {}, "shard is '0/0'. Expected i/n"),
        ("-1/4", {}, "shard is '-1/4'. Expected i/n"),
        ("²/4", {}, "shard is '²/4'. Expected i/n"),
        ("3", {}, "shard is '3'. Expected i/n"),
        ("pbs", {}, "what started the jobs: slurm, kubernetes/n or torchrun"),
        ("slurm", {}, "SLURM_ARRAY_TASK_ID isn't set here. Expected a task of an array job. Submit it with sbatch"),
        ("slurm", {**SLURM, "SLURM_ARRAY_TASK_COUNT": "2"}, "2 tasks from 3 to 6, so some numbers are left out"),
        ("kubernetes", {"JOB_COMPLETION_INDEX": "0"}, "such as kubernetes/8"),
        ("kubernetes/8", {}, "JOB_COMPLETION_INDEX isn't set here. Expected a pod of a job with completionMode"),
        ("kubernetes/8", {"JOB_COMPLETION_INDEX": "8"}, "There is no shard 8 of 8"),
        ("torchrun", {"RANK": "0"}, "WORLD_SIZE isn't set here. Expected a process that torchrun started"),
        ("torchrun", {"RANK": "?", "WORLD_SIZE": "2"}, "RANK is '?' here, no number"),
    ],
)
def test_a_shard_that_there_cannot_be_is_refused(text: str, environment: dict[str, str], sentence: str) -> None:
    with pytest.raises(ValueError, match="Expected") as error:
        shard_of(text, environment)
    assert sentence in str(error.value)


@pytest.mark.parametrize(
    ("device", "rank", "num_gpus", "expected"),
    [
        ("auto", "3", 8, "cuda:3"),
        ("cuda", "3", 8, "cuda:3"),
        ("cuda:1", "3", 8, "cuda:1"),
        ("cpu", "3", 8, "cpu"),
        ("auto", "3", 0, "auto"),
        ("auto", "3", 1, "cuda:0"),  # each process sees its own GPU alone
        ("auto", "", 8, "auto"),
    ],
)
def test_each_rank_of_a_machine_has_a_gpu_of_its_own(device: str, rank: str, num_gpus: int, expected: str) -> None:
    assert local_device(device, {"LOCAL_RANK": rank}, num_gpus=num_gpus) == expected


@pytest.mark.parametrize(("local_size", "expected"), [("4", 4), ("32", 1), ("1", None), ("", None)])
def test_the_ranks_of_a_machine_share_its_processors(local_size: str, expected: int | None) -> None:
    assert local_workers({"LOCAL_WORLD_SIZE": local_size}, num_processors=16) == expected


TORCHRUNS = {"OMP_NUM_THREADS": "1", "TORCHELASTIC_RUN_ID": "none"}
"""What torchrun sets where nobody has said how many threads there are."""


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        (TORCHRUNS, 4),
        ({}, 4),  # another launcher's, which says nothing of threads
        (TORCHRUNS | {"OMP_NUM_THREADS": "2"}, None),
        ({"OMP_NUM_THREADS": "1"}, None),  # which only torchrun sets for others
        (TORCHRUNS | {"MKL_NUM_THREADS": "1"}, None),
        (TORCHRUNS | {"LOCAL_WORLD_SIZE": "1"}, None),
        (TORCHRUNS | {"LOCAL_WORLD_SIZE": "32"}, 1),
    ],
)
def test_the_ranks_of_a_machine_compute_with_its_processors_unless_somebody_has_said_how_many(
    environment: dict[str, str], expected: int | None
) -> None:
    assert local_threads("cpu", {"LOCAL_WORLD_SIZE": "4", **environment}, num_processors=16) == expected


def test_torch_is_left_alone_beside_a_gpu() -> None:
    environment = {"LOCAL_WORLD_SIZE": "4", **TORCHRUNS}
    assert local_threads("cpu", environment, num_processors=16) == local_threads("auto", environment, num_processors=16)
    assert local_threads("cuda:3", environment, num_processors=16) is None


def test_a_rank_decodes_and_computes_with_its_share_of_the_processors(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", **TORCHRUNS}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("MKL_NUM_THREADS", raising=False)
    before, share = torch.get_num_threads(), max(1, num_processors() // 2)
    try:
        torch.set_num_threads(share + 2)
        assert ExtractFlags(device="cpu").as_started().workers == share
        assert torch.get_num_threads() == share
    finally:
        torch.set_num_threads(before)


# ---- Any number of jobs


@pytest.fixture
def images() -> ImageSet:
    """Of 40 images 20 in two splits or twice in one, so that equal contents have ids of several owners."""
    contents = pixels(30)[[*range(30), *range(5), *range(20, 25)]]
    splits = ["valid"] * 10 + ["train"] * 30
    return ImageSet.from_arrays(contents, [index % 2 for index in range(40)], splits=splits)


def all_shards(count: int, images: ImageSet, store: FeatureStore, **options: Any) -> list[ExtractReport]:
    return [run(images, store, shard=f"{index}/{count}", **options) for index in range(count)]


@pytest.mark.parametrize("count", [2, 3])
def test_any_number_of_jobs_computes_each_content_once_and_leaves_the_rows_of_one_job(
    store: FeatureStore, tmp_path: Path, images: ImageSet, count: int
) -> None:
    options: dict[str, Any] = {"cuts": ["layer1", "layer2"], "augment": Augment("random_resized_crop", seeds=[0, 1])}
    whole = run(images, FeatureStore(tmp_path / "whole"), **options)
    assert whole.computed == 2 * (30 + 2 * 25)  # in training there are 25 contents
    reports = all_shards(count, images, store, **options)
    assert sum(report.computed for report in reports) == whole.computed
    assert sum(report.reused + report.failed + report.missing for report in reports) == 0
    for place, (key, each) in enumerate(zip(whole.keys, whole.sets, strict=True)):
        wanted = images if each["seed"] is None else images.train
        assert torch.equal(rows(store, wanted, key), rows(FeatureStore(tmp_path / "whole"), wanted, key))
        assert sum(report.sets[place]["rows"] for report in reports) == each["rows"]
    assert len(list((store.root / "images").iterdir())) == 1
    assert run(images, store, **options).computed == 0


def test_images_of_one_content_are_one_jobs_whatever_their_ids(images: ImageSet, store: FeatureStore) -> None:
    plans = [plan(staged(), images, store, shard=Shard(index, 3)) for index in range(3)]
    owners = np.array([each.is_owned for each in plans])
    assert (owners.sum(axis=0) == 1).all()
    by_id = np.array([Shard(index, 3).owned(images.ids) for index in range(3)])
    assert (by_id.argmax(0)[30:] != by_id.argmax(0)[[*range(5), *range(20, 25)]]).any()  # else this shows nothing
    assert (owners.argmax(0)[30:] == owners.argmax(0)[[*range(5), *range(20, 25)]]).all()


def test_another_number_of_jobs_goes_on_with_what_is_missing(
    store: FeatureStore, tmp_path: Path, images: ImageSet
) -> None:
    first = run(images, store, shard="1/3")
    rest = all_shards(2, images, store)
    assert 0 < first.computed < 30
    assert sum(report.computed for report in rest) == 30 - first.computed
    whole = run(images, FeatureStore(tmp_path / "whole"))
    assert torch.equal(
        rows(store, images, whole.keys[0]), rows(FeatureStore(tmp_path / "whole"), images, whole.keys[0])
    )


def test_a_job_with_nothing_of_its_own_to_compute_is_done(store: FeatureStore) -> None:
    few = ImageSet.from_arrays(pixels(2), [0, 1])
    assert sorted(counts(report) for report in all_shards(20, few, store)) == [(0, 0, 0)] * 18 + [(1, 0, 0)] * 2


def test_a_report_is_about_the_images_of_its_shard(store: FeatureStore, images: ImageSet) -> None:
    planned = plan(staged(), images, store, cuts=["layer2"], dtype="float32", shard="0/4")
    owned = int(planned.is_owned.sum())
    assert 0 < owned < 40
    assert planned.describe().startswith(f"shard 0 of 4: {owned} images: 0 stored, {owned} to compute")
    report = run(images, store, shard="0/4")
    assert str(report).startswith(f"shard 0 of 4: 0 rows reused, {report.computed} computed")
    assert report.sets[0]["rows"] == owned
    assert plan(staged(), images, store, cuts=["layer2"], dtype="float32", shard="0/4").status()["stored"] == owned
    assert plan(staged(), images, store, cuts=["layer2"], dtype="float32").status()["stored"] == owned


def test_a_job_that_fails_leaves_the_others_their_work(store: FeatureStore, tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    for number in range(12):
        (tmp_path / f"photos/{number}.jpg").write_bytes(jpeg(number))
    (tmp_path / "photos/4.jpg").write_bytes(jpeg(4)[:200])  # of the second job
    (tmp_path / "photos/7.jpg").unlink()  # of the first
    (tmp_path / "photos/7.jpg").symlink_to("nowhere")
    photos = ImageSet.from_folder(tmp_path / "photos")
    for index, image in enumerate(("7.jpg", "4.jpg")):
        with pytest.raises(ImageError, match=image):
            run(photos, store, shard=f"{index}/3")
    assert counts(run(photos, store, shard="2/3")) == (3, 0, 0)
    left = all_shards(3, photos, store, on_error="skip")
    assert [[image for image, _ in report.failures] for report in left] == [["7.jpg"], ["4.jpg"], []]
    assert [(report.failed, report.missing) for report in left] == [(0, 1), (1, 0), (0, 0)]
    assert plan(staged(), photos, store, cuts=["layer2"], dtype="float32").status()["missing"] == 2


def test_what_is_no_shard_is_refused_before_anything_is_read(store: FeatureStore, images: ImageSet) -> None:
    with pytest.raises(TypeError, match="shard is 3; expected a text such as '0/4'"):
        run(images, store, shard=3)
    with pytest.raises(ValueError, match=r"There is no shard 3 of 3. Expected one of 0 to n - 1"):
        Shard(3, 3)


# ---- The program


def test_ranks_in_processes_of_their_own_leave_the_rows_of_one_job(
    featstore: Program, here: Path, processes: Processes
) -> None:
    program = "import featstore.cli.app, sys; sys.exit(featstore.cli.app.main(sys.argv[1:]))"
    flags = extract_flags("--augment", "flip", "--seeds", "0", "--json")
    shutil.copy(here / "photos/cat/001.jpg", here / "photos/dog/again.jpg")
    ranks = [
        processes.start(
            program,
            "extract",
            *flags,
            cwd=here,
            environment={"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"},
        )
        for rank in range(2)
    ]
    ended = processes.end_all(ranks)
    assert [each.returncode for each in ended] == [0, 0], [each.stderr for each in ended]
    told = [json.loads(each.stdout) for each in ended]
    assert [each["shard"] for each in told] == ["shard 0 of 2", "shard 1 of 2"]
    whole = featstore("extract", *extract_flags("--augment", "flip", "--seeds", "0", "--json", store="whole")).json
    for mine, others in zip(whole["sets"], zip(*(each["sets"] for each in told), strict=True), strict=True):
        assert sum(each["computed"] for each in others) == mine["computed"]
        images = ImageSet.from_store(FeatureStore(here / "feats"))
        wanted = images if mine["seed"] is None else images.train
        stored = [FeatureStore(here / name).features(wanted, mine["key"])[:] for name in ("feats", "whole")]
        assert torch.equal(*stored)
    assert featstore("status", *flags).code == 0


def test_status_of_a_shard_counts_its_images_and_without_one_all(featstore: Program, here: Path) -> None:
    extracted = featstore("extract", *extract_flags("--shard", "0/2"))
    assert extracted.code == 0
    assert "\nshard 0 of 2: 0 rows reused" in extracted.err
    assert featstore("status", *extract_flags("--shard", "0/2")).code == 0
    assert featstore("status", *extract_flags("--shard", "1/2")).code == 3
    both = [featstore("status", *extract_flags("--json", "--shard", f"{index}/2")).json for index in range(2)]
    assert {name: both[0][name] + both[1][name] for name in both[0]} == featstore(
        "status", *extract_flags("--json")
    ).json


def test_a_wrong_shard_is_wrong_usage(featstore: Program) -> None:
    ran = featstore("extract", *extract_flags("--shard", "2/2"))
    assert ran.code == 2
    assert "--shard is '2/2'. Expected i/n with i from 0 to n - 1" in ran.err


def test_the_template_for_slurm_is_a_script() -> None:
    template = Path(__file__).parents[2] / "scripts/slurm_extract.sbatch"
    subprocess.run(["bash", "-n", template], check=True)
