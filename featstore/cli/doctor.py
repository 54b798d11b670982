"""doctor: what an installation consists of, whether each part of it works, and what to do about one that doesn't.

Each check stands alone: whatever is broken, the others answer.
"""

from __future__ import annotations

import base64
import importlib.util
import os
import platform
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Literal

from featstore.errors import FeatureStoreError
from featstore.machine import available_bytes, file_system, is_local, num_processors
from featstore.plugins import BACKBONES, POLICIES, SOURCES, plugged_in
from featstore.words import size_text

State = Literal["ok", "note", "broken"]

LITTLE = 1_000_000_000
"""Free bytes of a disk below which a job may not get far."""


@dataclass(frozen=True, kw_only=True)
class Finding:
    """What a check found.

    Attributes:
        check: what was looked at.
        state: `broken` is what nothing works without; `note` what some things don't.
        found: in words.
        remedy: what to do about it, if anything.
    """

    check: str
    state: State
    found: str
    remedy: str = ""


def findings() -> Iterator[Finding]:
    """What is found, check by check."""
    for name, check in _CHECKS.items():
        try:
            yield from check()
        except Exception as error:
            yield Finding(
                check=name,
                state="broken",
                found=f"can't be checked ({type(error).__name__}: {error})",
                remedy="mend what is broken above; else report this with the output of featstore doctor --json",
            )


def _python() -> Iterator[Finding]:
    found = f"{platform.python_version()}, {sys.executable}"
    is_new = sys.version_info >= (3, 11)
    remedy = "" if is_new else "make an environment with Python 3.11 or newer"
    yield Finding(check="Python", state="ok" if is_new else "broken", found=found, remedy=remedy)
    yield Finding(check="system", state="ok", found=f"{platform.system()} {platform.release()}, {platform.machine()}")


def _libraries() -> Iterator[Finding]:
    try:
        yield Finding(check="featstore", state="ok", found=f"{metadata.version('featstore')}, {_FOLDER}")
        required = metadata.requires("featstore") or []
    except metadata.PackageNotFoundError:
        yield Finding(
            check="featstore",
            state="broken",
            found=f"not installed, only found in {_FOLDER}",
            remedy="pip install featstore, or pip install -e FOLDER of its source",
        )
        return
    for each in required:
        wanted, _, extra = each.partition(";")
        in_extra = re.search(r"""extra\s*==\s*["']([\w-]+)["']""", extra)
        if in_extra is None:
            yield _library(wanted.strip(), remedy=f'pip install "{wanted.strip()}"', lacking="broken")
        elif in_extra[1] != "dev":
            yield _library(wanted.strip(), remedy=f'for it: pip install "featstore[{in_extra[1]}]"', lacking="note")


def _library(wanted: str, *, remedy: str, lacking: State) -> Finding:
    """What is found of a library, `wanted` as ``torch>=2.11``."""
    name, _, least = wanted.partition(">=")
    try:
        version = metadata.version(name)
    except metadata.PackageNotFoundError:
        return Finding(check=name, state=lacking, found="not installed", remedy=remedy)
    try:
        importlib.import_module(_MODULES.get(name, name))
    except Exception as error:
        found = f"{version} can't be imported ({type(error).__name__}: {error})"
        return Finding(check=name, state="broken", found=found, remedy=f'pip install --force-reinstall "{wanted}"')
    if _numbers(version) < _numbers(least):
        found = f"{version} is older than {least}"
        return Finding(check=name, state="broken", found=found, remedy=f'pip install --upgrade "{wanted}"')
    return Finding(check=name, state="ok", found=version)


_MODULES = {"scikit-learn": "sklearn", "pillow": "PIL", "pillow-heif": "pillow_heif"}
_FOLDER = Path(__file__).resolve().parents[1]


def _numbers(version: str) -> list[int]:
    return [int(each) for each in re.findall(r"\d+", version.partition("+")[0])][:3]


def _gpus() -> Iterator[Finding]:
    import torch

    driver = Path("/proc/driver/nvidia/version")
    known = re.search(r"\d+\.\d+(\.\d+)?", driver.read_text()) if driver.exists() else None
    of_driver = f"driver {known[0]}" if known else "no NVIDIA driver seen"
    built = f"torch is built for CUDA {torch.version.cuda}" if torch.version.cuda else "torch is built without CUDA"
    if not torch.cuda.is_available():
        remedy = "update the driver, or install the torch that is built for it (pytorch.org)" if known else ""
        found = f"none that torch can use; {of_driver}; {built}"
        yield Finding(check="GPU", state="note" if known else "ok", found=found, remedy=remedy)
    for number in range(torch.cuda.device_count()):
        name, memory = torch.cuda.get_device_name(number), torch.cuda.get_device_properties(number).total_memory
        found = f"{name}, {size_text(memory)}; {of_driver}; {built}"
        try:
            torch.ones(2, device=f"cuda:{number}").sum().item()
        except RuntimeError as error:
            reason = str(error).partition("\n")[0]
            remedy = "install a torch that is built for this GPU (pytorch.org), or give --device cpu"
            yield Finding(check=f"cuda:{number}", state="note", found=f"{found}; it fails ({reason})", remedy=remedy)
        else:
            yield Finding(check=f"cuda:{number}", state="ok", found=found)


