"""Frames: tables of results as DataFrames; the one door to pandas, which is asked for at the first use."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from featstore.errors import FeatureStoreError


def data_frame(table: Sequence[Mapping[str, Any]]) -> Any:
    """`table`, rows as dicts, as a pandas DataFrame.

    Raises:
        FeatureStoreError: if pandas isn't installed.
    """
    try:
        import pandas  # type: ignore[import-untyped]
    except ImportError as error:
        raise FeatureStoreError(
            "frame() gives a DataFrame of pandas, which isn't installed. Install it: pip install pandas; or take "
            "`table`, the same rows as dicts."
        ) from error
    return pandas.DataFrame(table)
