"""Requests that two readers understand differently, sent byte for byte to real servers: direct, and through the sidecar.

What a server executes leaves a line in its ledger; what the sidecar let through is in its audit. A tool that ran without
an allowed record of that very tool with those very arguments was executed unjudged: there must be none. Numbers are
compared as doubles, as JSON's readers are free to read them (RFC 8259, 6).
"""

import asyncio
import contextlib
import gzip
import json
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from tests.matrix.rig import BOTH, LEGACY, MODERN, Place

ANSWER_S: Final = 2.0  # some requests leave a server waiting for more
VERSIONS: Final = {LEGACY: "2025-11-25", MODERN: "2026-07-28"}
_META: Final = {
    LEGACY: "",
    MODERN: ',"_meta":{"io.modelcontextprotocol/protocolVersion":"2026-07-28"'
    ',"io.modelcontextprotocol/clientCapabilities":{}}',
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One request. *body* takes what the era adds to params; *headers* replace those of the same name, None drops them."""

    name: str
    body: Callable[[str], bytes]
    named: str = "drop"  # Mcp-Name: what the attacker wants to be executed
    headers: Mapping[str, Sequence[str] | None] = field(default_factory=dict)
    start: str = "POST {path} HTTP/1.1"
    path: str = "/mcp"
    wire: Callable[[bytes, bytes], bytes] | None = None  # of head and body; None: one after the other
    eras: tuple[str, ...] = BOTH
    coerced: bool = False  # a server's own schema may turn a text into a number: policies judge what was sent


@dataclass(frozen=True, slots=True, kw_only=True)
class Effect:
    """What a request led to: the tools that ran, with their arguments, and the status that came back."""

    ran: tuple[tuple[str, Mapping[str, Any]], ...]
    status: int  # 0: the connection was closed, or nothing came
    unjudged: int = 0

    @property
    def label(self) -> str:
        """A cell of the table."""
        return ", ".join(_told(*each) for each in self.ran) or f"{self.status or 'closed'}"


def _told(tool: str, arguments: Mapping[str, Any]) -> str:
    return tool if tool == "drop" else f"{tool}({', '.join(ascii(value)[:24] for value in arguments.values())})"


def a_call(params: str, *, method: str = '"tools/call"', id_: str = "7", more: str = "") -> str:
    """A request, as text."""
    return f'{{"jsonrpc":"2.0","id":{id_},"method":{method},"params":{{{params}}}{more}}}'


DROP: Final = '"name":"drop","arguments":{"table":"t"}'
MARK: Final = '"name":"mark","arguments":{"text":"good"}'


def _drop(meta: str) -> bytes:
    return a_call(DROP + meta).encode()


def _mark(meta: str) -> bytes:
    return a_call(MARK + meta).encode()


def _text(name: str, template: str, **options: Any) -> Row:
    """A row whose body is *template*, where % stands for what the era adds to params."""
    return Row(name=name, body=lambda meta: template.replace("%", meta).encode(), **options)


def _as_text(value: str) -> str:
    """A call of `mark` with *value* as its text, which is JSON."""
    return a_call(f'"name":"mark","arguments":{{"text":{value}}}%')


def rows() -> list[Row]:
    """Every request of the table."""
    return [
        *_members(),
        *_documents(),
        *_encodings(),
        *_ids(),
        *_names(),
        *_batches(),
        *_headers(),
        *_paths(),
        *_framing(),
    ]


def _members() -> Iterator[Row]:
    evil = '"name":"drop","arguments":{"table":"t"}%'
    yield _text("duplicate method", a_call(evil, method='"ping","method":"tools/call"'))
    yield _text("duplicate params", a_call(MARK + "%", more=f',"params":{{{evil}}}'))
    yield _text("duplicate name", a_call('"name":"mark",' + evil))
    yield _text("duplicate name, escaped", a_call('"name":"mark","n\\u0061me":"drop","arguments":{"table":"t"}%'))
    yield _text("duplicate name, reversed", a_call(evil + ',"name":"mark"'), named="mark")
    yield _text("duplicate arguments", a_call(MARK + ',"arguments":{"text":"evil"}%'), named="mark")
    yield _text(
        "duplicate key in arguments", a_call('"name":"mark","arguments":{"text":"good","text":"evil"}%'), named="mark"
    )
    yield _text("duplicate id", a_call(evil, id_='1,"id":7'))
    yield _text("duplicate jsonrpc", a_call(evil, more=',"jsonrpc":"2.0"'))
    for answer in ('"result":{}', '"error":{"code":1,"message":"m"}', '"result":null'):
        yield _text(f"method and {answer}", a_call(evil, more="," + answer))
    yield _text("member Method", a_call(evil).replace('"method"', '"Method"'))
    yield _text("members method and Method", a_call(evil, method='"ping","Method":"tools/call"'))
    yield _text("member Params", a_call(evil).replace('"params"', '"Params"'))
    yield _text("members params and Params", a_call(MARK + "%", more=f',"Params":{{{evil}}}'))
    yield _text("member with long s", a_call(evil).replace('"params"', '"param\u017f"'))
    yield _text("members params and its long s", a_call(MARK + "%", more=f',"param\u017f":{{{evil}}}'))
    yield _text("members name and Name", a_call(MARK + ',"Name":"drop","Arguments":{"table":"t"}%'))
    yield _text("arguments and its long s", a_call(MARK + ',"argument\u017f":{"text":"evil"}%'), named="mark")
    yield _text("text and TEXT", a_call('"name":"mark","arguments":{"text":"good","TEXT":"evil"}%'), named="mark")
    yield _text("TEXT only", a_call('"name":"mark","arguments":{"TEXT":"evil"}%'), named="mark")
    yield _text(
        "table and its Kelvin sign",
        a_call('"name":"mark","arguments":{"text":"good","te\u212at":"evil"}%'),
        named="mark",
    )
    yield _text(
        "__proto__ in the message", a_call(MARK + "%", more=f',"__proto__":{{"params":{{{evil}}}}}'), named="mark"
    )
    yield _text(
        "__proto__ instead of params",
        f'{{"jsonrpc":"2.0","id":7,"method":"tools/call","__proto__":{{"params":{{{evil}}}}}}}',
    )
    yield _text("__proto__ in params", a_call('"name":"mark","__proto__":{"arguments":{"text":"evil"}}%'), named="mark")
    yield _text("__proto__ in params, all of it", a_call(f'"__proto__":{{{DROP}}}%'))
    yield _text(
        "__proto__ in arguments", a_call('"name":"mark","arguments":{"__proto__":{"text":"evil"}}%'), named="mark"
    )
    yield _text(
        "constructor in arguments",
        a_call('"name":"mark","arguments":{"text":"good","constructor":{"prototype":{"text":"evil"}}}%'),
        named="mark",
    )


def _documents() -> Iterator[Row]:
    one, other = a_call(MARK + "%"), a_call(DROP + "%")
    yield _text("trailing garbage", other + "x")
    yield _text("trailing bracket", other + "}")
    yield _text("trailing NUL", other + "\0")
    yield _text("two documents", one + other)
    yield _text("two documents, a line each", one + "\n" + other)
    yield _text("two documents, reversed", other + one)
    yield _text("leading no-break space", "\u00a0" + other)
    yield _text("leading form feed", "\f" + other)
    yield _text("record separator", "\x1e" + other + "\n")
    yield _text("comment", other.replace('"id"', '/* */"id"'))
    yield _text("trailing comma", other[:-1] + ",}")
    yield _text("single quotes", other.replace('"', "'"))
    yield _text("raw newline in a text", _as_text('"a\nb"'), named="mark")
    yield _text("raw tab in a text", _as_text('"a\tb"'), named="mark")
    yield _text("escape \\x", _as_text('"\\x41"'), named="mark")
    yield _text("escape of NUL", _as_text('"a\\u0000b"'), named="mark")
    yield _text("lone surrogate", _as_text('"\\ud800"'), named="mark")
    yield _text("lone surrogate in the name", a_call('"name":"drop\\ud800","arguments":{"table":"t"}%'))
    yield _text("surrogates reversed", _as_text('"\\udc00\\ud800"'), named="mark")
    for number in ("NaN", "Infinity", "-Infinity", "1e400", "-0", "01", "+1", "1.", ".5", "0x10", "1_000"):
        yield _text(f"number {number}", a_call(f'"name":"add","arguments":{{"a":{number},"b":1}}%'), named="add")
    for number in ("9007199254740993", "18446744073709551616", "1.0", "1e2", "1" + "0" * 400):
        label = number if len(number) < 30 else "of 400 digits"
        yield _text(f"number {label}", a_call(f'"name":"add","arguments":{{"a":{number},"b":1}}%'), named="add")
    for depth in (100, 1_000, 100_000):
        deep = "[" * depth + "]" * depth
        yield _text(f"nested {depth} deep", a_call(f'"name":"drop","arguments":{{"table":"t","x":{deep}}}%'))
    for member in ('"jsonrpc":"1.0",', '"jsonrpc":2.0,', ""):
        yield _text(f"member {member or 'jsonrpc absent'}", other.replace('"jsonrpc":"2.0",', member))
    yield _text("without id", other.replace('"id":7,', ""))
    yield _text("params in an array", f'{{"jsonrpc":"2.0","id":7,"method":"tools/call","params":[{{{DROP}%}}]}}')
    yield _text("name in an array", a_call('"name":["drop"],"arguments":{"table":"t"}%'))
    yield _text("name in an object", a_call('"name":{"toString":"drop"},"arguments":{"table":"t"}%'))
    yield _text("arguments as text", a_call('"name":"drop","arguments":"{\\"table\\":\\"t\\"}"%'))
    yield _text("text in an array", _as_text('["evil"]'), named="mark")
    yield _text("text as a number", _as_text("7"), named="mark")
    yield _text("number as a text", a_call('"name":"add","arguments":{"a":"1","b":"2"}%'), named="add", coerced=True)
    yield _text("number as a boolean", a_call('"name":"add","arguments":{"a":true,"b":2}%'), named="add", coerced=True)
    yield _text("method escaped", a_call(DROP + "%", method='"tools\\/call"'))
    yield _text("method with a space", a_call(DROP + "%", method='"tools/call "'))
    yield _text("method in capitals", a_call(DROP + "%", method='"Tools/Call"'))


def _encodings() -> Iterator[Row]:
    for encoding in ("utf-16", "utf-16-be", "utf-16-le", "utf-32", "utf-8-sig"):
        yield Row(name=f"body in {encoding}", body=lambda meta, to=encoding: _drop(meta).decode().encode(to))
    for label, octets in (("0xff", b"\xff"), ("overlong", b"\xc1\xa4rop"), ("surrogate", b"\xed\xa0\x80")):
        yield Row(
            name=f"invalid UTF-8, {label}",
            body=lambda meta, has=octets: _mark(meta).replace(b"good", has),
            named="mark",
        )
    yield Row(name="invalid UTF-8 in the name", body=lambda meta: _drop(meta).replace(b'"drop"', b'"drop\xff"'))
    json_as = "application/json; charset="
    for charset in ("utf-16", "utf-16le"):
        yield Row(
            name=f"charset {charset}",
            body=lambda meta: _drop(meta).decode().encode("utf-16-le"),
            headers={"content-type": (json_as + charset,)},
        )
    yield Row(
        name="charset utf-7",
        body=lambda meta: _mark(meta).replace(b"mark", b"+AGQAcgBvAHA-").replace(b"text", b"table"),
        headers={"content-type": (json_as + "utf-7",)},
    )
    yield Row(
        name="charset ISO-8859-1",
        body=lambda meta: _mark(meta).replace(b"good", b"\xc3\xa9"),
        named="mark",
        headers={"content-type": (json_as + "iso-8859-1",)},
    )
    yield Row(name="charset quoted", body=_drop, headers={"content-type": (json_as + '"utf-8"',)})
    for kind in ("text/plain", "application/jsonx", "application/vnd.api+json", "Application/JSON ; x=y", ""):
        yield Row(name=f"type {kind or 'empty'}", body=_drop, headers={"content-type": (kind,)})
    yield Row(name="type absent", body=_drop, headers={"content-type": None})
    yield Row(name="type twice", body=_drop, headers={"content-type": ("text/plain", "application/json")})
    for coding, squeeze in (("gzip", gzip.compress), ("deflate", zlib.compress)):
        yield Row(
            name=f"body in {coding}",
            body=lambda meta, by=squeeze: by(_drop(meta)),
            headers={"content-encoding": (coding,)},
        )
    yield Row(
        name="body in GZIP", body=lambda meta: gzip.compress(_drop(meta)), headers={"content-encoding": ("GZIP",)}
    )
    yield Row(
        name="coding twice",
        body=lambda meta: gzip.compress(_drop(meta)),
        headers={"content-encoding": ("identity", "gzip")},
    )
    yield Row(
        name="coding in Transfer-Encoding",
        body=lambda meta: gzip.compress(_drop(meta)),
        headers={"transfer-encoding": ("gzip, chunked",)},
        wire=lambda head, body: head + b"%x\r\n%b\r\n0\r\n\r\n" % (len(body), body),
    )


def _ids() -> Iterator[Row]:
    ids = ("null", "1.5", "1.0", "1e2", "{}", "[]", "[7]", "true", "-1", '""', str(2**53 + 1), str(2**63), str(2**64))
    for id_ in ids:
        yield _text(f"id {id_}", a_call(DROP + "%", id_=id_))
    yield _text("id of 100 kB", a_call(DROP + "%", id_='"' + "x" * 100_000 + '"'))
    yield _text("id with NUL", a_call(DROP + "%", id_='"\\u0000"'))


def _names() -> Iterator[Row]:
    # Latin-1 at most in Mcp-Name, or the sentinel; the servers of the older era do not read it.
    for label, name in (
        ("with a space behind", "drop "), ("with a space before", " drop"), ("mark with a space", "mark "),
        ("in capitals", "DROP"), ("with NUL", "drop\\u0000"), ("with a zero-width space", "drop\\u200b"),
        ("fullwidth", "\\uff44rop"), ("escaped", "dro\\u0070"), ("with a combining mark", "dr\\u006f\\u0308p"),
        ("mark with the Kelvin sign", "mar\\u212a"), ("prototype", "__proto__"), ("constructor", "constructor"),
        ("toString", "toString"), ("empty", ""),
    ):  # fmt: skip
        given = (
            '{"text":"t"}' if name.startswith("mar") else '{"table":"t"}'
        )  # some servers refuse what they do not know
        yield _text(f"name {label}", a_call(f'"name":"{name}","arguments":{given}%'), eras=(LEGACY,))


def _batches() -> Iterator[Row]:
    one, other = a_call(MARK + "%", id_="6"), a_call(DROP + "%")
    for version in (None, "2024-11-05", "2025-03-26", "2025-06-18", "2025-11-25", "1999-01-01"):
        headers: dict[str, Sequence[str] | None] = {"mcp-protocol-version": None if version is None else (version,)}
        label = version or "no version"
        yield _text(f"batch of one, {label}", f"[{other}]", headers=headers, eras=(LEGACY,))
        yield _text(f"batch of two, {label}", f"[{one},{other}]", headers=headers, eras=(LEGACY,))
        yield _text(
            f"batch of two allowed, {label}", f"[{one},{one.replace(':6,', ':7,')}]", headers=headers, eras=(LEGACY,)
        )
        yield _text(f"batch in a batch, {label}", f"[[{other}]]", headers=headers, eras=(LEGACY,))
    yield _text("batch", f"[{other}]", eras=(MODERN,))
    yield _text(
        "batch with initialize", f"[{a_call('', method=chr(34) + 'initialize' + chr(34))},{other}]", eras=(LEGACY,)
    )
    yield _text("batch of nothing and a document", f"[]{other}", eras=(LEGACY,))


def _headers() -> Iterator[Row]:
    for name, good, evil in (("mcp-name", "mark", "drop"), ("mcp-method", "tools/list", "tools/call")):
        for values in ((good, evil), (evil, good)):
            yield Row(name=f"{name} twice, {values[0]} first", body=_drop, headers={name: values})
        yield Row(name=f"{name} joined by comma", body=_drop, headers={name: (f"{good}, {evil}",)})
        yield Row(name=f"{name} of another", body=_drop, headers={name: (good,)})
        yield Row(name=f"{name} absent", body=_drop, headers={name: None}, eras=(MODERN,))
        yield Row(name=f"{name} in capitals", body=_drop, headers={name: (evil.upper(),)}, eras=(MODERN,))
    yield Row(name="mcp-name drop, body mark", body=_mark, headers={"mcp-name": ("drop",)})
    yield Row(name="sentinel", body=_drop, headers={"mcp-name": ("=?base64?ZHJvcA==?=",)})
    yield Row(name="sentinel of another", body=_drop, headers={"mcp-name": ("=?base64?bWFyaw==?=",)})
    yield Row(name="sentinel without padding", body=_drop, headers={"mcp-name": ("=?base64?ZHJvcA?=",)})
    yield Row(name="sentinel with stray bits", body=_mark, headers={"mcp-name": ("=?base64?bWFyax==?=",)})
    yield Row(name="sentinel in capitals", body=_drop, headers={"mcp-name": ("=?BASE64?ZHJvcA==?=",)})
    yield _text("sentinel as the name", a_call('"name":"=?base64?ZHJvcA==?=","arguments":{"table":"t"}%'), named="drop")
    yield Row(name="mcp-name with white space", body=_mark, headers={"mcp-name": (" \t mark  ",)})
    yield Row(name="session twice", body=_drop, headers={"mcp-session-id": ("{session}", "other")}, eras=(LEGACY,))
    yield Row(name="session of nobody", body=_drop, headers={"mcp-session-id": ("0" * 32,)}, eras=(LEGACY,))
    yield Row(name="session absent", body=_drop, headers={"mcp-session-id": None}, eras=(LEGACY,))
    yield Row(
        name="session with underscores",
        body=_drop,
        headers={"mcp-session-id": None, "mcp_session_id": ("{session}",)},
        eras=(LEGACY,),
    )
    legacy, modern = VERSIONS[LEGACY], VERSIONS[MODERN]
    for label, body in (("drop", _drop), ("mark", _mark)):
        yield Row(
            name=f"header modern, body legacy: {label}",
            body=body,
            named=label,
            headers={"mcp-protocol-version": (modern,)},
            eras=(LEGACY,),
        )
        yield Row(
            name=f"header legacy, body modern: {label}",
            body=body,
            named=label,
            headers={"mcp-protocol-version": (legacy,)},
            eras=(MODERN,),
        )
    for label, version in (("header legacy", (legacy,)), ("no header", None)):
        yield Row(
            name=f"{label}, a session, body modern",
            body=lambda _: _drop(_META[MODERN]),
            headers={"mcp-protocol-version": version},
            eras=(LEGACY,),
        )
    yield Row(name="version absent", body=_drop, headers={"mcp-protocol-version": None})
    yield Row(name="version unknown", body=_drop, headers={"mcp-protocol-version": ("2027-01-01",)})
    yield Row(name="version twice", body=_drop, headers={"mcp-protocol-version": (legacy, modern)})
    yield Row(name="version twice, reversed", body=_drop, headers={"mcp-protocol-version": (modern, legacy)})
    yield Row(name="Accept anything", body=_drop, headers={"accept": ("*/*",)})
    yield Row(name="Accept absent", body=_drop, headers={"accept": None})
    yield Row(name="Host of elsewhere", body=_drop, headers={"host": ("evil.test",)})
    yield Row(name="Host twice", body=_drop, headers={"host": ("127.0.0.1:{port}", "evil.test")})
    yield Row(name="Origin of elsewhere", body=_drop, headers={"origin": ("https://evil.test",)})
    yield Row(name="Origin null", body=_drop, headers={"origin": ("null",)})
    yield Row(
        name="Connection names Mcp headers",
        body=_drop,
        headers={"connection": ("close, mcp-name, mcp-method, mcp-protocol-version, content-type",)},
    )
    yield Row(
        name="method override", body=_drop, start="GET {path} HTTP/1.1", headers={"x-http-method-override": ("POST",)}
    )


def _paths() -> Iterator[Row]:
    for path in (
        "/mcp/", "//mcp", "/mcp/..;/mcp", "/x/../mcp", "/./mcp", "/%6dcp", "/mcp%2f", "/mcp%00", "/MCP", "/mcp;a=b",
        "/mcp?x=/mcp", "/mcp#x", "/mcp/../mcp", "\\mcp", "/mcp%20", "mcp", "*", "/", "/sse", "/messages/",
        "http://127.0.0.1:{port}/mcp", "http://evil.test/mcp",
    ):  # fmt: skip
        yield Row(name=f"path {path}", body=_drop, path=path)
    for start in (
        "PUT {path} HTTP/1.1", "PATCH {path} HTTP/1.1", "GET {path} HTTP/1.1", "post {path} HTTP/1.1",
        "POST {path} HTTP/1.0", "POST {path} HTTP/0.9", "POST {path} HTTP/2.0", "POST {path}", "POST  {path} HTTP/1.1",
        "POST\t{path}\tHTTP/1.1",
    ):  # fmt: skip
        yield Row(name=f"start {start.format(path='/mcp')!r}", body=_drop, start=start)


def _framing() -> Iterator[Row]:
    def raw(name: str, wire: Callable[[bytes, bytes], bytes], **headers: Sequence[str] | None) -> Row:
        return Row(
            name=name, body=_drop, wire=wire, headers={key.replace("_", "-"): value for key, value in headers.items()}
        )

    def plain(head: bytes, body: bytes) -> bytes:
        return head + body

    def instead(name: str, old: bytes, new: bytes) -> Row:
        """A row whose head has *new* where *old* was; LENGTH stands for the length of the body."""
        return raw(name, lambda head, body: head.replace(*(_measured(text, body) for text in (old, new))) + body)

    def chunked(
        name: str, *, size: bytes | None = None, end: bytes = b"0\r\n\r\n", **headers: Sequence[str] | None
    ) -> Row:
        """A row in one chunk; SIZE stands for its size."""
        return raw(
            name,
            lambda head, body: head + _chunk(body, size, end),
            **({"transfer_encoding": ("chunked",)} | headers),
        )

    def hidden(name: str, header: bytes) -> Row:
        return raw(name, lambda head, body: _hidden(head, body, header, b"0\r\n\r\n"))

    accept, length = b"accept: ", b"content-length: LENGTH"
    yield instead("obs-fold in Mcp-Name", accept, b"mcp-name: mark\r\n drop\r\naccept: ")
    yield instead("obs-fold in Content-Type", b"application/json\r", b"application/json;\r\n x=y\r")
    yield instead("space before the colon", b"content-length:", b"content-length :")
    yield instead("bare LF", b"\r\n", b"\n")
    yield instead("bare CR in a header", accept, b"x: a\rmcp-name: mark\r\naccept: ")
    yield instead("NUL in a header", accept, b"x: a\0b\r\naccept: ")
    yield instead("header without a name", accept, b": x\r\naccept: ")
    yield instead("length twice, equal", length, length + b"\r\n" + length)
    yield instead("length twice, shorter", length, length + b"\r\ncontent-length: 5")
    yield instead("length with plus", length, b"content-length: +LENGTH")
    yield instead("length in a list", length, b"content-length: LENGTH, LENGTH")
    yield raw("length zero", plain, content_length=("0",))
    yield raw("length absent", plain, content_length=None)
    yield raw("length negative", plain, content_length=("-1",))
    yield chunked("chunked")
    yield chunked("chunked and length", content_length=("5",))
    yield chunked("chunked twice", transfer_encoding=("chunked", "chunked"))
    yield chunked("chunked, identity", transfer_encoding=("chunked, identity",))
    yield chunked("xchunked", transfer_encoding=("xchunked",))
    yield chunked("chunked after a tab", transfer_encoding=("\tchunked",))
    yield chunked("chunked in capitals", transfer_encoding=("CHUNKED",))
    yield chunked("chunk with extension", size=b"SIZE;a=b")
    yield chunked("chunk size 0x", size=b"0xSIZE")
    yield chunked("chunk size beyond 64 bits", size=b"10000000000000000SIZE")
    yield raw(
        "chunk ends in LF",
        lambda head, body: head + _chunk(body).replace(b"\r\n", b"\n"),
        transfer_encoding=("chunked",),
    )
    yield chunked("trailer renames", end=b"0\r\nmcp-name: mark\r\n\r\n", trailer=("mcp-name",))
    yield raw("Expect", plain, expect=("100-continue",))
    yield raw("Upgrade to h2c", plain, upgrade=("h2c",), connection=("upgrade, http2-settings",), http2_settings=("",))
    # One connection, two requests: the second is hidden from whoever measures the first differently.
    yield hidden("hidden by a length", b"transfer-encoding: chunked\r\n")
    yield hidden("hidden by a tab", b"transfer-encoding:\tchunked\r\n")
    yield hidden("hidden by x", b"transfer-encoding: x\r\ntransfer-encoding: chunked\r\n")
    yield raw("pipelined", lambda head, body: _kept_open(head) + body + head + body)


def _measured(text: bytes, body: bytes) -> bytes:
    return text.replace(b"LENGTH", b"%d" % len(body))


def _chunk(body: bytes, size: bytes | None = None, end: bytes = b"0\r\n\r\n") -> bytes:
    return (size or b"SIZE").replace(b"SIZE", b"%x" % len(body)) + b"\r\n" + body + b"\r\n" + end


def _kept_open(head: bytes) -> bytes:
    return head.replace(b"connection: close", b"connection: keep-alive")


def _hidden(head: bytes, body: bytes, header: bytes, end: bytes) -> bytes:
    """A request whose content is another one, for those who go by its length; the other way round for the others."""
    inner = head + body
    outer = _kept_open(head).replace(
        b"content-length: %d" % len(body), header + b"content-length: %d" % (len(end) + len(inner))
    )
    return outer + end + inner


def compose(row: Row, era: str, port: int, session: str) -> bytes:
    """The request as it goes over the wire."""
    body = row.body(_META[era])
    headers: dict[str, Sequence[str] | None] = {
        "host": (f"127.0.0.1:{port}",),
        "content-type": ("application/json",),
        "accept": ("application/json, text/event-stream",),
        "connection": ("close",),
        "mcp-protocol-version": (VERSIONS[era],),
        **({"mcp-session-id": (session,) if session else None} if era == LEGACY else {}),
        **({"mcp-method": ("tools/call",), "mcp-name": (row.named,)} if era == MODERN else {}),
        "content-length": None if "transfer-encoding" in row.headers else (str(len(body)),),
        **row.headers,
    }
    start = row.start.format(path=row.path.replace("{port}", str(port)))
    lines = [
        f"{name}: {value.replace('{session}', session).replace('{port}', str(port))}"
        for name, values in headers.items()
        for value in values or ()
    ]
    head = "\r\n".join([start, *lines, "", ""]).encode("latin-1")
    return head + body if row.wire is None else row.wire(head, body)


class Caller:
    """Sends raw requests to one place, over a connection each, in sessions where the era has them."""

    def __init__(self, place: Place, era: str) -> None:
        self.place, self.era, self.session = place, era, ""
        self.settled = 0

    async def send(self, request: bytes) -> tuple[int, bytes]:
        """Return status and all that came back, head included."""
        said = b""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.place.port)
        try:
            with contextlib.suppress(ConnectionError, TimeoutError):
                async with asyncio.timeout(ANSWER_S):
                    writer.write(request)
                    await writer.drain()
                    while not _whole(said) and (chunk := await reader.read(65536)):
                        said += chunk
        finally:
            writer.close()
            with contextlib.suppress(ConnectionError, TimeoutError):
                async with asyncio.timeout(1):
                    await writer.wait_closed()
        status = said[9:12]
        return int(status) if said.startswith(b"HTTP/1.") and status.isdigit() else 0, said

    async def open(self) -> None:
        """Begin a session, where there are any."""
        if self.era == MODERN:
            return
        params = '"protocolVersion":"2025-11-25","capabilities":{},"clientInfo":{"name":"raw","version":"1"}'
        opening = Row(name="", body=lambda _: a_call(params, method='"initialize"').encode())
        self.session = ""
        status, said = await self.send(compose(opening, LEGACY, self.place.port, ""))
        assert status == 200, said[:500]
        for line in said.partition(b"\r\n\r\n")[0].split(b"\r\n"):
            name, _, value = line.partition(b":")
            if name.lower() == b"mcp-session-id":
                self.session = value.strip().decode()
        done = Row(name="", body=lambda _: b'{"jsonrpc":"2.0","method":"notifications/initialized"}')
        await self.send(compose(done, LEGACY, self.place.port, self.session))

    async def settle(self) -> str:
        """Make a good call, by which everything before it is over; returns the text it leaves. Raises AssertionError."""
        self.settled += 1
        text = f"settled {self.settled}"
        row = Row(name="", body=lambda meta: _mark(meta).replace(b"good", text.encode()), named="mark")
        status, said = 0, b""
        for _ in range(2):
            status, said = await self.send(compose(row, self.era, self.place.port, self.session))
            if status == 200 and b"marked" in said:
                return text
            await self.open()  # the row may have cost its own session, and nobody else's
        raise AssertionError(f"no longer serves: {status} {said[:500]!r}")

    async def effect(self, row: Row, server: Place, audit: Place | None) -> Effect:
        """Send *row* and return what it led to; *audit* is the sidecar's, when one is in between."""
        await self.open()
        before, judged_before = server.size_bytes(), audit.size_bytes() if audit else 0
        status, _ = await self.send(compose(row, self.era, self.place.port, self.session))
        last = await self.settle()
        ran = await _until(server, before, lambda line: line["arguments"].get("text") == last)
        calls = [(line["tool"], line["arguments"]) for line in ran]
        if audit is None:
            return Effect(ran=tuple(calls), status=status)
        records = await _until(audit, judged_before, lambda line: _argument(line, "text") == last)
        allowed = [
            ((line["message"] or {}).get("tool"), (line["arguments"] or {}).get("content"))
            for line in records
            if line["decision"]["outcome"] == "allowed"
        ]
        return Effect(ran=tuple(calls), status=status, unjudged=_unjudged(calls, allowed, coerced=row.coerced))


def _whole(said: bytes) -> bool:
    """Tell whether the first response is there to its end; not every server closes the connection when told to."""
    head, end, body = said.partition(b"\r\n\r\n")
    if not end or head.startswith(b"HTTP/1.1 100"):
        return False
    fields = dict(line.lower().split(b": ", 1) for line in head.split(b"\r\n")[1:] if b": " in line)
    if b"chunked" in fields.get(b"transfer-encoding", b""):
        return body.endswith(b"0\r\n\r\n")
    length = fields.get(b"content-length", b"")
    return length.isdigit() and len(body) >= int(length)


def _argument(line: Mapping[str, Any], name: str) -> Any:
    content = (line["arguments"] or {}).get("content")
    return content.get(name) if isinstance(content, dict) else None


async def _until(place: Place, start_bytes: int, last: Callable[[Mapping[str, Any]], bool]) -> list[dict[str, Any]]:
    """Return the lines from *start_bytes* to the one before *last*, which is waited for."""
    async with asyncio.timeout(10):
        while True:
            lines = place.lines(start_bytes)
            for index, line in enumerate(lines):
                if last(line):
                    return lines[:index]
            await asyncio.sleep(0.01)


def _unjudged(ran: list[tuple[str, Any]], allowed: list[tuple[Any, Any]], *, coerced: bool = False) -> int:
    """Count the calls that ran without a record of their own which allowed just that."""
    left, count = list(allowed), 0
    for tool, arguments in ran:
        match = next((each for each in left if each[0] == tool and _within(arguments, each[1], coerced=coerced)), None)
        if match is None:
            count += 1
        else:
            left.remove(match)
    return count


def _within(given: Mapping[str, Any], judged: Any, *, coerced: bool) -> bool:
    """Tell whether a tool got nothing but what was judged; what it ignored does not matter."""
    alike = _as_number if coerced else _plain
    return isinstance(judged, dict) and all(
        name in judged and alike(judged[name]) == alike(value) for name, value in given.items()
    )


def _as_number(value: Any) -> Any:
    """Return what pydantic makes of a text or a boolean where a number is wanted."""
    return float(value)


def _plain(value: Any) -> Any:
    """Return *value* with numbers as doubles, so that true is not 1."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        try:
            return ("number", float(value))
        except OverflowError:
            return ("number", str(value))
    return json.dumps(value, sort_keys=True)
