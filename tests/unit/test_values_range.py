"""What a number that a setting takes must be, said in a few words."""

import math

import pytest

from salve.values import ABOVE_ZERO, NOT_NEGATIVE, SHARE, Range


@pytest.mark.parametrize("allowed", [ABOVE_ZERO, NOT_NEGATIVE, SHARE])
def test_what_is_no_number_is_refused_as_such(allowed: Range) -> None:
    for wrong in (math.nan, "0.5", None, True):
        assert allowed.refusal(wrong) == "must be a number"
    assert allowed.refusal(0.5) == ""
    assert allowed.refusal(-1.0) in ("must be above 0", "must not be negative", "must be at least 0 and at most 1")
