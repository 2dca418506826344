"""Tries every target before it is timed: the right answer to the right call, and from those that enforce, refusals.

A proxy that lets everything through, or answers by itself, would give a fine figure.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from bench import requests
from bench.errors import BenchError

if TYPE_CHECKING:
    from pathlib import Path

    from bench.loader import Block, Keys, Loader
    from bench.targets import Target


class Probes:
    """Sends single requests by way of *loader*; *token* is the caller's."""

    def __init__(self, loader: Loader, directory: Path, token: str) -> None:
        self._loader = loader
        self._directory = directory
        self._token = token

    def written(self, name: str, request: bytes) -> Path:
        """Return the file that holds *request*."""
        path = self._directory / f"{name.replace(' ', '-')}.http"
        path.write_bytes(request)
        return path

    def check(self, target: Target, nobody: Keys) -> None:
        """Try *target*, and open the session that the timed calls belong to. *nobody* has no certificate.

        Raises BenchError for an answer that is not the expected one.
        """
        call = requests.bodies()["300 B"]
        opened = self._ask(target, "initialize", requests.initialize(), session=None)
        _expect(target, "initialize", opened, opened.status == 200)
        passed = self._ask(target, "call", call)
        _expect(target, "an allowed call", passed, (passed.status, passed.body) == (200, requests.ANSWER.decode()))
        if target.keys is not None:
            unknown = self._ask(target, "no-certificate", call, keys=nobody)
            _expect(target, "a call without certificate", unknown, unknown.errors > 0 or unknown.status in {400, 401})
        if target.enforces:
            denied = self._ask(target, "destructive", requests.destructive())
            _expect(target, "a forbidden call", denied, '"error"' in denied.body and "policy" in denied.body)
            anonymous = self._ask(target, "no-token", call, token=None)
            _expect(target, "a call without token", anonymous, anonymous.status == 401)

    def _ask(
        self,
        target: Target,
        name: str,
        body: bytes,
        *,
        session: str | None = requests.SESSION,
        token: str | None = "",
        keys: Keys | None = None,
    ) -> Block:
        request = requests.post(body, token=self._token if token == "" else token, session=session)
        return self._loader.once(target.port, keys or target.keys, self.written(name, request))


def _expect(target: Target, what: str, got: Block, is_expected: bool) -> None:
    if not is_expected:
        raise BenchError(f"{target.name}: {what} was answered by {got.status} {got.body[:300]!r} {got.first_error}")
