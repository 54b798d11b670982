"""What becomes of batch norm's statistics: frozen, trained, or taken anew before an extraction."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.tiny import NormedHead, arrays, net, staged, views_by_hand
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn

from featstore import FeatureStore, StagedModel, View, extract
from training import SWA, Learner, reestimate_batch_norm


def learner(store: FeatureStore | None = None) -> Learner:
    head = NormedHead(2, dropout=0.0)
    learn = Learner(staged(), arrays(12), store, cut="layer2", head=head, device="cpu", workers=0, quiet=True)
    learn.freeze_to("layer1")
    return learn


def moved(learn: Learner, before: dict[str, Tensor]) -> set[str]:
    return {name for name, value in learn.model.tensors().items() if not torch.equal(value, before[name])}


@pytest.mark.parametrize("from_features", [True, False])
@pytest.mark.parametrize("batch_norm", ["train", "frozen"])
def test_frozen_statistics_of_thawed_stages_stay_while_their_weights_and_the_heads_statistics_move(
    tmp_path: Path, batch_norm: Any, from_features: bool
) -> None:
    store = FeatureStore(tmp_path) if from_features else None
    if store is not None:
        extract(staged(), arrays(12), store, cuts=["layer1:none"], dtype="float32", device="cpu", workers=0)
    learn = learner(store)
    before = {name: value.clone() for name, value in learn.model.tensors().items()}
    flags = [module.training for module in learn.model.modules()]
    learn.fit(1, lr=1e-2, batch_norm=batch_norm)
    assert learn.read_from == ("features" if from_features else "images")
    found = moved(learn, before)
    assert ("layer2.1.running_mean" in found) == (batch_norm == "train")
    assert {"layer2.1.weight", "layer2.0.weight", "head.norm.running_mean"} <= found
    assert not any(name.startswith("layer1") for name in found)
    assert [module.training for module in learn.model.modules()] == flags


def test_a_step_with_frozen_statistics_is_one_of_the_network_in_eval_mode() -> None:
    losses = learner().fit(1, lr=1e-2, batch_norm="frozen").losses
    module, head = net(), NormedHead(2, dropout=0.0)
    order = np.random.default_rng([0, 0, 0]).permutation(12)
    rows = staged().view.normalise(views_by_hand(arrays(12), staged().view))[torch.from_numpy(order)]
    maps = module.layer2(module.layer1(rows))
    pooled = torch.cat([maps.amax((2, 3)), maps.mean((2, 3))], 1)
    expected = nn.functional.cross_entropy(head.train()(pooled), torch.from_numpy(order) % 2)
    assert losses == pytest.approx([expected.item()], rel=1e-5)  # the frozen stage runs in passes of another size


def test_the_finder_heeds_frozen_statistics_and_a_mean_of_weights_that_retakes_them_is_refused() -> None:
    learn = learner()
    assert learn.lr_find().losses != learn.lr_find(batch_norm="frozen").losses
    with pytest.raises(ValueError, match="SWA takes the statistics of batch norm anew"):
        learn.fit(2, lr=1e-3, batch_norm="frozen", average=SWA())
    with pytest.raises(ValueError, match="batch_norm is 'eval'; expected train or frozen"):
        learn.fit(2, lr=1e-3, batch_norm="eval")  # type: ignore[arg-type]


def test_statistics_taken_anew_are_those_of_torchs_update_bn_and_make_other_keys(tmp_path: Path) -> None:
    model, images = staged(), arrays(13)
    digest, state = model.digest("layer2"), torch.get_rng_state()
    made = reestimate_batch_norm(model, images, batch_size=4, device="cpu", workers=0)
    assert torch.equal(torch.get_rng_state(), state)
    reference = net()
    order = torch.from_numpy(np.random.default_rng(0).permutation(13))
    rows = model.view.normalise(views_by_hand(images, model.view))[order]
    update_bn(list(rows[:12].split(4)), reference)  # type: ignore[no-untyped-call]
    for name, tensor in reference.state_dict().items():
        assert torch.equal(made.tensors()[name], tensor), name
    assert model.digest("layer2") == digest != made.digest("layer2")
    assert not made.origin
    assert all(norm.momentum == 0.1 for norm in made.modules() if isinstance(norm, nn.BatchNorm2d))
    store = FeatureStore(tmp_path)
    for each in (model, made):
        extract(each, images, store, cuts=["layer2"], dtype="float32", device="cpu", workers=0)
    assert len(store.sets()) == 2


def test_a_model_without_batch_norm_is_refused() -> None:
    plain = StagedModel.from_stages(
        {"conv": nn.Conv2d(3, 4, 3), "flatten": nn.Flatten()}, view=View(size=16, resize=20)
    )
    with pytest.raises(ValueError, match="has 0 batch norms with statistics"):
        reestimate_batch_norm(plain, arrays(4), device="cpu")
    with pytest.raises(ValueError, match="batch_size is 1, and a single image has no statistics"):
        reestimate_batch_norm(staged(), arrays(4), batch_size=1, device="cpu")
