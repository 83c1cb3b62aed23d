"""A budget's short form is read back to the same budget."""

from hypothesis import given
from hypothesis import strategies as st

from kvpress.slots import parse_budget
from kvpress.slots.budget import Bytes, Fraction, Tokens

budgets = st.one_of(
    st.integers(1, 10_000).map(lambda n: Fraction(value=n / 10_000)),
    st.integers(1, 2**31).map(lambda n: Tokens(value=n)),
    st.integers(1, 10**12).map(lambda n: Bytes(value=n)),
)


@given(budgets)
def test_short_form_round_trip(budget):
    assert parse_budget(budget.short) == budget
