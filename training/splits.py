"""Splits across runs: what a saved run trained on and held out, by image content, so that no later run mixes it up."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from io import BytesIO
from pathlib import Path
from typing import Any
from zipfile import BadZipFile, ZipFile

import numpy as np
from numpy.typing import NDArray

from featstore.digest import canonical_json
from featstore.errors import DamagedFileError, FeatureStoreError
from featstore.extraction.defaults import DEFAULT_SPLIT_SEED, DEFAULT_VALID
from featstore.images.digests import Digests, KnownDigest
from featstore.images.image_set import ImageSet
from featstore.images.labels import checked_groups
from featstore.images.names import SPLITS
from featstore.models.runs import read_file
from training.sidecar import Dealt

FILE = "split.npz"


@dataclass(frozen=True, kw_only=True, eq=False)
class PastSplit:
    """What was trained on and held out: by a saved run and all that it came from, or by the fits of one learner.

    Attributes:
        run: the run's folder; None for the fits of a learner.
        digests: split -> ``(n, 32)`` uint8, the contents of its images.
        valid: share held out by the rule that dealt them.
        seed: of that rule.
        test: share that it kept as test.
    """

    run: Path | None
    digests: Mapping[str, NDArray[np.uint8]]
    valid: float
    seed: int
    test: float = 0.0

    @classmethod
    def read(cls, run: Path, *, identity: str | None = None) -> PastSplit | None:
        """The split of the run in `run`, of that `identity` if one is given; None if it recorded none."""
        content = read_file(run, FILE, identity=identity)
        if content is None:
            return None
        try:
            _check_size(content)
            with np.load(BytesIO(content), allow_pickle=False) as saved:
                digests = {name: _checked(saved[name]) for name in SPLITS}
                test = float(saved["rule_test"]) if "rule_test" in saved else 0.0  # older runs have none
                valid, seed = float(saved["rule_valid"]), int(saved["rule_seed"])
                return cls(run=run, digests=digests, valid=valid, seed=seed, test=test)
        except (OSError, ValueError, KeyError, EOFError, BadZipFile) as error:
            raise DamagedFileError(
                f"{run / FILE} is damaged ({error}). Restore it, or train the model again."
            ) from error

    @classmethod
    def of(cls, images: ImageSet, digests: Digests, *, valid: float, seed: int, test: float = 0.0) -> PastSplit:
        """The split of `images`; an undealt set counts as training."""
        splits = images.splits if (images.splits != "").any() else np.full(len(images), "train")
        of_split = {name: digests.values[(splits == name) & ~digests.is_failed] for name in SPLITS}
        return cls(run=None, digests=of_split, valid=valid, seed=seed, test=test)

    def over(self, older: PastSplit | None) -> PastSplit:
        """This split, and what `older` knows of images that this one doesn't have: nothing is forgotten.

        What was trained on stays so where this split holds it out: its scores say little, whoever deals it anew.
        """
        if older is None:
            return self
        known = {bytes(row) for rows in self.digests.values() for row in rows}
        trained = {bytes(row) for row in self.digests["train"]}
        merged = {}
        for name, rows in self.digests.items():
            has, theirs = trained if name == "train" else known, older.digests[name]
            merged[name] = np.concatenate([rows, theirs[[bytes(row) not in has for row in theirs]]])
        return replace(self, digests=merged)

    def write(self, run: Path) -> None:
        """Records it in the run folder `run`."""
        train, valid, test = (self.digests[name] for name in SPLITS)
        rule: dict[str, Any] = {"rule_valid": np.float64(self.valid), "rule_test": np.float64(self.test)}
        np.savez(run / FILE, train=train, valid=valid, test=test, rule_seed=np.int64(self.seed), **rule)

    def applied(self, images: ImageSet, known: Mapping[str, KnownDigest]) -> ImageSet:
        """`images` with this split, by content; images that the run hadn't seen are dealt by its rule.

        An image of a group that the run had seen goes where its group went. A set that has a split of its own keeps it.
        """
        if (images.splits != "").any() or not len(images):
            return images
        recorded = self.recorded(images.digests(known))
        of_group: dict[str, str] = {}
        for group, name in zip(images.groups or (), recorded, strict=False):
            of_group[group] = max(of_group.get(group, ""), name, key=("", *SPLITS).index)
        by_rule = images.split(valid=self.valid, test=self.test, seed=self.seed).splits
        splits = [
            name or of_group.get(group, "") or rule
            for name, group, rule in zip(recorded, images.groups or [""] * len(images), by_rule.tolist(), strict=True)
        ]
        return images.with_splits(splits)

    def check(self, training: ImageSet, digests: Digests) -> None:
        """Checks that none of the images to train on was held out. A copy of an image that was trained on wasn't.

        Raises:
            FeatureStoreError: with their number.
        """
        held_out = {bytes(row) for name in ("valid", "test") for row in self.digests[name]}
        held_out -= {bytes(row) for row in self.digests["train"]}
        leaked = [name for name, row in zip(training.ids, digests.values, strict=True) if bytes(row) in held_out]
        if leaked:
            remedy = (
                "Leave out --valid, --test, --split-seed and own splits, then the run's split is used; or pass "
                "--allow-leak (in Python: allow_leak=True)."
            )
            if self.run is None:
                remedy = "Keep the split, make a new Learner, or set allow_leak = True."
            raise FeatureStoreError(
                f"{len(leaked):,} of the {len(training):,} images to train on were held out by {self._words} (first: "
                f"{leaked[0]}); its scores, and those of what follows, would be of images it has learned. {remedy}"
            )

    def unseen_note(self, images: ImageSet, digests: Digests, split: str) -> str | None:
        """How many images that are new to the run aren't in the split to score, in words; None if none is."""
        seen = {bytes(row) for name in SPLITS for row in self.digests[name]}
        elsewhere = (images.splits != split) & (images.splits != "")
        count = sum(bytes(row) not in seen for row in digests.values[elsewhere & ~digests.is_failed])
        if not count:
            return None
        return (
            f"{count:,} of the {len(images):,} images are new to {self._words} and were dealt to other splits than "
            f"{split}, so they aren't scored; to score all: --valid 0 --split train"
        )

    def trained_note(self, images: ImageSet, digests: Digests) -> str | None:
        """How many of the images to score were trained on, in words; None if none was."""
        return self._counted(int(self.were_trained_on(digests).sum()), images)

    def leaked_note(self, images: ImageSet, digests: Digests, *, allow_leak: bool) -> str | None:
        """The same without those of which it held out a copy as well: such copies are told by `overlap_note`.

        Raises:
            FeatureStoreError: if there are some, unless that is allowed.
        """
        note = self._counted(self.recorded(digests).count("train"), images)
        if note is not None and not allow_leak:
            raise FeatureStoreError(
                f"Nothing is scored: {note}. Give images that it hasn't seen, or the split of that run (undealt images "
                "get it); or pass --allow-leak (in Python: allow_leak=True)."
            )
        return note

    def _counted(self, count: int, images: ImageSet) -> str | None:
        if not count:
            return None
        return (
            f"{count:,} of the {len(images):,} images were trained on by {self._words}: their scores say little about "
            "new images"
        )

    def were_trained_on(self, digests: Digests) -> NDArray[np.bool_]:
        """``(N,)`` whether each content was trained on."""
        trained = {bytes(row) for row in self.digests["train"]}
        return np.array([bytes(row) in trained for row in digests.values], dtype=np.bool_)

    def recorded(self, digests: Digests) -> list[str]:
        """The split of each content; of one that lies in two the later counts: what was held out stays so.

        ``""`` for what is new.
        """
        split_of = {bytes(row): name for name in SPLITS for row in self.digests[name]}
        return [split_of.get(bytes(content), "") for content in digests.values]

    @property
    def _words(self) -> str:
        return "an earlier fit" if self.run is None else str(self.run)


