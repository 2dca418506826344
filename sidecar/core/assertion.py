"""Writes what the server may learn of its caller: the claims of the signed header `Sidegate-Identity`.

Only what was verified stands in it, but for the agent session, which is the caller's word. Short-lived, and for this server
alone: replayed elsewhere or later it proves nothing. RFC 7519; `act` as in RFC 8693, 4.1.
"""

from typing import Any, Final

from sidecar.core.authorise import Question

HEADER: Final = b"sidegate-identity"
ISSUER: Final = "sidegate"
LIFE_S: Final = 60  # the server reads it as the request arrives; clocks of one pod are one clock


def claims(question: Question, audience: str, *, now_s: float, jti: str) -> dict[str, Any] | None:
    """Return the claims about the caller of *question*; None when nobody is known."""
    user, workload = question.principal.user, question.principal.workload
    if user is None and workload is None:
        return None
    told: dict[str, Any] = {
        "iss": ISSUER,
        "aud": audience,
        "iat": int(now_s),
        "exp": int(min(now_s + LIFE_S, question.principal.expires_at_s)),
        "jti": jti,
        "sub": str(workload) if user is None else user.id,
        "agent_session": question.agent.session,
    }
    if user is not None:
        told |= {
            "idp": user.issuer,
            "email": user.email,
            "role": user.role,
            "roles": user.roles,
            "groups": user.groups,
            "act": None if workload is None else {"sub": str(workload)},
        }
    return {name: value for name, value in told.items() if value is not None}
