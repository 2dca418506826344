"""Resource quantities."""

from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from webhook.core import quantity


@pytest.mark.parametrize(
    ("text", "amount"),
    [("1", 1), (1, 1), ("1000m", 1), ("0.5", Decimal("0.5")), ("1Gi", 2**30), ("1k", 1000), ("1024Mi", 2**30)],
)
def test_quantity_is_read(text: object, amount: Decimal) -> None:
    """What Kubernetes accepts stands for one amount, however it is written."""
    assert quantity.parse(text) == amount


@pytest.mark.parametrize("text", ["", "x", "1 Gi", "1gi", None, 1.5, "0x1", "1\n", "\u0661"])
def test_other_text_is_no_quantity(text: object) -> None:
    """Anything else is no quantity."""
    assert quantity.parse(text) is None


@pytest.mark.parametrize("text", ["", "0", "0m", "-1", "1Gi", "1e3", "1\n", "0.0001", "1 "])
def test_cpu_says_what_is_allowed(text: str) -> None:
    """Cores above zero, in cores or thousandths."""
    with pytest.raises(ValueError, match="cores above zero"):
        quantity.parse_cpu(text)


@pytest.mark.parametrize("text", ["", "0Mi", "1", "1M", "128", "1Ti"])
def test_memory_says_what_is_allowed(text: str) -> None:
    """A size with a binary unit: a bare number is a mistake more often than bytes."""
    with pytest.raises(ValueError, match="Ki, Mi or Gi"):
        quantity.parse_memory(text)


@given(st.integers(1, 999_999))
def test_cpu_is_written_in_the_canonical_form(millicores: int) -> None:
    """Whole cores without suffix, and back to the same amount."""
    text = quantity.cpu(millicores)

    assert quantity.parse_cpu(text) == millicores
    assert not text.endswith("000m")


@given(st.integers(1, 2**30))
def test_memory_is_written_in_the_canonical_form(kibibytes: int) -> None:
    """The largest unit without a fraction, and back to the same amount."""
    text = quantity.memory(kibibytes * 1024)

    assert quantity.parse(text) == kibibytes * 1024
    assert int(text[:-2]) % 1024 or text.endswith("Ei")