def _plugins() -> Iterator[Finding]:
    for group in (BACKBONES, POLICIES, SOURCES):
        try:
            found = [f"{name} of {plugin.package}" for name, plugin in plugged_in(group).items()]
        except FeatureStoreError as error:
            yield Finding(
                check=group, state="broken", found=str(error), remedy="mend or uninstall the package it names"
            )
        else:
            if found:
                yield Finding(check=group, state="ok", found=", ".join(found))


def _decoders() -> Iterator[Finding]:
    from featstore.images.decode import decode
    from featstore.images.decoders import DECODERS, PIXEL_DIGESTS, POLICIES
    from featstore.images.pixel_digest import pixel_digest

    for name, text in _GRAY.items():
        if name == "HEIC" and importlib.util.find_spec("pillow_heif") is None:
            continue  # told among the libraries
        try:
            image = decode(base64.b64decode(text))
            reason = "" if bool((image.pixels == 128).all()) else "it gives other pixels than it should"
        except Exception as error:
            reason = str(error)
        if reason:
            of_its_own = {"HEIC": "pillow-heif", "JPEG": "simplejpeg", "AVIF": '"pillow>=11.3"'}
            library = of_its_own.get(name, "pillow")
            remedy = f"pip install --force-reinstall {library}"
            state: State = "note" if name in ("HEIC", "AVIF") else "broken"
            yield Finding(check=name, state=state, found=f"can't be read: {reason}", remedy=remedy)
        else:
            yield Finding(check=name, state="ok", found=f"read by {DECODERS[image.decoder]}")
    for word, policy in POLICIES.items():
        digest = pixel_digest(policy)
        has_policys = digest == PIXEL_DIGESTS[policy]
        yield Finding(
            check="pixels" if word == "full" else f"pixels:{word}",
            state="ok" if has_policys else "note",
            found=f"{'those' if has_policys else 'others than those'} of {policy}, digest {digest[:8]}",
            remedy=""
            if has_policys
            else "pip install --force-reinstall simplejpeg pillow; till then sets of others' are refused",
        )


def _weights() -> Iterator[Finding]:
    import torch

    checkpoints = Path(torch.hub.get_dir()) / "checkpoints"
    num_files = len(list(checkpoints.iterdir())) if checkpoints.is_dir() else 0
    folders = [(checkpoints, f"{checkpoints}, {num_files} files", "TORCH_HOME")]
    with suppress(ImportError):
        from huggingface_hub import constants

        folders.append((Path(constants.HF_HUB_CACHE), f"timm's in {constants.HF_HUB_CACHE}", "HF_HUB_CACHE"))
    found, remedies = [], []
    for folder, name, variable in folders:
        there = next(each for each in (folder, *folder.parents) if each.exists())
        free = shutil.disk_usage(there).free
        found.append(f"{name}, {size_text(free)} free")
        if not (there.is_dir() and os.access(there, os.W_OK | os.X_OK)):
            found[-1] += ", can't be written"
            remedies.append(f"downloaded weights can't be kept: name another folder in {variable}")
        elif free < LITTLE:
            remedies.append(f"name a folder on another disk in {variable}")
    state: State = "note" if remedies else "ok"
    yield Finding(check="weights", state=state, found="; ".join(found), remedy="; ".join(remedies))


def _disk() -> Iterator[Finding]:
    here = Path.cwd()
    kind = file_system(here)
    place = f"{kind}, {'local' if is_local(here) else 'shared with other machines, maybe'}" if kind else "unknown"
    found = f"{here}, {size_text(shutil.disk_usage(here).free)} free, {place}"
    if os.access(here, os.W_OK | os.X_OK):
        has_little = shutil.disk_usage(here).free < LITTLE
        remedy = "give --store a folder on another disk" if has_little else ""
        yield Finding(check="disk", state="note" if has_little else "ok", found=found, remedy=remedy)
    else:
        remedy = "give --store a folder that can be written"
        yield Finding(check="disk", state="note", found=f"{found}, can't be written", remedy=remedy)


