"""Rows wait for their part in the order in which they came, few bytes one behind the other."""

import numpy as np
import pytest
import torch
from support.tiny import SPEC

from featstore.store import gathering
from featstore.store.gathering import Gathered


def test_rows_of_many_small_passes_lie_in_few_pieces_and_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gathering, "_BLOCK_BYTES", 1 << 12)
    rng = np.random.default_rng(0)
    rows = torch.from_numpy(rng.standard_normal((900, 4), np.float32))
    digests, decoders = rng.integers(0, 256, (900, 32), np.uint8), rng.integers(0, 3, 900, np.uint8)
    gathered = Gathered(SPEC, (4,))
    ends = [*range(7, 400, 7), 400, 700, 700, *range(705, 900, 5), 900]  # a large piece between, and none
    for begin, end in zip([0, *ends], ends, strict=False):
        given = rows[begin:end].clone()
        gathered.add(given, digests[begin:end], decoders[begin:end])
        given.zero_()  # whose memory the next pass has; a large piece is kept as it is
        if end - begin == 300:
            given.copy_(rows[begin:end])
    assert (gathered.num_rows, gathered.num_bytes) == (900, rows.nbytes)
    assert len(gathered._chunks) < 10
    sized = gathered.sized(2000)
    assert (sized.num_rows, sized.num_bytes) == (2000, 2000 * 16)
    pieces = [each for each, _, _ in gathered._chunks if isinstance(each, torch.Tensor)]
    assert torch.equal(torch.cat(pieces), rows)
    assert np.array_equal(np.concatenate([each for _, each, _ in gathered._chunks]), digests)
    assert np.array_equal(np.concatenate([each for _, _, each in gathered._chunks]), decoders)
