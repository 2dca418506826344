"""Builders for tests of content rules."""

from typing import Any

from sidecar.core.profile import ContentRule

KEY = b"AKIAABCDEFGHIJKLMNOP"


def a_rule(name: str = "secrets", **members: Any) -> ContentRule:
    """A rule; by default it masks."""
    return ContentRule(name=name, **members)
