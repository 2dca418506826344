"""sidecar.core.builtins.uris: what the real opa says of the same URIs."""

import json

import pytest

from sidecar.core import builtins
from sidecar.core.builtins import Unknown
from tests.sidecar.answers import Answers, is_same

URIS = [
    "https://example.com:8080/a%2Fb?q=1&r=%zz#top%20x", "http://user:p%40ss@Example.COM/", "http://a<b@example.com/", "x:y:z",
    "mailto:a@b.example", "//host/path", "///path", "/a b", "a/b:c", "a:b/c", "1a:b", ":a", "*", "", "#", "?", "#%zz", "/%zz",
    "http://[::1]:80/", "http://[::1]", "http://[::1", "http://a[::1]/", "http://[1.2.3.4]/", "http://[::ffff:1.2.3.4]:/x",
    "http://[fe80::1%25en0]/", "http://a:80:90/", "redis://a:80:90/", "http://a:b/", "http://a:/", "http://:80/", "http://é.example/é",
    "http://%C3%A9.example/", "http://exa%6dple.com/", "http://a b/", "http://a]b/", 'http://a"<>b/', "http://a{b}/", "file:///etc/passwd",
    "https://example.com/a%21b(%29)*", "https://example.com/a?b?c", "https://example.com/a?", "HTTP://X", "a+b-c.d://x", "http://a/\t",
    "http://a/b#\t", "http:///x", "http:x", "//", "http://", "http://a@b@c/", "/x;y,z=1:2@3", "http://\u0663/", "http://a:\u0663/",
]  # fmt: skip


def test_every_uri_is_read_as_opa_reads_it() -> None:
    """Its parts, or that it is none; an error is undefined."""
    calls = [f"uri.{name}({json.dumps(uri)})" for uri in URIS for name in ("parse", "is_valid")]
    answers = Answers.to(calls)

    assert [each for each in calls if not is_same(each, answers.ours[each], answers.theirs[each])] == []


@pytest.mark.parametrize("uri", ["http://a/%ff", "http://%ff/", "http://[fe80::1%25%20]/"])
def test_what_we_do_not_know_is_not_guessed(uri: str) -> None:
    """Rego's strings hold any bytes, ours do not."""
    with pytest.raises(Unknown):
        builtins.find("uri.parse")(uri)
