"""Placement: where a head sits on a backbone, as it was asked for and as a store settles it, and the model of both."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from torch import nn

from featstore.errors import AmbiguousRequestError
from featstore.images.names import Task
from featstore.images.views import View
from featstore.models.names import REDUCTIONS
from featstore.models.staged import StagedModel
from featstore.models.stages import PoolStage
from featstore.store.store import FeatureStore
from featstore.words import some
from training.heads import build_head, extended_head
from training.standardised import ValueHead


@dataclass(frozen=True, kw_only=True, eq=False)
class Placement:
    """What a caller says of where a head sits, and the store that settles what is left open.

    Attributes:
        cut: where; None: the default cut, or the only one that there are features of.
        reduce: the pool there; `auto` likewise.
        key: start of the key of the set to use, or None.
        store: or None.
    """

    cut: str | None
    reduce: str
    key: str | None
    store: FeatureStore | None

    @classmethod
    def of(
        cls, backbone: StagedModel, store: FeatureStore | None, *, cut: str | None, reduce: str, key: str | None
    ) -> Placement:
        """As it was asked for; where nothing was, a model that came from a store by a key sits on that set.

        Raises:
            ValueError: for a cut with its reduction, as an extraction takes and prints it.
        """
        name, _, reduction = cut.partition(":") if isinstance(cut, str) else ("", "", "")
        if reduction in REDUCTIONS:
            raise ValueError(
                f"The cut is {cut!r}, with a reduction as extract takes it; expected the two apart, as a head takes "
                f'them: --cut {name} --reduce {reduction} (in Python: cut="{name}", reduce="{reduction}").'
            )
        if key is None and cut is None and reduce == "auto":
            key = _made_from(backbone, store)
        return cls(cut=cut, reduce=reduce, key=key, store=store)

    @property
    def view(self) -> View | None:
        """The view of the set that the key names; None without a key.

        Raises:
            ValueError: for a key without a store.
        """
        if self.key is None:
            return None
        if self.store is None:
            raise ValueError(f"features is {self.key!r} and there is no store. Pass the store that holds the set.")
        return self.store.set(self.key).spec.rendered

    def settled(self, backbone: StagedModel, digests: Mapping[str, str]) -> tuple[str, str]:
        """Cut and reduction; where the caller left them open the default ones, or the only ones that are stored.

        Args:
            backbone: that the head will sit on.
            digests: its cuts' digests.

        Raises:
            AmbiguousRequestError: where several are stored and the default ones aren't among them.
        """
        stored = self._stored(backbone, digests)
        if self.key is not None and stored:
            ((name, reduction),) = stored
            is_maps = reduction == "none" and backbone.layout(name) != "NC"
            return name, self.reduce if is_maps else reduction
        name = backbone.canonical(self.cut or backbone.default_cut)
        default = name, backbone.pool(name, self.reduce).reduction
        pooled = [each for each in stored if each[1] != "none" or backbone.layout(each[0]) == "NC"]
        # A store's own model was asked for by a key, and there is no telling which of several it was.
        if not pooled or (default in pooled and not (backbone.is_absent and len(pooled) > 1)):
            return default
        if len(pooled) > 1:
            assert self.store is not None
            listed = ", ".join(f"{name} {reduction}" for name, reduction in pooled)
            raise AmbiguousRequestError(
                f"{self.store.root} holds several kinds of features of {backbone.name}: {listed}. Choose one with "
                "cut= and reduce=, or by its key with features= (--cut, --reduce, --features)."
            )
        return pooled[0]

    def _stored(self, backbone: StagedModel, digests: Mapping[str, str]) -> list[tuple[str, str]]:
        """Cuts and reductions of the stored sets, or of the one that was chosen, that are this backbone's."""
        if self.store is None or not self.store.folder.is_dir():
            return []
        sets = self.store.sets() if self.key is None else [self.store.set(self.key)]
        wanted = None if self.cut is None else backbone.canonical(self.cut)
        found = {}
        for each in sets:
            names = [name for name in backbone.cut_points if digests[name] == each.spec.trunk]
            label = str(each.facts["cut"])
            if names and wanted in (None, *names) and self.reduce in ("auto", each.spec.reduction):
                found[wanted or (label if label in names else names[0]), each.spec.reduction] = each
        return sorted(found)


