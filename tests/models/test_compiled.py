"""Compiled trunks: rows near those of plain ones, functions of one image, and never a plain one in disguise."""

from __future__ import annotations

import gc
import warnings
import weakref
from pathlib import Path

import pytest
import torch
from support.tiny import VIEW, net, staged
from torch import Tensor, fx, nn
from torch._dynamo import config as dynamo
from torch._inductor import config as inductor

from featstore import ModelError, Output, StagedModel, Trunk
from featstore.models.compiled import check_compiler
from featstore.models.names import Batching, Precision
from featstore.models.pool import Pool
from featstore.models.probe import TOLERANCES, check_compiled, take_probes

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # torch 2.11 imports what it deprecates itself
    from torch._inductor import compile_fx

CPU = torch.device("cpu")
COMPILED = Batching(4, compiled=True)


def views(num: int) -> Tensor:
    generator = torch.Generator().manual_seed(num)
    return torch.randint(0, 256, (num, 3, VIEW.size, VIEW.size), generator=generator, dtype=torch.uint8)


class Telling(nn.Module):
    """Adds `compiled` to the values where it runs as compiled code, and nothing where it doesn't."""

    def __init__(self, compiled: float | Tensor = 1.0) -> None:
        super().__init__()
        self.compiled = compiled

    def fingerprint(self) -> str:
        return "as torch.compile is told"

    def forward(self, values: Tensor) -> Tensor:
        return values + self.compiled if torch.compiler.is_compiling() else values


def telling(compiled: float | Tensor = 1.0) -> StagedModel:
    return StagedModel.from_module(nn.Sequential(nn.Flatten(), Telling(compiled)).eval(), view=VIEW, name="telling")


def trunk_of(model: StagedModel, batching: Batching = COMPILED, precision: Precision = "fp32") -> Trunk:
    outputs = [Output(model.cut_points[-1], Pool("none", "NC"))]
    return Trunk(model, outputs, view=VIEW, batching=batching, precision=precision)


@pytest.mark.usefixtures("compiler")
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_rows_lie_within_the_tolerance_and_depend_on_their_image_alone(precision: Precision) -> None:
    model = staged()
    outputs = [Output(cut, model.pool(cut, "none")) for cut in ("layer2", "layer1", "fc")]
    plain = Trunk(model, outputs, view=VIEW, batching=Batching(4), precision=precision)
    trunk = Trunk(model, outputs, view=VIEW, batching=COMPILED, precision=precision)
    images = views(11)
    found = trunk(images)
    for rows, expected in zip(found, plain(images), strict=True):
        assert rows.is_contiguous()
        assert rows.dtype == torch.float32
        assert not rows.requires_grad
        assert float((rows - expected).abs().max() / expected.abs().max()) <= TOLERANCES[precision]
    order = torch.randperm(11, generator=torch.Generator().manual_seed(0))
    assert all(torch.equal(turned, rows[order]) for turned, rows in zip(trunk(images[order]), found, strict=True))
    assert all(torch.equal(alone, rows[9:10]) for alone, rows in zip(trunk(images[9:10]), found, strict=True))
    assert trunk.profile()["compiled"] == ["layer1", "layer2", "fc"]
    assert "compiled" not in plain.profile()
    with torch.no_grad():
        for tensor in model.parameters():
            tensor.mul_(2)
    assert not trunk.is_live
    assert all(torch.equal(again, rows) for again, rows in zip(trunk(images), found, strict=True))


@pytest.mark.usefixtures("compiler")
def test_what_is_taken_is_not_overwritten_by_what_follows() -> None:
    module = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.ReLU(inplace=True)).eval()
    model = StagedModel.from_module(module, view=VIEW)
    outputs = [Output("0", Pool("none", "NCHW")), Output("1", Pool("none", "NC"))]
    trunk = Trunk(model, [*outputs, Output("2", Pool("none", "NC"))], view=VIEW, batching=COMPILED)
    maps, flat, positive = trunk(views(4))
    with torch.no_grad():
        torch.testing.assert_close(maps, module[0](VIEW.normalise(views(4))))
    assert torch.equal(flat, maps.flatten(1))
    assert torch.equal(positive, flat.relu())


@pytest.mark.usefixtures("compiler")
def test_any_number_of_trunks_of_one_model_run_as_compiled_code() -> None:
    model, expected = telling(), VIEW.normalise(views(4)).flatten(1)
    with dynamo.patch(recompile_limit=1):  # of code that is shared, it would run others as they are
        for _ in range(3):
            assert torch.equal(trunk_of(model)(views(4))[0], expected + 1)
    assert torch.equal(trunk_of(model, Batching(4))(views(4))[0], expected)


