import math
from array import array
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from numpy.typing import NDArray
from PIL import Image
from support.processes import Processes

from featstore.errors import ImageError
from featstore.images.image_set import ImageSet
from featstore.images.views import Augment, View
from training import History, plots

PNG = b"\x89PNG\r\n"
VIEW = View(size=24, resize=28)


def photographs(num_images: int = 6) -> ImageSet:
    pixels = np.random.default_rng(0).integers(0, 256, (num_images, 30, 40, 3), dtype=np.uint8)
    return ImageSet.from_arrays(pixels)


def drawn_pixels(axes: Axes) -> NDArray[np.uint8]:
    [image] = axes.get_images()
    return np.asarray(image.get_array())


def line_labels(axes: Axes) -> list[str]:
    return [str(line.get_label()) for line in axes.get_lines()]


def test_views_shows_the_very_pixels_that_are_rendered() -> None:
    images = photographs()
    seeds = [None, 0, 5]
    figure = plots.views(images, VIEW, "random_resized_crop", seeds, num_images=2)
    digests = images.digests().values
    panels = iter(figure.get_axes())
    for row in range(2):
        pixels = torch.from_numpy(np.array(images.read(row))).permute(2, 0, 1)
        for seed in seeds:
            view = VIEW.evaluation if seed is None else VIEW.with_seed("random_resized_crop", seed)
            expected = view.render(pixels, digests[row].tobytes()).permute(1, 2, 0).numpy()
            np.testing.assert_array_equal(drawn_pixels(next(panels)), expected)
    assert next(panels, None) is None


def test_gray_views_are_shown_in_gray_from_black_to_white() -> None:
    images = photographs(1)
    gray = replace(VIEW, channels=1)
    (axes,) = plots.views(images, gray, "flip", [None]).get_axes()
    pixels = torch.from_numpy(np.array(images.read(0))).permute(2, 0, 1)
    np.testing.assert_array_equal(drawn_pixels(axes), gray.render(pixels, b"")[0].numpy())
    [image] = axes.get_images()
    assert (image.get_cmap().name, image.get_clim()) == ("gray", (0, 255))


def test_views_titles_columns_by_view_and_rows_by_image() -> None:
    images = photographs()
    panels = plots.views(images, VIEW, "flip").get_axes()
    assert len(panels) == 4 * 4
    assert [axes.get_title() for axes in panels[:4]] == ["evaluation view", "seed 0", "seed 1", "seed 2"]
    assert [axes.get_ylabel() for axes in panels[::4]] == list(images.ids[:4])
    assert not any(axes.get_title() for axes in panels[4:])


@pytest.mark.parametrize("seeds", [[7, 3, 9, 8], "fresh"])
def test_views_of_an_augmentation_has_its_policy_as_title_and_its_first_seeds(seeds: Any) -> None:
    augment = Augment([("side_on", {"max_zoom": 1.1}), "cutout"], seeds=seeds)
    figure = plots.views(photographs(), VIEW, augment, num_images=1)
    assert figure.get_suptitle() == "side_on:max_zoom=1.1+cutout"
    expected = [0, 1, 2] if seeds == "fresh" else [3, 7, 8]
    assert [axes.get_title() for axes in figure.get_axes()] == ["evaluation view", *(f"seed {n}" for n in expected)]
    shown = [drawn_pixels(axes) for axes in figure.get_axes()]
    of_policy = plots.views(photographs(), VIEW, augment.policy, [None, *expected], num_images=1)
    for pixels, axes in zip(shown, of_policy.get_axes(), strict=True):
        np.testing.assert_array_equal(pixels, drawn_pixels(axes))


def test_views_shows_any_file_name_as_it_is(tmp_path: Path) -> None:
    names = ["50$^a_{$.png", "caf\xe9 1.png", "not-utf8-\udcff.png", "z" * 40 + ".png"]
    (tmp_path / "cat").mkdir()
    for name in names:
        Image.new("RGB", (30, 30)).save(tmp_path / "cat" / name)
    figure = plots.views(ImageSet.from_folder(tmp_path), VIEW, "flip", [None])
    shown = [axes.get_ylabel() for axes in figure.get_axes()]
    assert shown == ["cat/50$^a_{$.png", "cat/caf\xe9 1.png", "cat/not-utf8-?.png", "…" + "z" * 23 + ".png"]
    assert figure._repr_png_().startswith(PNG)


