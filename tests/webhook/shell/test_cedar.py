"""webhook/shell/cedar.py: Cedar is checked in a child, whatever happens to it."""

import pytest

from webhook.core.compile import CEDAR_ENTITIES, Policies
from webhook.errors import BadPolicy
from webhook.shell import cedar

PERMIT = "permit (principal, action, resource)"


async def check(text: str) -> cedar.compiler.Compiled:
    """Return what the child found in one policy file."""
    return await cedar.compile(Policies(cedar={"a.cedar": text}))


async def test_what_is_read_comes_back() -> None:
    """The same as without a child."""
    assert (await check(PERMIT + " when { context.claims.a };")).reads == {*CEDAR_ENTITIES, "/user/claims/a"}
    assert (await check(PERMIT + " when { context == {} };")).reads is None


async def test_an_error_comes_back_with_its_place() -> None:
    """File, line and column."""
    with pytest.raises(BadPolicy, match=r"a\.cedar:2:3: unexpected token"):
        await check(PERMIT + "\n  &&;")


async def test_a_text_that_kills_the_parser_is_refused() -> None:
    """Its process dies, ours does not."""
    with pytest.raises(BadPolicy, match="the parser gave up"):
        await check(PERMIT + " when { " + "(" * 5000 + "true" + ")" * 5000 + " };")


async def test_a_check_ends_at_its_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    """A parser that does not end is killed."""
    monkeypatch.setattr(cedar, "DEADLINE_S", 0.0)

    with pytest.raises(BadPolicy, match="took longer than 0 s"):
        await check(PERMIT + ";")