def with_head(
    backbone: StagedModel,
    head: str | nn.Module,
    placement: Placement,
    *,
    digests: Mapping[str, str],
    view: View,
    classes: Sequence[str],
    task: Task,
    seed: int,
) -> tuple[StagedModel, str]:
    """The model of `backbone` with its head, frozen up to the head, and the cut where that sits.

    Args:
        backbone: shared, never changed.
        head: as in `heads.build_head`; or ``keep``: the backbone's own, whose logits `class_tables.kept_table` names.
        placement: where it sits.
        digests: the cuts' digests of the backbone.
        view: of the images, whose size decides how wide the activations are.
        classes: one logit each.
        task: of a head by name for regression, its numbers are in the targets' units.
        seed: of a new head's weights.

    Raises:
        AmbiguousRequestError: as `Placement.settled`.
        ValueError: for a head that doesn't fit the activations or the classes.
    """
    if head == "keep":
        model = backbone.with_()
        cut = model.canonical(placement.cut or model.default_cut)
        model.freeze_to(cut)
        return model, cut
    if isinstance(head, str) and head.partition(":")[0] == "attention" and placement.reduce == "auto":
        placement = replace(placement, reduce="none")  # it is a pool of its own
    cut, reduce = placement.settled(backbone, digests)
    pool = backbone.pool(cut, reduce)
    shape, is_last = pool.shape(backbone.shape(cut, view.size)), pool.layout == "NHWC"
    module = build_head(head, shape, max(len(classes), 1), seed, channels_last=is_last)
    if task == "regression" and isinstance(head, str):
        module = ValueHead(module, max(len(classes), 1))
    return backbone.with_head(module, cut=cut, reduction=pool.reduction), cut


def with_classes(
    model: StagedModel, old: Sequence[str], new: Sequence[str], *, cut: str, size: int, seed: int
) -> StagedModel:
    """`model` with a head for the class table `new`: what it says of the classes `old` stays, whatever their places.

    Args:
        model: with a head that `with_head` added.
        old: its classes.
        new: all of them, and more.
        cut: where the head sits.
        size: of the images, in pixels.
        seed: of the new rows.

    Raises:
        ValueError: for a model that keeps its own head, a head that can't be extended, and where `new` isn't more.
    """
    missing = [name for name in old if name not in new]
    if missing or len({*new}) != len(new) or len(new) == len(old):
        raise ValueError(
            f"The new class table is {some(new)}; expected all of {some(old)}, and others, each once. Give the classes "
            "of the images to go on with: learn.extend_classes(images.classes)."
        )
    if model.head is None:
        raise ValueError(
            f"{model.name} keeps its own head, which has a logit for each class that it was made with. Make a new "
            "Learner with a head for all classes."
        )
    reduction = reduction_of(model)
    assert reduction is not None
    shape = model.pool(cut, reduction).shape(model.shape(cut, size))
    places = [list(new).index(name) for name in old]
    frozen = [stage.name for stage in model.ordered[: model.num_frozen] if not isinstance(stage, PoolStage)]
    head = extended_head(model.head, places, len(new), shape, seed)
    made = model.up_to(cut).with_head(head, cut=cut, reduction=reduction)
    if frozen:
        made.freeze_to(frozen[-1])
    else:
        made.unfreeze()
    return made


def reduction_of(model: StagedModel) -> str | None:
    """The reduction of the pool before the head; None for a model without one."""
    pools = [stage.pool.reduction for stage in model.ordered if isinstance(stage, PoolStage)]
    return pools[-1] if pools else None


def _made_from(model: StagedModel, store: FeatureStore | None) -> str | None:
    """The key that `FeatureStore.model` was given for a model without weights, if the store holds that set."""
    key = model.origin.get("features")
    if key is None or store is None or key not in {found.key for found in store.sets()}:
        return None
    return str(key)
