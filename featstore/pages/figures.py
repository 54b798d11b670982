"""Figures of a page, as plotly draws them in a browser; all text in them is escaped. The one door to plotly."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from html import escape
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from featstore.errors import FeatureStoreError
from featstore.words import printable

if TYPE_CHECKING:
    from plotly.graph_objects import Figure as Figure

MOST_COLOURS = 12
"""Of groups that have a colour of their own on a map; more are hard to tell apart."""
_FEW_CELLS = 30
"""Classes up to which a number in each cell of a matrix can be read."""
_OTHERS = "#9a9a9a"


def program() -> str:
    """The source of plotly.js, whole: nothing is loaded from elsewhere.

    Raises:
        FeatureStoreError: if plotly isn't installed.
    """
    _plotly()
    from plotly.offline import get_plotlyjs

    return str(get_plotlyjs())


def curves(
    lines: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    *,
    x: str,
    y: str,
    is_log: bool = False,
    marks: Mapping[str, float] | None = None,
) -> Figure:
    """Lines, each under its name, of (x values, y values).

    Args:
        lines: name -> the two; a value that isn't finite leaves a gap.
        x: title of that axis.
        y: likewise.
        is_log: whether the x axis is logarithmic.
        marks: name -> place on the x axis, a line across each.
    """
    go = _plotly()
    figure = go.Figure()
    for name, (xs, ys) in lines.items():
        mode = "lines+markers" if len(xs) <= 60 else "lines"
        figure.add_scatter(x=_finite(xs), y=_finite(ys), name=_text(name), mode=mode)
    for name, place in (marks or {}).items():
        figure.add_vline(x=place, line_dash="dot", annotation_text=_text(name))
    is_counted = all(float(value).is_integer() for xs, _ in lines.values() for value in xs)
    ticks = {"tickformat": "d", "nticks": 12} if is_counted else {}
    if is_counted and max((value for xs, _ in lines.values() for value in xs), default=0) <= 12:
        ticks = {"dtick": 1}
    figure.update_xaxes(title=_text(x), type="log" if is_log else "linear", **ticks)
    figure.update_yaxes(title=_text(y))
    return _laid_out(figure, height=340)


def confusion(counts: NDArray[np.int64], classes: Sequence[str]) -> Figure:
    """How many images of each class (a row, from the top) were taken for each (a column); colours are shares of a row.

    Args:
        counts: ``(K, K)``.
        classes: K names.
    """
    go = _plotly()
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    names = [_text(name) for name in classes]
    places = np.arange(len(names))
    # Names are no values of an axis, where plotly would take "1" for a number, but what stands at its marks.
    figure = go.Figure(
        go.Heatmap(
            z=shares,
            x=places,
            y=places,
            zmin=0,
            zmax=1,
            colorscale="Blues",
            text=counts,
            texttemplate="%{text}" if len(names) <= _FEW_CELLS else None,
            customdata=[[[actual, taken] for taken in names] for actual in names],
            hovertemplate="%{text} of %{customdata[0]}<br>taken for %{customdata[1]}<extra></extra>",
            showscale=False,
        )
    )
    every = max(1, len(names) // 40)
    ticks = {"tickvals": places[::every], "ticktext": [_short(name) for name in classes[::every]]}
    figure.update_xaxes(title="taken for", constrain="domain", **ticks)
    figure.update_yaxes(title="class", autorange="reversed", scaleanchor="x", constrain="domain", **ticks)
    return _laid_out(figure, height=min(760, 260 + 26 * len(names)))


def reliability(confidences: NDArray[np.float64], is_right: NDArray[np.bool_], bins: int = 15) -> Figure:
    """The share that was right among images of like confidence, and how many these are, in `bins` of equal width.

    Args:
        confidences: ``(N,)``, the probability of what was predicted, 0 to 1.
        is_right: ``(N,)``.
        bins: of the confidence.
    """
    go = _plotly()
    counts, said, right = by_confidence(confidences, is_right, bins)
    has_some = counts > 0
    figure = go.Figure()
    figure.add_scatter(
        x=[0, 1], y=[0, 1], mode="lines", name="as sure as right", line={"dash": "dot", "color": _OTHERS}
    )
    figure.add_bar(
        x=(np.arange(bins) + 0.5) / bins,
        y=counts / max(1, len(confidences)),
        width=1 / bins,
        name="share of the images",
        marker_color="rgba(120, 150, 190, 0.35)",
    )
    figure.add_scatter(
        x=said[has_some],
        y=right[has_some],
        text=counts[has_some],
        mode="lines+markers",
        name="share that is right",
        hovertemplate="said %{x:.3f}, right %{y:.3f}, %{text} images<extra></extra>",
    )
    figure.update_xaxes(title="probability of what was predicted", range=[0, 1.02])
    figure.update_yaxes(title="share", range=[0, 1.02])
    return _laid_out(figure, height=360)


def by_confidence(
    confidences: NDArray[np.float64], is_right: NDArray[np.bool_], bins: int
) -> tuple[NDArray[np.int64], NDArray[np.float64], NDArray[np.float64]]:
    """Of each bin ``(bins,)``: how many images, the mean confidence, the share that is right; NaN of none.

    A bin holds its upper edge and not its lower one.
    """
    places = np.clip(np.ceil(confidences * bins).astype(np.int64) - 1, 0, bins - 1)
    counts = np.bincount(places, minlength=bins)
    with np.errstate(invalid="ignore"):
        said = np.bincount(places, confidences, bins) / counts
        right = np.bincount(places, is_right.astype(np.float64), bins) / counts
    return counts, said, right


def bars(counts: Mapping[str, Sequence[float]], names: Sequence[str], *, y: str) -> Figure:
    """Bars on one another, of several kinds, over each name.

    Args:
        counts: kind -> one number a name.
        names: of the bars.
        y: title of that axis.
    """
    go = _plotly()
    places = np.arange(len(names))
    figure = go.Figure()
    for kind, numbers in counts.items():
        figure.add_bar(x=places, y=numbers, name=_text(kind), text=None, hovertemplate="%{y}<extra></extra>")
    every = max(1, len(names) // 40)
    figure.update_xaxes(tickvals=places[::every], ticktext=[_short(name) for name in names[::every]])
    figure.update_yaxes(title=_text(y))
    figure.update_layout(barmode="stack")
    return _laid_out(figure, height=320)


def point_map(
    points: NDArray[np.floating[Any]], places: NDArray[np.int64], groups: Sequence[str] | NDArray[np.float64]
) -> Figure:
    """Points in a plane, each of an image of the page: hovering shows it, clicking chooses it.

    Args:
        points: ``(N, 2)``.
        places: ``(N,)``, which image each is.
        groups: of each a name, which gives its colour (the commonest `MOST_COLOURS`; the others are gray); or a number.
    """
    go = _plotly()
    figure = go.Figure()
    # Not Scattergl, which makes programs of texts: a page's policy would have to let it. 5,000 points answer as fast.
    # What hovering shows is the page's own.
    common: dict[str, Any] = {"mode": "markers", "hoverinfo": "none"}
    size = 8 if len(points) < 500 else 6 if len(points) < 2_500 else 4
    if isinstance(groups, np.ndarray):
        marker = {"size": size, "color": groups, "colorscale": "Viridis", "showscale": True}
        figure.add_trace(go.Scatter(**_as_lists(points, places), marker=marker, **common))
    else:
        names = np.array(groups, dtype=object)
        kept = [name for name, _ in Counter(groups).most_common(MOST_COLOURS)]
        shown: list[tuple[str, NDArray[np.bool_], str | None]] = [(name, names == name, None) for name in sorted(kept)]
        if (is_other := ~np.isin(names, kept)).any():
            shown.insert(0, (f"{len(set(groups)) - len(kept):,} others", is_other, _OTHERS))
        for name, which, colour in shown:
            marker = {"size": size, "opacity": 0.8, **({} if colour is None else {"color": colour})}
            figure.add_trace(
                go.Scatter(**_as_lists(points[which], places[which]), name=_short(name), marker=marker, **common)
            )
    hidden = {"showticklabels": False, "zeroline": False, "ticks": ""}
    figure.update_xaxes(**hidden)
    figure.update_yaxes(**hidden)
    figure.update_layout(hovermode="closest", dragmode="pan", legend={"itemsizing": "constant"})
    return _laid_out(figure, height=560, has_legend=not isinstance(groups, np.ndarray))


def as_json(figure: Figure) -> str:
    """What plotly.js draws, as JSON."""
    return str(figure.to_json())


def _plotly() -> Any:
    try:
        import plotly.graph_objects as go
    except ImportError as error:
        raise FeatureStoreError(
            f"Figures of a page are drawn by plotly, which can't be loaded ({error}). Install it: pip install "
            "'featstore[report]'."
        ) from error
    return go


def _laid_out(figure: Figure, *, height: int, has_legend: bool = True) -> Figure:
    figure.update_layout(
        template="none",
        colorway=["#3b6fb6", "#d9722e", "#3a9a62", "#c0485a", "#7b61b0", "#8a6a4f", "#c46aa5", "#5d7f96", "#a89a2c",
                  "#2f9c9c", "#e29a9a", "#6d8f3c"],
        height=height,
        margin={"l": 64, "r": 20, "t": 24, "b": 52},
        showlegend=has_legend and len(figure.data) > 1,
    )  # fmt: skip
    figure.update_xaxes(automargin=True)
    figure.update_yaxes(automargin=True)
    return figure


def _as_lists(points: NDArray[np.floating[Any]], places: NDArray[np.int64]) -> dict[str, list[Any]]:
    """Points and whose they are, as the page's own script can read them: plotly writes arrays as base64."""
    x, y = ([float(f"{value:.5g}") for value in column] for column in points.T.tolist())
    return {"x": x, "y": y, "customdata": places.tolist()}


def _finite(values: Sequence[float]) -> NDArray[np.float64]:
    """As numbers, NaN where one is infinite: plotly.js leaves a gap there."""
    numbers = np.asarray(values, dtype=np.float64)
    return np.where(np.isfinite(numbers), numbers, np.nan)


def _text(text: str) -> str:
    """Text as plotly.js shows it: it obeys tags, and reads entities."""
    return escape(printable(text, is_one_line=True).encode("utf-8", "backslashreplace").decode("utf-8"), quote=False)


def _short(text: str, most: int = 24) -> str:
    return _text(text if len(text) <= most else f"{text[: most - 1]}…")