def test_views_of_fewer_images_than_asked_for_shows_them_all() -> None:
    assert len(plots.views(photographs(2), VIEW, "flip", [None]).get_axes()) == 2


def test_views_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="nothing to show of 4 images and 0 seeds"):
        plots.views(photographs(), VIEW, "flip", [])
    with pytest.raises(ValueError, match="nothing to show of 0 images and 4 seeds"):
        plots.views(photographs(), VIEW, "flip", num_images=0)


def test_views_names_an_image_that_can_not_be_read(tmp_path: Path) -> None:
    (tmp_path / "cat").mkdir()
    (tmp_path / "cat" / "broken.jpg").write_bytes(b"not a photograph")
    with pytest.raises(ImageError, match=r"cat/broken\.jpg"):
        plots.views(ImageSet.from_folder(tmp_path), VIEW, "flip")


def test_learning_rates_draws_every_point_on_a_logarithmic_axis() -> None:
    lrs = np.geomspace(1e-5, 10, 100)
    losses = np.linspace(3, 900, 100)
    axes = plots.learning_rates(lrs.tolist(), losses.tolist(), (losses / 2).tolist(), suggestion=2e-3)
    points, smoothed, mark = axes.get_lines()
    np.testing.assert_array_equal(points.get_xydata(), np.column_stack([lrs, losses]))
    np.testing.assert_array_equal(smoothed.get_xydata(), np.column_stack([lrs, losses / 2]))
    assert mark.get_xdata() == [2e-3, 2e-3]
    assert line_labels(axes) == ["each batch", "smoothed", "suggestion 0.002"]
    assert axes.get_xscale() == "log"
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("learning rate", "training loss")
    low, high = axes.get_ylim()
    assert low < 1.5
    assert high > 900


def test_learning_rates_of_one_step_is_a_visible_point() -> None:
    axes = plots.learning_rates([1e-3], [2.0], [2.0])
    assert all(line.get_marker() == "." for line in axes.get_lines())
    assert isinstance(axes, plots.Panel)
    assert axes._repr_png_().startswith(PNG)


def test_learning_rates_counts_losses_that_can_not_be_drawn() -> None:
    axes = plots.learning_rates([1e-3, 1e-2, 1e-1], [2.0, math.inf, math.nan], [2.0, math.inf, math.nan])
    assert axes.get_title() == "2 of 3 losses are not finite and not drawn"
    assert isinstance(axes, plots.Panel)
    assert axes._repr_png_().startswith(PNG)


def test_learning_rates_of_unequal_lengths_are_refused() -> None:
    with pytest.raises(ValueError, match="2 learning rates, 1 losses and 2 smoothed losses"):
        plots.learning_rates([1e-3, 1e-2], [2.0], [2.0, 1.0])
    with pytest.raises(ValueError, match="0 learning rates"):
        plots.learning_rates([], [], [])


def test_history_draws_losses_and_metrics_by_epoch() -> None:
    records = [
        {"epoch": epoch, "train_loss": 2 / epoch, "valid_loss": 3 / epoch, "accuracy": 1 - 0.5 / epoch, "seconds": 9.0}
        for epoch in (1, 2, 3)
    ]
    figure = plots.history(records)
    losses, metrics = figure.get_axes()
    assert (line_labels(losses), losses.get_ylabel()) == (["training", "validation"], "loss")
    assert (line_labels(metrics), metrics.get_ylabel()) == (["accuracy"], "validation metric")
    np.testing.assert_array_equal(losses.get_lines()[1].get_xydata(), [[1, 3], [2, 1.5], [3, 1]])
    np.testing.assert_array_equal(metrics.get_lines()[0].get_xdata(), [1, 2, 3])
    assert figure._repr_png_().startswith(PNG)


def test_history_without_validation_has_only_the_training_loss() -> None:
    figure = plots.history([{"train_loss": 2.0, "valid_loss": None, "lr": 1e-3}])
    [losses] = figure.get_axes()
    assert line_labels(losses) == ["training"]
    np.testing.assert_array_equal(losses.get_lines()[0].get_xydata(), [[1, 2]])