@pytest.mark.usefixtures("compiler")
def test_another_batch_size_has_code_of_its_own_and_that_of_the_other_goes() -> None:
    trunk, expected = trunk_of(telling()), VIEW.normalise(views(4)).flatten(1)
    with dynamo.patch(recompile_limit=1):
        assert torch.equal(trunk(views(4))[0], expected + 1)
        left = weakref.ref(trunk._compiled)
        for size in (2, 1):
            trunk.batch_size = size
            assert torch.equal(trunk(views(4))[0], expected + 1)
    gc.collect()
    assert left() is None
    assert trunk.profile()["compiled"] == ["1"]


@pytest.mark.usefixtures("compiler")
def test_a_trunk_that_is_let_go_leaves_no_weights_behind() -> None:
    model = staged()

    def weights() -> weakref.ref[Tensor]:
        trunk = Trunk(model, [Output("layer1", Pool("none", "NCHW"))], view=VIEW, batching=COMPILED)
        trunk(views(4))
        return weakref.ref(next(trunk._model.parameters()))

    left = weights()
    gc.collect()
    assert left() is None


@pytest.mark.usefixtures("compiler")
def test_a_model_that_compiles_in_pieces_gives_its_values() -> None:
    class Gate(nn.Module):
        def fingerprint(self) -> str:
            return "gives back what it gets"

        def forward(self, values: Tensor) -> Tensor:
            if not bool(values.isfinite().all()):  # which compiled code leaves to Python
                raise ValueError("no numbers")
            return values

    model = StagedModel.from_module(nn.Sequential(net().layer1, Gate(), net().layer2).eval(), view=VIEW)
    output = Output("2", model.pool("2", "none"))
    found, expected = (
        Trunk(model, [output], view=VIEW, batching=each)(views(7))[0] for each in (COMPILED, Batching(4))
    )
    torch.testing.assert_close(found, expected)


@pytest.mark.usefixtures("compiler")
@pytest.mark.parametrize(
    ("compiled", "words"),
    [
        (
            1.0,
            r"^Compiled, telling computes other values at 1:none: .* fp32 allows 0\.0001\. Compute without: featstore ",
        ),
        (
            torch.arange(4.0).reshape(4, 1) * 1e-6,
            r"^Compiled, telling gives an image another row at 1:none in another place of a batch of 4\. ",
        ),
    ],
)
def test_other_values_and_other_rows_in_other_places_are_refused(compiled: float | Tensor, words: str) -> None:
    model = telling(compiled)
    trunk = trunk_of(model)
    (probe,) = take_probes(model, list(trunk.outputs), view=VIEW, precision="fp32", device=CPU)
    with pytest.raises(ModelError, match=words):
        check_compiled(trunk, {trunk.outputs[0]: probe}, name=model.name)


@pytest.mark.usefixtures("compiler")
def test_what_can_not_be_compiled_is_refused_by_name(tmp_path: Path) -> None:
    compiler = tmp_path / "g++"
    compiler.write_text(
        '#!/bin/sh\n[ "$1" = --version ] && exit 0\necho "no space left" >&2\nexit 1\n', encoding="utf-8"
    )
    compiler.chmod(0o755)
    words = (
        r"^net can't be compiled \(.*\)\. Expected a model that torch\.compile takes, and a compiler that "
        r"builds its code\. Compute without: featstore extract --no-compile"
    )
    with inductor.patch({"cpp.cxx": (str(compiler),)}), pytest.raises(ModelError, match=words):
        Trunk(staged(), [Output("layer1", Pool("none", "NCHW"))], view=VIEW, batching=Batching(3, compiled=True))(
            views(3)
        )
    words = r"^telling can't be compiled \(nothing of it was compiled, as where TORCH_COMPILE_DISABLE is set\)"
    with dynamo.patch(disable=True), pytest.raises(ModelError, match=words):
        trunk_of(telling())(views(4))


@pytest.mark.usefixtures("compiler")
@pytest.mark.parametrize(
    ("raised", "expected", "words"),
    [
        (AssertionError(), ModelError, r"^telling can't be compiled \(AssertionError\)\. "),
        (torch.OutOfMemoryError("CUDA out of memory."), torch.OutOfMemoryError, r"^CUDA out of memory\.$"),
    ],
)
def test_errors_without_words_are_named_and_memory_that_is_short_is_told_as_such(
    monkeypatch: pytest.MonkeyPatch, raised: Exception, expected: type[Exception], words: str
) -> None:
    def failing(graph: fx.GraphModule, inputs: list[Tensor]) -> None:
        raise raised

    monkeypatch.setattr(compile_fx, "compile_fx", failing)
    with pytest.raises(expected, match=words):
        trunk_of(telling())(views(4))


def test_without_a_compiler_nothing_is_compiled() -> None:
    words = r"^A model can't be compiled here: there is no C\+\+ compiler \(.*\)\. Expected g\+\+.* --no-compile"
    with inductor.patch({"cpp.cxx": ("no-such-compiler",)}):
        with pytest.raises(ValueError, match=words):
            check_compiler(CPU)
        with pytest.raises(ValueError, match=words):
            trunk_of(telling())