def _processors() -> Iterator[Finding]:
    import torch

    usable, threads = num_processors(), torch.get_num_threads()
    found = f"{usable}, torch uses {threads}; {size_text(available_bytes())} of memory free"
    limit = next((name for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS") if os.environ.get(name)), None)
    remedy = ""
    if threads < usable and limit:  # by itself torch takes one of each core, which is as it should be
        remedy = f"torch uses {threads} of {usable}, as {limit} says; unset it"
    yield Finding(check="processors", state="note" if remedy else "ok", found=found, remedy=remedy)


_CHECKS: dict[str, Callable[[], Iterator[Finding]]] = {
    "Python": _python,
    "libraries": _libraries,
    "GPU": _gpus,
    "plug-ins": _plugins,
    "decoders": _decoders,
    "weights": _weights,
    "disk": _disk,
    "processors": _processors,
}

_GRAY = {
    "JPEG": (
        "/9j/4AAQSkZJRgABAQAAAQABAAD/2wBDAAMCAgMCAgMDAwMEAwMEBQgFBQQEBQoHBwYIDAoMDAsKCwsNDhIQDQ4RDgsLEBYQERMUFRUVDA8X"
        "GBYUGBIUFRT/2wBDAQMEBAUEBQkFBQkUDQsNFBQUFBQUFBQUFBQUFBQUFBQUFBQUFBQUFBQUFBQUFBQUFBQUFBQUFBQUFBQUFBQUFBT/wAAR"
        "CAAIAAgDASIAAhEBAxEB/8QAFAABAAAAAAAAAAAAAAAAAAAAAP/EABQQAQAAAAAAAAAAAAAAAAAAAAD/xAAUAQEAAAAAAAAAAAAAAAAAAAAA"
        "/8QAFBEBAAAAAAAAAAAAAAAAAAAAAP/aAAwDAQACEQMRAD8AAA//2Q=="
    ),
    "PNG": ("iVBORw0KGgoAAAANSUhEUgAAAAgAAAAICAIAAABLbSncAAAAFUlEQVR42mNsaGhgwAaYGHCAwSkBADAXAZDUexXGAAAAAElFTkSuQmCC"),
    "WebP": ("UklGRh4AAABXRUJQVlA4TBEAAAAvB8ABAAdQwAIWsP+BiOh/AAA="),
    "AVIF": (
        "AAAAIGZ0eXBhdmlmAAAAAGF2aWZtaWYxbWlhZk1BMUIAAADrbWV0YQAAAAAAAAAhaGRscgAAAAAAAAAAcGljdAAAAAAAAAAAAAAAAAAAAAAO"
        "cGl0bQAAAAAAAQAAAB5pbG9jAAAAAEQAAAEAAQAAAAEAAAETAAAAEwAAAChpaW5mAAAAAAABAAAAGmluZmUCAAAAAAEAAGF2MDFDb2xvcgAA"
        "AABqaXBycAAAAEtpcGNvAAAAFGlzcGUAAAAAAAAACAAAAAgAAAAQcGl4aQAAAAADCAgIAAAADGF2MUOBAAwAAAAAE2NvbHJuY2x4AAEADQAG"
        "gAAAABdpcG1hAAAAAAAAAAEAAQQBAoMEAAAAG21kYXQSAAoIGAi/YICGg0IyBRAAAASA"
    ),
    "HEIC": (
        "AAAAHGZ0eXBoZWljAAAAAG1pZjFoZWljbWlhZgAAAXxtZXRhAAAAAAAAACFoZGxyAAAAAAAAAABwaWN0AAAAAAAAAAAAAAAAAAAAACJpbG9j"
        "AAAAAERAAAEAAQAAAAABoAABAAAAAAAAACoAAAAjaWluZgAAAAAAAQAAABVpbmZlAgAAAAABAABodmMxAAAAAA5waXRtAAAAAAABAAAA/Glw"
        "cnAAAADcaXBjbwAAAHVodmNDAQNwAAAAkAAAAAAA//AA/P34+AAADwNgAAEAGEABDAH//wNwAAADAJAAAAMAAAMA/7oCQGEAAQApQgEBA3AA"
        "AAMAkAAAAwAAAwD/oCCBBZbqrprm4CGgwIAAAAyAAAADAIRiAAEABkQBwXGLEgAAABNjb2xybmNseAABAA0ABoAAAAAUaXNwZQAAAAAAAABA"
        "AAAAQAAAAChjbGFwAAAACAAAAAEAAAAIAAAAAf///8gAAAAC////yAAAAAIAAAAQcGl4aQAAAAADCAgIAAAAGGlwbWEAAAAAAAAAAQABBYEC"
        "AwWEAAAAMm1kYXQAAAAmKAGvBbISHaByWr9tvZxIVPRRIzVvEHqL6FqPMSd1vgQeK0KH6ys="
    ),
}
"""Files of 8 x 8 gray pixels, each channel 128, as base64."""
