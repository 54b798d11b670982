"""`featstore doctor`: what it finds of a sound installation, and of one with a part broken, the others all the same."""

from __future__ import annotations

import re
import sys
from importlib import metadata
from pathlib import Path

import pytest
import torch
from support.decoders import fast, jpegs_by
from support.programs import Program

from featstore.machine import num_processors

EVERY = {"Python", "featstore", "torch", "torchvision", "h5py", "numpy", "pillow", "JPEG", "PNG", "WebP", "AVIF"} | {
    *("weights", "disk", "processors")
}


def test_a_sound_installation_has_nothing_to_mend(featstore: Program, tmp_path: Path) -> None:
    ran = featstore("doctor", "--json")
    assert ran.code == 0
    found = {each["check"]: each for each in ran.json}
    assert found.keys() >= EVERY
    assert {name for name in EVERY if found[name]["state"] == "broken"} == set()
    assert found["torch"]["found"] == metadata.version("torch")
    assert found["JPEG"]["found"] == "read by simplejpeg"
    assert found["HEIC"]["found"] == "read by pillow-heif"
    assert found["pixels"]["state"] == "ok"
    assert re.match(r"those of featstore-decode-1, digest \w{8}$", found["pixels"]["found"])
    assert found["pixels:reduced"]["state"] == "ok"
    assert found["pixels:reduced"]["found"].startswith("those of featstore-decode-1-reduced, digest ")
    assert found["processors"]["found"].startswith(f"{num_processors()}, torch uses {torch.get_num_threads()};")
    gpus = {name for name in found if name.startswith("cuda:")}
    assert len(gpus) == torch.cuda.device_count()
    shown = featstore("doctor").out.splitlines()
    assert [line.split()[0] for line in shown[1:]] == [each["check"] for each in ran.json]


def test_decoders_that_give_other_pixels_are_told(featstore: Program) -> None:
    with jpegs_by(fast):
        ran = featstore("doctor", "--json")
    found = {each["check"]: each for each in ran.json}
    assert (ran.code, found["JPEG"]["state"], found["pixels"]["state"]) == (0, "ok", "note")
    assert found["pixels"]["found"].startswith("others than those of featstore-decode-1")


def test_a_library_that_cannot_be_imported_is_named_with_its_remedy_and_the_rest_is_checked(
    featstore: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "h5py", None)  # to import it fails
    ran = featstore("doctor", "--json")
    found = {each["check"]: each for each in ran.json}
    assert (ran.code, found["h5py"]["state"]) == (1, "broken")
    assert "can't be imported (ModuleNotFoundError" in found["h5py"]["found"]
    assert f'h5py: pip install --force-reinstall "{wanted("h5py")}"\n' in ran.err
    assert found.keys() >= EVERY


def test_without_torch_what_needs_it_says_so(featstore: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    ran = featstore("doctor", "--json")
    found = {each["check"]: each for each in ran.json}
    assert ran.code == 1
    assert {name: found[name]["state"] for name in ("torch", "GPU", "weights", "processors")} == dict.fromkeys(
        ("torch", "GPU", "weights", "processors"), "broken"
    )
    assert found["disk"]["state"] != "broken"


def test_an_extra_that_is_not_installed_is_no_fault(featstore: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    version = metadata.version

    def without_timm(name: str) -> str:
        if name == "timm":
            raise metadata.PackageNotFoundError(name)
        return version(name)

    monkeypatch.setattr(metadata, "version", without_timm)
    ran = featstore("doctor", "--json")
    assert ran.code == 0
    (found,) = (each for each in ran.json if each["check"] == "timm")
    assert (found["state"], found["found"]) == ("note", "not installed")
    assert 'timm: for it: pip install "featstore[timm]"\n' in ran.err


def test_a_version_that_is_too_old_is_named(featstore: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    version = metadata.version
    monkeypatch.setattr(metadata, "version", lambda name: "2.9.1+cu126" if name == "torch" else version(name))
    ran = featstore("doctor", "--json")
    (found,) = (each for each in ran.json if each["check"] == "torch")
    least = wanted("torch").partition(">=")[2]
    assert (ran.code, found["state"], found["found"]) == (1, "broken", f"2.9.1+cu126 is older than {least}")


def test_a_cache_that_cannot_be_written_is_noted_with_its_variable(
    featstore: Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path / "file"))
    ran = featstore("doctor", "--json")
    (found,) = (each for each in ran.json if each["check"] == "weights")
    assert (ran.code, found["state"]) == (0, "note")
    assert str(tmp_path / "file" / "checkpoints") in found["found"]
    assert "weights: downloaded weights can't be kept: name another folder in TORCH_HOME\n" in ran.err


def test_where_timm_keeps_weights_is_said_and_noted_where_it_cannot_be_written(
    featstore: Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    def weights() -> dict[str, str]:
        (found,) = (each for each in featstore("doctor", "--json").json if each["check"] == "weights")
        return dict(found)

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    assert f"; timm's in {tmp_path / 'hub'}, " in weights()["found"]
    assert weights()["found"].endswith(" free")
    (tmp_path / "hub").touch()
    assert weights()["remedy"].endswith("can't be kept: name another folder in HF_HUB_CACHE")
    assert weights()["state"] == "note"
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    assert "timm" not in weights()["found"]


def test_fewer_threads_than_processors_are_noted_only_where_a_variable_says_so(
    featstore: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    from featstore.cli import doctor

    def processors() -> dict[str, str]:
        (found,) = (each for each in featstore("doctor", "--json").json if each["check"] == "processors")
        return dict(found)

    monkeypatch.setattr(doctor, "num_processors", lambda: 2 * torch.get_num_threads())  # two by simultaneous threads
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.delenv("MKL_NUM_THREADS", raising=False)
    assert processors()["state"] == "ok"
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert processors()["state"] == "note"
    assert processors()["remedy"].endswith(", as OMP_NUM_THREADS says; unset it")


def test_an_avif_that_this_pillow_cannot_read_is_noted(featstore: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    from PIL import AvifImagePlugin

    monkeypatch.setattr(AvifImagePlugin, "SUPPORTED", False)
    ran = featstore("doctor", "--json")
    found = {each["check"]: each for each in ran.json}
    assert (ran.code, found["AVIF"]["state"]) == (0, "note")
    assert found["AVIF"]["remedy"] == 'pip install --force-reinstall "pillow>=11.3"'


def test_a_decoder_that_fails_is_named(featstore: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    from PIL import WebPImagePlugin

    def fails(*_: object) -> None:
        raise OSError("no codec")

    monkeypatch.setattr(WebPImagePlugin.WebPImageFile, "_open", fails)
    ran = featstore("doctor", "--json")
    found = {each["check"]: each for each in ran.json}
    assert (ran.code, found["WebP"]["state"], found["PNG"]["state"]) == (1, "broken", "ok")


def wanted(name: str) -> str:
    """What featstore asks for of a library."""
    (found,) = (
        each for each in metadata.requires("featstore") or [] if each.startswith(f"{name}>=") and ";" not in each
    )
    return found
