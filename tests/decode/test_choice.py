"""The largest of long rows, found block by block: what `topk` finds."""

from __future__ import annotations

import pytest
import torch

from trilemma.decode.choice import largest


@pytest.mark.parametrize("count", [1, 8, 9])
@pytest.mark.parametrize("size", [9, 128, 1024, 2304, 4097, 12_345])
def test_the_largest_of_long_rows(size: int, count: int) -> None:
    values = torch.randn(5, size, generator=torch.Generator().manual_seed(size))
    values[1] = -torch.inf
    values[2, ::3] = -torch.inf
    values[3, -1], values[3, 0] = 9.0, 8.0  # at the ends, where a block may be cut
    values[4] = values[4].round()  # many are equal
    found, places = largest(values, count)
    assert torch.equal(found, values.topk(count).values)
    assert torch.equal(values.gather(1, places), found)
    assert all(len(set(row)) == count for row in places.tolist())


def test_what_is_no_number_comes_first() -> None:
    values = torch.randn(2, 4096)
    values[1, 3000] = torch.nan
    found, places = largest(values, 4)
    assert found[0].isfinite().all()
    assert found[1, 0].isnan()
    assert places[1, 0] == 3000
