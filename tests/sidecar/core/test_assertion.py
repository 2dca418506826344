"""sidecar.core.assertion: the server learns what was verified, and for how long."""

from dataclasses import replace

from sidecar.core.assertion import LIFE_S, claims
from tests.builders import AGENT, NOW_S, a_principal, a_question


def test_a_user_and_the_workload_that_acts_are_named() -> None:
    """With the claims that policies see, and for this server alone."""
    told = claims(a_question(session="s"), "https://mcp.test/mcp", now_s=NOW_S, jti="j")

    assert told == {
        "iss": "sidegate",
        "aud": "https://mcp.test/mcp",
        "iat": int(NOW_S),
        "exp": int(NOW_S) + LIFE_S,
        "jti": "j",
        "sub": "alice",
        "idp": "https://id.test",
        "role": "analyst",
        "roles": ("analyst",),
        "groups": (),
        "act": {"sub": str(AGENT)},
        "agent_session": "s",
    }


def test_a_workload_alone_is_the_subject() -> None:
    """Nobody else acts."""
    told = claims(a_question(principal=a_principal(None)), "a", now_s=NOW_S, jti="j")

    assert told is not None
    assert told["sub"] == str(AGENT)
    assert not {"act", "roles", "idp"} & set(told)


def test_nobody_gets_no_header() -> None:
    """Where the profile lets anybody call."""
    assert claims(a_question(principal=a_principal(None, workload=None)), "a", now_s=NOW_S, jti="j") is None


def test_it_ends_with_the_identity_that_it_tells_of() -> None:
    """Not a second later."""
    ending = replace(a_principal(), expires_at_s=NOW_S + 5)
    told = claims(a_question(principal=ending), "a", now_s=NOW_S, jti="j")

    assert told is not None
    assert told["exp"] == int(NOW_S) + 5
