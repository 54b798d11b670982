"""Errors: what they say and hold survives pickling, as pools of processes need it to."""

from __future__ import annotations

import copy
import pickle

import pytest

from featstore import errors
from featstore.errors import FeatureStoreError, ImageError
from featstore.images.headers import DecodeError
from featstore.images.views import RenderError
from featstore.remedies import Command

PLAIN = [
    each
    for each in (*vars(errors).values(), DecodeError, RenderError)
    if isinstance(each, type) and issubclass(each, Exception) and each is not ImageError
]


@pytest.mark.parametrize(
    "error",
    [
        ImageError("cat/1.jpg", "it is truncated"),
        *(kind("what is wrong") for kind in PLAIN),
        FeatureStoreError("List them:", remedy=Command("featstore", "ls")),
    ],
    ids=lambda error: type(error).__name__,
)
def test_an_error_comes_back_whole(error: Exception) -> None:
    error.add_note("while rendering")
    for back in (pickle.loads(pickle.dumps(error)), copy.copy(error)):
        assert type(back) is type(error)
        assert str(back) == str(error)
        assert vars(back) == vars(error)


def test_an_image_error_says_which_image_and_why() -> None:
    error = pickle.loads(pickle.dumps(ImageError("cat/1.jpg", "it is truncated")))
    assert (error.image, error.reason, str(error)) == ("cat/1.jpg", "it is truncated", "cat/1.jpg: it is truncated")
