from __future__ import annotations

import argparse
import os
import pickle
import re
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from support.tiny import net
from torch import Tensor, nn

from featstore import WeightsError, backbone
from featstore.models.weights import Fit, fitting, read_tensors

TENSORS = {"stem.weight": torch.arange(6.0).reshape(2, 3), "fc.weight": torch.ones(4, 2)}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


# ------------------------------------------------------------------------------------------------------------- reading


@pytest.mark.parametrize(
    "wrap",
    [
        lambda tensors: tensors,
        lambda tensors: OrderedDict(tensors),
        lambda tensors: {"state_dict": tensors, "epoch": 7, "optimizer": {"state": {}}},
        lambda tensors: {"model": tensors},
        lambda tensors: {"model_state_dict": tensors, "loss": torch.ones(1)},
        lambda tensors: {"state_dict_ema": tensors, "arch": "resnet18"},
        lambda tensors: {"model": {"state_dict": tensors}},
        lambda tensors: {**tensors, "epoch": 3},
    ],
)
@pytest.mark.parametrize("suffix", [".pth", ".pt", ".th", ".bin", ".ckpt"])
def test_tensors_come_out_of_the_wrappers_that_people_save(
    wrap: Callable[[dict[str, Tensor]], Any], suffix: str, tmp_path: Path
) -> None:
    path = tmp_path / f"weights{suffix}"
    torch.save(wrap(TENSORS), path)
    tensors, notes = read_tensors(path)
    assert same(tensors, TENSORS)
    assert notes == ()


EMA = {name: tensor + 1 for name, tensor in TENSORS.items()}


@pytest.mark.parametrize(
    ("content", "note"),
    [
        ({"state_dict_ema": EMA, "state_dict": TENSORS, "epoch": 3}, "state_dict and state_dict_ema: state_dict used"),
        (
            {"model": TENSORS, "model_ema": {f"module.{name}": tensor for name, tensor in EMA.items()}},
            "model and model_ema: model used",
        ),
        ({"model": {"state_dict": TENSORS}, "ema": {"state_dict": EMA}}, "model and ema: model used"),
        ({"model": TENSORS, "teacher": EMA, "ema": EMA}, "model and teacher and ema: model used"),
    ],
)
def test_of_several_models_in_a_file_the_one_taken_is_named(content: Any, note: str, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "ep37.pth")
    tensors, notes = read_tensors(tmp_path / "ep37.pth")
    assert same(tensors, TENSORS)
    assert notes == (f"ep37.pth holds {note}; to use another, save it alone",)