def present_split(images: ImageSet, digests: Digests, past: PastSplit | None) -> PastSplit:
    """What `images` as they are dealt now train and hold out; a rule that they don't bring is that of `past`.

    Where nothing was dealt all images train, and so will new ones.
    """
    rule = images.origin.get("split") or {}
    valid = DEFAULT_VALID if (images.splits != "").any() else 0.0
    return PastSplit.of(
        images,
        digests,
        valid=rule.get("valid", past.valid if past else valid),
        seed=rule.get("seed", past.seed if past else DEFAULT_SPLIT_SEED),
        test=rule.get("test", past.test if past else 0.0),
    )


def dealt(images: ImageSet, digests: Digests) -> Dealt:
    """Labelled `images` as one number and one digest: over contents and labels, whatever their order and names.

    A label counts by its class's name: another class table that gives each image the same names changes nothing.
    """
    has_content = ~digests.is_failed
    assert images.targets is not None
    targets = images.targets[has_content]
    if images.task == "single":
        used = np.unique(targets)
        names = [images.classes[place] for place in used.tolist()]
        order = np.argsort(np.array(names, dtype=object))
        place_of = np.zeros(len(images.classes), dtype=np.float64)
        place_of[used[order]] = np.arange(len(used))
        labels = place_of[targets].astype(">f8").view(np.uint8).reshape(-1, 8)
    else:
        columns = np.argsort(np.array(images.classes, dtype=object))
        names, numbers = list(images.classes), targets[:, columns].astype(">f8")  # (n, K)
        hashed = [hashlib.sha256(row.tobytes()).digest() for row in numbers]
        labels = np.frombuffer(b"".join(hashed), dtype=np.uint8).reshape(-1, 32)
    rows = np.concatenate([digests.values[has_content], labels], axis=1)
    words = rows.reshape(len(rows), -1, 8).view(">u8")[..., 0]  # of contents, then of labels
    in_order = rows[np.lexsort(words.T[::-1])]
    own = hashlib.sha256(canonical_json([images.task, sorted(names)]).encode("ascii"))
    own.update(np.ascontiguousarray(in_order).data)
    return Dealt(images=len(rows), digest=own.hexdigest())


