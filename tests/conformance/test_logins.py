"""Which checks of the auth scenarios stand apart, and what has to hold instead."""

import httpx2
import pytest

from tests.conformance.authorization import introspection
from tests.conformance.logins import APART, NOT_RUN, SCENARIOS, Seen, by_reason, separate
from tests.conformance.suite import Check, worse

URL = "http://localhost:1/mcp"
METADATA = "http://localhost:1/.well-known/oauth-protected-resource/mcp"
GOOD = Seen(resource=URL, asked=(METADATA,), wanted=(URL, URL), got=3)


def a_check(name: str, occurrence: int = 1, scenario: str = "auth/metadata-default") -> Check:
    """A check."""
    return Check(scenario, name, occurrence)


@pytest.mark.parametrize("name", sorted(APART))
def test_a_check_apart_is_judged_at_the_sidecar(name: str) -> None:
    """It counts in neither run, is named with its reason, and is worse if the client did not do what it had to."""
    runs = [{a_check(name): verdict, a_check("token-request"): "SUCCESS"} for verdict in ("SUCCESS", "FAILURE")]
    idle = Seen(resource=URL, asked=(), wanted=(), got=0)

    good, bad = (separate(runs[0], runs[1], seen) for seen in (GOOD, idle))

    assert good.direct == good.through == {a_check("token-request"): "SUCCESS"}
    assert (list(good.apart), good.worse) == ([f"auth/metadata-default/{name}"], [])
    assert bad.worse == [f"auth/metadata-default/{name}: not so: {APART[name].instead}"]


@pytest.mark.parametrize(
    "seen",
    [
        Seen(
            resource=URL, asked=(METADATA, "http://localhost:1/.well-known/oauth-protected-resource"), wanted=(), got=1
        ),
        Seen(resource=URL, asked=("http://localhost:2/.well-known/oauth-protected-resource/mcp",), wanted=(), got=1),
    ],
)
def test_metadata_asked_for_elsewhere_is_worse(seen: Seen) -> None:
    """Neither the root nor another server's document is what the challenge names."""
    assert separate({a_check("prm-pathbased-requested"): "SUCCESS"}, {}, seen).worse != []


def test_a_call_that_the_sidecar_refuses_is_one_token_less() -> None:
    """Of the scenario in which it does; one more that is lost is worse, and so is one in any other scenario."""
    for scenario, lost in (("auth/scope-step-up", (1, 2)), ("auth/basic-cimd", (0, 1))):
        direct = {a_check("valid-bearer-token", number, scenario): "SUCCESS" for number in (1, 2, 3)}
        found = []
        for spare in lost:
            kept = dict(list(direct.items())[: 3 - spare])
            result = separate(direct, kept, GOOD)
            found.append(len(worse(result.direct, result.through)))
        assert found == [0, 1], scenario


def test_reasons_name_every_check() -> None:
    """Nothing stands apart silently."""
    apart = {"auth/a/x": "one", "auth/b/x": "one", "auth/b/y": "two"}

    assert by_reason(apart) == ["apart 2: one: auth/a/x, auth/b/x", "apart 1: two: auth/b/y"]


def test_every_scenario_is_run_or_says_why_not() -> None:
    """None is in both lists."""
    assert not set(NOT_RUN) & {scenario for each in SCENARIOS.values() for scenario in each}
    assert all(NOT_RUN.values())


def test_only_issued_tokens_are_active() -> None:
    """With the scopes that they were issued with, for the sidecar's URL alone."""
    with introspection(URL) as known:
        known.scopes["test-token-1"] = "mcp:basic"
        answers = [httpx2.post(known.url, data={"token": f"test-token-{number}"}).json() for number in (1, 2)]

    assert answers == [{"active": True, "sub": "tester", "aud": URL, "scope": "mcp:basic"}, {"active": False}]
