"""A run goes to a model hub and comes back as it was, with a card that nothing in it can break."""

from __future__ import annotations

import io
import json
import pickle
import struct
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import pytest
import torch
from support.hub_server import Hub, served
from support.programs import Run
from support.tiny import pixels, staged

from featstore import DamagedFileError, FeatureStoreError, ImageSet
from featstore.digest import digest_json
from training import Learner
from training.hub import card, pull, push

REPO = "somebody/animals"
WORSE = ("---\ntags: [x]", '<script>alert("1")</script>', "a | b `c` [d](e)", "# x")


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    monkeypatch.setenv("HF_TOKEN", "hf_none")
    with served() as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
        yield hub


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    images = ImageSet.from_arrays(pixels(12), [place % 4 for place in range(12)], classes=WORSE).split(valid=0.4)
    learn = Learner(staged(), images, cut="layer2", head="linear", device="cpu", workers=0, quiet=True)
    learn.fit(1, lr=1e-2)
    return learn.save(tmp_path / "saved")


def test_a_run_comes_back_from_a_hub_byte_for_byte(hub: Hub, saved: Path, tmp_path: Path) -> None:
    address = push(saved, REPO, private=True)
    assert address == f"{hub.endpoint}/{REPO}/commit/{hub.commit(REPO)}"
    assert hub.repos[REPO].keys() == {*files(saved), "README.md"}
    assert hub.private == {REPO}
    hub.repos[REPO]["evil.py"] = b"raise SystemExit"
    assert files(pull(REPO, tmp_path / "runs" / "pulled")) == files(saved)
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["pulled"]
    one, other = (Learner.load(each, module=staged(), quiet=True) for each in (saved, tmp_path / "runs/pulled"))
    np.testing.assert_array_equal(one.predict_proba(pixels(3)), other.predict_proba(pixels(3)))
    with pytest.raises(FeatureStoreError, match="pulled holds a saved run already"):
        pull(REPO, tmp_path / "runs/pulled")


def test_what_a_hub_holds_is_checked_before_it_gets_its_name(hub: Hub, saved: Path, tmp_path: Path) -> None:
    push(saved, REPO)
    content = hub.repos[REPO]["model.safetensors"]
    hub.repos[REPO]["model.safetensors"] = content[:-1] + bytes([content[-1] ^ 1])
    with pytest.raises(DamagedFileError, match=rf"{REPO}/model\.safetensors"):
        pull(REPO, tmp_path / "pulled")
    hub.repos[REPO].pop("model.json")
    with pytest.raises(FeatureStoreError, match=rf"{REPO} holds no run: it has no model\.json"):
        pull(REPO, tmp_path / "pulled")
    with pytest.raises(FeatureStoreError, match="The hub didn't do what was asked about somebody/nothing"):
        pull("somebody/nothing", tmp_path / "pulled")
    with pytest.raises(FeatureStoreError, match="The hub didn't do what was asked about no name/"):
        push(saved, "no name/")
    assert [path.name for path in tmp_path.iterdir()] == ["saved"]
    (saved / "history.csv").write_text("epoch\n")
    with pytest.raises(DamagedFileError, match=r"history\.csv"):
        push(saved, "somebody/damaged")
    assert hub.repos.keys() == {REPO}


def resealed(contents: dict[str, bytes], **changes: Any) -> bytes:
    """The facts of a run with other files, such that all checksums fit: as somebody makes them who means harm."""
    facts = json.loads(contents["model.json"])
    facts |= {"tensors": sha256(contents["model.safetensors"]).hexdigest(), **changes}
    if isinstance(facts["files"], dict):
        facts["files"] |= {name: sha256(contents[name]).hexdigest() for name in facts["files"] if name in contents}
    facts.pop("checksum")
    return json.dumps({**facts, "checksum": digest_json(facts)}).encode()