def _check_size(content: bytes) -> None:
    """`np.savez` doesn't compress: what claims to be larger than its file would fill the memory."""
    with ZipFile(BytesIO(content)) as archive:
        claimed = sum(each.file_size for each in archive.infolist())
    if claimed > len(content):
        raise ValueError(f"its {len(content):,} bytes would unpack to {claimed:,}")


def _checked(digests: NDArray[np.uint8]) -> NDArray[np.uint8]:
    if digests.dtype != np.uint8 or digests.ndim != 2 or digests.shape[1] != 32:
        raise ValueError(f"digests are {digests.dtype} of shape {digests.shape}")
    return digests


def grouped_by_content(images: ImageSet, digests: Digests, groups: Sequence[Any] | None) -> tuple[str, ...] | None:
    """The groups to deal folds by: `groups`, or the images' own, of which those that share a content are one.

    What is scored would else be trained on under another name. None where there are neither groups nor repeats.
    """
    own = images.groups if groups is None else checked_groups(groups, len(images))
    repeated = [[place for place in each if images.splits[place] != "test"] for each in digests.duplicates()]
    repeated = [each for each in repeated if len(each) > 1]
    if not repeated:
        return own
    of_image = own or images.ids
    joined: dict[str, str] = {}  # group -> another one that it is part of

    def whole(group: str) -> str:
        while group in joined:
            group = joined[group]
        return group

    for first, *others in repeated:
        for other in others:
            one, two = whole(of_image[first]), whole(of_image[other])
            if one != two:
                joined[two] = one
    return tuple(map(whole, of_image))