def test_what_else_a_training_program_saves_is_no_other_model(tmp_path: Path) -> None:
    module = torch.nn.Linear(2, 2)
    optimizer = torch.optim.Adam(module.parameters())
    module(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    content = {
        "state_dict": module.state_dict(),
        "optimizer": optimizer.state_dict(),
        "hyper_parameters": {"class_weights": torch.ones(2), "lr": 0.1},
    }
    torch.save(content, tmp_path / "ep37.pth")
    assert read_tensors(tmp_path / "ep37.pth")[1] == ()


def test_the_user_of_a_backbone_is_told_which_model_of_a_file_was_taken(tmp_path: Path) -> None:
    used, average = net(0), net(1)
    torch.save({"state_dict": used.state_dict(), "state_dict_ema": average.state_dict()}, tmp_path / "both.pth")
    model = backbone(net(2), tmp_path / "both.pth")
    assert same(model.tensors(), {name: used.state_dict()[name] for name in model.tensors()})
    assert model.notes[0] == (
        "both.pth holds state_dict and state_dict_ema: state_dict used; to use another, save it alone"
    )


def test_safetensors_are_read(tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    safetensors.torch.save_file(TENSORS, path)
    assert same(read_tensors(path)[0], TENSORS)


def test_pickled_objects_are_refused_with_three_lines_that_save_the_tensors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "run 7.pth"
    torch.save({"model": TENSORS, "args": argparse.Namespace(lr=0.1)}, path)
    with pytest.raises(WeightsError, match=r"holds pickled objects besides tensors \(argparse.Namespace\)") as error:
        read_tensors(path)
    lines = [line.strip() for line in str(error.value).splitlines()[1:]]
    assert len(lines) == 3
    monkeypatch.chdir(tmp_path)
    exec("\n".join(lines), {})
    assert same(read_tensors(tmp_path / "tensors-run 7.pth")[0], TENSORS)


@pytest.mark.parametrize("wrapped", [False, True])
def test_those_lines_also_save_the_tensors_of_a_whole_module(
    wrapped: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    torch.save({"model": module} if wrapped else module, tmp_path / "whole.pth")
    with pytest.raises(WeightsError, match="holds pickled objects besides tensors") as error:
        read_tensors(tmp_path / "whole.pth")
    monkeypatch.chdir(tmp_path)
    exec("\n".join(line.strip() for line in str(error.value).splitlines()[1:]), {})
    assert same(read_tensors(tmp_path / "tensors-whole.pth")[0], module.state_dict())


class Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("pwned",)


def test_code_in_a_file_is_never_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": TENSORS, "evil": Evil()}, tmp_path / "evil.pth")
    with pytest.raises(WeightsError, match="holds pickled objects"):
        read_tensors(tmp_path / "evil.pth")
    assert not (tmp_path / "pwned").exists()


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("data", [b"", b"hello world", b"\x80\x02junk", b"PK\x03\x04 no archive", b"\xff" * 100])
def test_a_file_that_holds_something_else_is_refused_by_name(data: bytes, suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"junk{suffix}"
    path.write_bytes(data)
    with pytest.raises(WeightsError, match=rf"junk{suffix} can't be read as a weights file"):
        read_tensors(path)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_a_truncated_file_is_refused(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"weights{suffix}"
    torch.save(TENSORS, path) if suffix == ".pth" else safetensors.torch.save_file(TENSORS, path)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(WeightsError, match="can't be read as a weights file"):
        read_tensors(path)


@pytest.mark.parametrize("content", [{}, {"epoch": 1}, [torch.ones(1)], torch.ones(2), {"state_dict": {}}])
def test_a_file_without_tensors_by_name_is_refused(content: Any, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "weights.pth")
    with pytest.raises(WeightsError, match=r"holds no tensors by name .* Expected a state dict"):
        read_tensors(tmp_path / "weights.pth")


# ------------------------------------------------------------------------------------------------------------- fitting

STAGES: list[dict[str, Tensor]] = [
    {"stem.weight": torch.zeros(2, 3)},
    {},
    {"layer1.0.weight": torch.zeros(3), "layer1.0.num_batches_tracked": torch.tensor(5)},
    {"fc.weight": torch.zeros(4, 2), "fc.bias": torch.zeros(4)},
]


def full() -> dict[str, Tensor]:
    return {name: tensor + 1 for stage in STAGES for name, tensor in stage.items()}


def fit(tensors: dict[str, Tensor], num_needed: int = 3, unused: tuple[str, ...] = ()) -> Fit:
    return fitting(tensors, STAGES, num_needed=num_needed, file=Path("ep37.pth"), model="net", unused=unused)


def test_a_file_that_fits_wholly_gives_all_stages_and_nothing_to_note() -> None:
    found = fit(full())
    assert found.num_stages == 4
    assert same(found.tensors, full())
    assert found.notes == ()


@pytest.mark.parametrize(
    "prefix", ["module.", "_orig_mod.", "model.", "net.", "backbone.", "module.model.", "_orig_mod.module.backbone."]
)
def test_prefixes_are_taken_off(prefix: str) -> None:
    assert same(fit({prefix + name: tensor for name, tensor in full().items()}).tensors, full())


def test_a_prefixed_body_with_a_plain_head_is_understood() -> None:
    given = {name if name.startswith("fc") else f"backbone.{name}": tensor for name, tensor in full().items()}
    found = fit(given)
    assert found.num_stages == 4
    assert same(found.tensors, full())


def test_a_models_own_names_win_over_prefixes() -> None:
    stages = [{"model.weight": torch.zeros(2)}]
    given = {"model.weight": torch.ones(2)}
    assert same(fitting(given, stages, num_needed=1, file=Path("x"), model="net").tensors, given)


def test_names_that_fit_under_two_prefixes_are_refused() -> None:
    given = {prefix + name: tensor for prefix in ("model.", "net.") for name, tensor in full().items()}
    with pytest.raises(WeightsError, match=r"fit, under 'model.', 'net.', .* --weights-prefix model\."):
        fit(given)


def test_another_head_is_left_out_with_a_note() -> None:
    found = fit({**full(), "fc.weight": torch.zeros(37, 2), "fc.bias": torch.zeros(37)})
    assert found.num_stages == 3
    assert found.tensors.keys() == full().keys() - {"fc.weight", "fc.bias"}
    assert found.notes == ("fc.weight has 37 rows: not used", "fc.bias has 37 rows: not used")


def test_a_missing_head_is_left_out_and_other_modules_are_noted() -> None:
    given = {name: tensor for name, tensor in full().items() if not name.startswith("fc")}
    given |= {f"decoder.{number}": torch.ones(1) for number in range(9)}
    found = fit(given)
    assert found.num_stages == 3
    assert found.notes == (
        *(f"decoder.{number}: not used" for number in range(4)),
        "5 more tensors that net doesn't have: not used",
    )


def test_a_counter_that_old_files_lack_keeps_its_value() -> None:
    given = full()
    del given["layer1.0.num_batches_tracked"]
    assert fit(given).tensors["layer1.0.num_batches_tracked"] == 5


def test_missing_and_other_shapes_are_refused_with_the_first_few_names() -> None:
    with pytest.raises(WeightsError, match=re.escape("stem.weight is 9x9, expected 2x3; layer1.0.weight is missing")):
        fit({"stem.weight": torch.zeros(9, 9)})
    with pytest.raises(WeightsError, match=r"is missing; .*; and 1 more. Give the backbone") as error:
        fitting({}, [{f"{n}": torch.ones(1) for n in range(5)}], num_needed=1, file=Path("ep37.pth"), model="net")
    assert str(error.value).startswith("The weights in ep37.pth don't fit net: ")


def test_more_tensors_in_a_module_of_the_trunk_are_another_model() -> None:
    with pytest.raises(WeightsError, match=r"layer1.1.weight is unknown to net"):
        fit({**full(), "layer1.1.weight": torch.ones(3)})
    found = fit({**full(), "layer1.1.weight": torch.ones(3)}, num_needed=1)  # the cut lies before that module
    assert found.notes == ("layer1.1.weight: not used",)


def test_tensors_that_the_model_has_and_does_not_need_are_no_surplus() -> None:
    found = fit({**full(), "layer1.mask": torch.ones(3)}, unused=("layer1.mask",))
    assert found.notes == ()
    assert "layer1.mask" not in found.tensors


def test_a_deeper_trunk_inside_one_wrapper_module_is_another_model_too() -> None:
    stages = [{"net.layer1.0.weight": torch.ones(1)}, {"net.fc.weight": torch.ones(1)}]
    given = {name: tensor for stage in stages for name, tensor in stage.items()}
    with pytest.raises(WeightsError, match=r"net.layer1.1.weight is unknown"):
        fitting(
            {**given, "net.layer1.1.weight": torch.ones(1)}, stages, num_needed=1, file=Path("ep37.pth"), model="own"
        )
    found = fitting({**given, "net.extra.weight": torch.ones(1)}, stages, num_needed=1, file=Path("x"), model="own")
    assert found.notes == ("net.extra.weight: not used",)


# ---------------------------------------------------------------------------------------- self-supervised training


def fitted(tensors: dict[str, Tensor], **options: Any) -> Fit:
    stages = [{name: tensor} for name, tensor in full().items()]
    return fitting(tensors, stages, num_needed=2, file=Path("ep37.pth"), model="net", **options)


@pytest.mark.parametrize(
    "prefix", ["encoder_q.", "module.encoder_q.", "teacher.backbone.", "student.module.backbone.", "momentum_encoder."]
)
def test_names_of_self_supervised_training_are_understood(prefix: str) -> None:
    projection = {f"{prefix}projector.0.weight": torch.ones(3)}
    assert same(fitted({prefix + name: tensor for name, tensor in full().items()} | projection).tensors, full())


def test_of_a_teacher_and_its_student_nobody_chooses_but_the_user(tmp_path: Path) -> None:
    student = {name: tensor + 1 for name, tensor in full().items()}
    path = tmp_path / "dino.pth"
    torch.save({"teacher": full(), "student": {f"module.{name}": value for name, value in student.items()}}, path)
    tensors, _ = read_tensors(path)
    with pytest.raises(WeightsError, match=r"under 'teacher\.', 'student\.module\.', .* --weights-prefix teacher\."):
        fitted(tensors)
    assert same(fitted(tensors, prefix="teacher.").tensors, full())
    assert same(fitted(tensors, prefix="teacher").tensors, full())
    assert same(fitted(tensors, prefix="student.module.").tensors, student)
    with pytest.raises(WeightsError, match=r"starts with 'teach\.ers'.*teacher\., student\.module\."):
        fitted(tensors, prefix="teach.ers")
    *_, last = full()  # of the head: one of them has none
    del tensors[f"teacher.{last}"]
    with pytest.raises(WeightsError, match=r"under 'teacher\.', 'student\.module\.'"):
        fitted(tensors)


def test_a_prefix_that_nobody_knows_is_named_where_all_names_have_it() -> None:
    tensors = {f"feature_extractor.{name}": tensor for name, tensor in full().items()}
    with pytest.raises(WeightsError, match=r"begin with 'feature_extractor\.'.* --weights-prefix feature_extractor\. "):
        fitted(tensors)
    assert same(fitted(tensors, prefix="feature_extractor").tensors, full())
    del tensors["feature_extractor.stem.weight"]
    with pytest.raises(WeightsError, match=r"stem\.weight is missing"):
        fitted(tensors)


def test_the_network_that_gives_all_that_is_needed_is_taken_though_another_gives_more() -> None:
    stages = [{name: full()[name]} for name in ("stem.weight", "layer1.0.weight", "fc.weight", "fc.bias")]
    tensors = {f"teacher.{name}": tensor for stage in stages[1:] for name, tensor in stage.items()}
    tensors |= {f"student.{name}": tensor for stage in stages[:2] for name, tensor in stage.items()}
    found = fitting(tensors, stages, num_needed=2, file=Path("dino.pth"), model="net")
    assert same(found.tensors, stages[0] | stages[1])


def test_the_network_that_fits_best_is_said_where_another_nearly_does() -> None:
    first, *_ = full()
    both = {f"encoder_q.{name}": tensor for name, tensor in full().items()}
    both |= {f"encoder_k.{name}": tensor for name, tensor in full().items() if name != first}
    (note,) = [note for note in fitted(both).notes if "several networks" in note]
    assert note == "ep37.pth holds several networks: that under 'encoder_q.' fits best, not 'encoder_k.', and is used"


# ------------------------------------------------------------------------------------------------------ odd contents


@pytest.mark.parametrize(
    ("odd", "words"),
    [
        (lambda tensor: tensor.int(), r"holds integers \(int32\), expected floating-point numbers \(float32\)"),
        (lambda tensor: tensor + 1j, r"holds complex numbers \(complex64\), expected floating-point"),
        (lambda tensor: tensor > 0, r"holds truth values \(bool\), expected floating-point"),
        (lambda tensor: tensor.to_sparse(), "is sparse, expected plain numbers"),
        (lambda tensor: tensor.to("meta"), r"is without values \(meta\), expected plain numbers"),
        (lambda tensor: tensor.masked_fill(tensor == tensor.max(), torch.nan), "holds NaN, expected numbers"),
        (lambda tensor: tensor.double() * 1e300, "holds values beyond float32, expected such that it can hold"),
    ],
)
def test_numbers_of_another_kind_are_refused_by_name(odd: Callable[[Tensor], Tensor], words: str) -> None:
    given = full()
    name = next(iter(given))
    with pytest.raises(WeightsError, match=rf"{name} {words}"):
        fitted({**given, name: odd(given[name])})


def test_an_infinite_number_is_a_mask_and_fits() -> None:
    name, *_ = full()
    given = {**full(), name: torch.full_like(full()[name], -torch.inf).double()}
    assert torch.equal(fitted(given).tensors[name], given[name])


def test_half_precision_weights_fit() -> None:
    fit = fitted({name: tensor.bfloat16() for name, tensor in full().items()})
    assert all(torch.equal(value, full()[name].bfloat16()) for name, value in fit.tensors.items())


def test_a_state_dict_that_holds_itself_ends_in_a_sentence(tmp_path: Path) -> None:
    content: dict[str, Any] = {"epoch": 1}
    content["model"] = content
    torch.save(content, tmp_path / "loop.pth")
    with pytest.raises(WeightsError, match=r"loop.pth holds no tensors by name"):
        read_tensors(tmp_path / "loop.pth")


def test_an_archive_that_would_unpack_to_far_more_than_its_size_is_refused_unread(tmp_path: Path) -> None:
    path = tmp_path / "bomb.pth"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("bomb/data.pkl", bytes(100 << 20))
    assert path.stat().st_size < 1 << 20
    with pytest.raises(WeightsError, match=r"bomb.pth is a compressed archive of .* would unpack to 0.105 GB"):
        read_tensors(path)


def test_no_advice_of_torch_to_run_code_is_passed_on(tmp_path: Path) -> None:
    path = tmp_path / "odd.pth"
    path.write_bytes(pickle.dumps({"weights": [range(3)]}, protocol=4))
    with pytest.raises(WeightsError) as caught:
        read_tensors(path)
    assert "weights_only=False" not in str(caught.value).partition("If you trust it")[0]