class Touch:
    """Makes a file where somebody unpickles it."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def test_a_repository_of_somebody_who_means_harm_leaves_nothing_here(hub: Hub, saved: Path, tmp_path: Path) -> None:
    push(saved, REPO)
    good, safe = dict(hub.repos[REPO]), "model.safetensors"
    buffer = io.BytesIO()
    torch.save({"weight": Touch(tmp_path / "ran")}, buffer)
    contents = {
        "pickled": pickle.dumps(Touch(tmp_path / "ran")),
        "saved by torch": buffer.getvalue(),
        "a header of exabytes": struct.pack("<Q", 1 << 62) + b"{}",
        "a header of 100 MB": struct.pack("<Q", 100_000_000) + b"{" + bytes(1_000),
        "nothing": b"",
    }
    for content in contents.values():
        hub.repos[REPO] = {**good, safe: content}
        hub.repos[REPO]["model.json"] = resealed(hub.repos[REPO])
        with pytest.raises(FeatureStoreError, match=rf"{REPO}/model\.safetensors can't be read as a weights file"):
            pull(REPO, tmp_path / "pulled")
    digest = "0" * 64
    for name in (
        "../up",
        str(tmp_path / "there"),
        "a/b",
        "..",
        ".",
        "",
        "*",
        "[a-z]*",
        "x" * 300,
        "a\nb",
        "a\0b",
        ".cache",
    ):
        facts = resealed(good, files={**json.loads(good["model.json"])["files"], name: digest})
        hub.repos[REPO] = {**good, name: b"evil", "model.json": facts}
        with pytest.raises(
            FeatureStoreError, match=rf"{REPO}/model\.json lists .* has all its files by their own names"
        ):
            pull(REPO, tmp_path / "pulled")
    for files_ in ([safe], safe, 7, {"x": 3}, {"x": None}, [["a"]]):
        hub.repos[REPO] = {**good, "model.json": resealed(good, files=files_)}
        with pytest.raises(FeatureStoreError, match=rf"{REPO}/model\.json is damaged"):
            pull(REPO, tmp_path / "pulled")
    for facts in (b"[" * 100_000, b'{"format":' + b"9" * 10_000 + b"}", b"{}"):
        hub.repos[REPO] = {**good, "model.json": facts}
        with pytest.raises(DamagedFileError, match=rf"{REPO}/model\.json is damaged"):
            pull(REPO, tmp_path / "pulled")
    hub.repos[REPO] = {**good, "model.json": bytes(1 << 26) + b" "}
    with pytest.raises(FeatureStoreError, match=r"has a model\.json of 67,108,865 bytes; a run's facts are 67,108,864"):
        pull(REPO, tmp_path / "pulled")
    assert [path.name for path in tmp_path.iterdir()] == ["saved"]


def test_a_card_says_what_the_model_is_whatever_its_classes_are_called(saved: Path) -> None:
    text = card(saved, REPO)
    _, _, body = text.split("---\n", 2)
    assert huggingface_hub.ModelCard(text).data.to_dict() == {  # type: ignore[no-untyped-call]
        "library_name": "featstore",
        "pipeline_tag": "image-classification",
        "tags": ["featstore", "net"],
        "metrics": ["accuracy", "f1", "calibration_error"],
    }
    assert "<script>" not in body
    assert "\n---" not in body
    assert [line for line in body.splitlines() if line[:2] in ("0.", "1.", "2.", "3.")] == [
        r"0. \-\-\-\\ntags: \[x\]",
        '1. &lt;script&gt;alert\\("1"\\)&lt;/script&gt;',
        r"2. a \| b \`c\` \[d\]\(e\)",
        r"3. \# x",
    ]
    assert r"up to layer2, reduction concat, head linear" in body
    assert r"95 % interval" in body
    assert r"size 16" in body


def test_a_run_of_somebodys_file_runs_no_code_unasked(
    run: Run, here: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = ["--images", "photos", "--store", "feats", "--backbone", "tiny.py:make_model", "--size", "32", "--extract"]
    assert run("featstore-train", "head", *flags, "--epochs", "1", "--lr", "1e-2", "--out", "runs/head").code == 0
    pushed = run("featstore-train", "push", "--model", "runs/head", "--repo", REPO)
    assert (pushed.code, pushed.out) == (0, f"{hub.endpoint}/{REPO}/commit/{hub.commit(REPO)}\n")
    pulled = run("featstore-train", "pull", "--repo", REPO, "--out", "pulled", "--json")
    assert (pulled.code, pulled.json) == (0, {"run": "pulled"})
    monkeypatch.setenv("XDG_STATE_HOME", str(here / "another"))  # a user who has run none of it
    ran = run("featstore-train", "predict", "--model", "pulled", "photos")
    assert ran.code == 1
    assert "pulled would run code: make_model in" in ran.err
    assert run("featstore-train", "predict", "--model", "pulled", "photos", "--trust-code").code == 0