def test_history_of_a_diverged_fit_still_names_its_lines() -> None:
    figure = plots.history([{"train_loss": math.nan, "valid_loss": math.inf, "accuracy": math.nan}])
    losses, metrics = figure.get_axes()
    assert line_labels(losses) == ["training", "validation"]
    assert line_labels(metrics) == ["accuracy"]
    assert figure._repr_png_().startswith(PNG)


def test_history_without_epochs_is_refused() -> None:
    with pytest.raises(ValueError, match="no epochs"):
        plots.history([])


def test_history_draws_each_step_with_its_rate_and_momentum() -> None:
    fitted = History(losses=[3.0, 1.0, math.nan], lrs=array("d", [0.1, 0.2, 0.1]), momenta=array("d", [0.9, 0.8, 0.9]))
    losses = fitted.plot_steps()
    np.testing.assert_array_equal(losses.get_lines()[0].get_xydata(), [[1, 3], [2, 1], [3, math.nan]])
    assert (losses.get_xlabel(), losses.get_ylabel()) == ("step", "training loss")
    rates = fitted.plot_lr()
    assert rates.figure is not None
    left, right = rates.figure.get_axes()
    assert left is rates
    assert (left.get_ylabel(), right.get_ylabel(), right.get_xlabel()) == ("learning rate", "momentum", "step")
    np.testing.assert_array_equal(left.get_lines()[0].get_xydata(), [[1, 0.1], [2, 0.2], [3, 0.1]])
    np.testing.assert_array_equal(right.get_lines()[0].get_ydata(), [0.9, 0.8, 0.9])
    plain = History(losses=[1.0], lrs=array("d", [0.1]), momenta=array("d", [0.0])).plot_lr()
    assert plain.figure is not None
    assert plain.figure.get_axes() == [plain]
    assert plain.get_lines()[0].get_marker() == "."
    with pytest.raises(ValueError, match="no steps"):
        History().plot_lr()


def test_several_fits_are_drawn_on_one_pair_of_axes() -> None:
    axes = Figure().subplots()
    for factor in (1, 2):
        records = [{"epoch": 1.0, "train_loss": factor, "accuracy": factor / 2}]
        assert History(records=records).plot_metrics(axes) is axes
    assert [line.get_ydata() for line in axes.get_lines()] == [[0.5], [1.0]]
    assert line_labels(History(records=[{"epoch": 1.0, "train_loss": 1}]).plot_losses()) == ["training"]
    with pytest.raises(ValueError, match="No epoch has a metric"):
        History(records=[{"epoch": 1.0, "train_loss": 1}]).plot_metrics()


def test_pairs_of_classes_that_are_not_drawn_are_counted() -> None:
    pairs = [("cat", "dog", 5), ("$a$", "cat", 2), ("dog", "cat", 1)]
    axes = plots.most_confused(pairs, num_pairs=2)
    assert [bar.get_width() for bar in axes.patches if isinstance(bar, Rectangle)] == [5, 2]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["cat as dog", "$a$ as cat"]
    assert (axes.get_title(), axes.get_xlabel()) == ("2 of 3 pairs", "images")
    assert axes.get_ylim()[0] > axes.get_ylim()[1]  # the first is on top
    assert plots.most_confused(pairs).get_title() == ""
    with pytest.raises(ValueError, match="nothing to draw"):
        plots.most_confused([])


def test_plots_save_themselves(tmp_path: Path) -> None:
    figure, panel = plots.views(photographs(), VIEW, "flip"), plots.step_losses([1.0, 2.0])
    assert isinstance(panel, plots.Panel)
    for suffix in ("png", "pdf", "svg"):
        figure.savefig(tmp_path / f"views.{suffix}")
        panel.savefig(tmp_path / f"losses.{suffix}")
        assert min(each.stat().st_size for each in tmp_path.glob(f"*.{suffix}")) > 1000


def test_drawing_does_not_import_pyplot(new_processes: Processes) -> None:
    program = (
        "import sys; from training import plots; plots.learning_rates([1e-3], [2.0], [2.0])._repr_png_();"
        "print('matplotlib.pyplot' in sys.modules)"
    )
    assert new_processes.answer(program) == "False"
