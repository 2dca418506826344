"""A mutating fuzzer: keeps what led to a new outcome, and mutates that further; sans I/O but for the clock.

A target takes bytes and returns in a word what came of them; an exception is a finding, and so is taking longer than
MAX_S. Findings are made smaller before they are told. What an outcome is stands in for coverage, which cannot be had
cheaply from every Python that is supported here.
"""

import random
import time
import traceback
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Final

MAX_BYTES: Final = 20_000  # of an input, but for seeds
MAX_S: Final = 1.0  # of one input: the least machine reads a message of that size in a hundredth
MAX_KEPT: Final = 2_000  # inputs that are mutated further
SHRINKS: Final = 2_000  # attempts to make a finding smaller

# What JSON, HTTP, SSE, JWT and tar are made of, and where readers of them differ.
WORDS: Final = (
    b"{", b"}", b"[", b"]", b'"', b":", b",", b"\\", b"\\u0061", b"\\ud800", b"\\udc00", b"\\u0000", b"null", b"true",
    b"NaN", b"-0", b"1e400", b"1.0", b"9007199254740993", b"18446744073709551616", b"\xef\xbb\xbf", b"\xff\xfe",
    b"\xff", b"\xc0\xaf", b"\xed\xa0\x80", b"\xe2\x80\xa8", b"\xc5\xbf", b"\xe2\x84\xaa", b"\x00", b"\r", b"\n",
    b"\r\n", b"\r\n\r\n", b"\n\n", b" ", b"\t", b"\x0b", b"\x85", b"data:", b"data: ", b"event: ", b"id: ", b"retry: ",
    b'"jsonrpc":"2.0"', b'"id":1', b'"id":null', b'"method":"tools/call"', b'"params":{}', b'"name":"a"', b'"result":{}',
    b'"error":{}', b'"_meta":{}', b'"__proto__":{}', b'"Method":"x"', b"io.modelcontextprotocol/protocolVersion",
    b"2026-07-28", b"2025-03-26", b"Content-Length: 5\r\n", b"Transfer-Encoding: chunked\r\n", b"Mcp-Name: a\r\n",
    b"=?base64?YQ==?=", b"Host: x\r\n", b"POST /mcp HTTP/1.1\r\n", b"0\r\n\r\n", b"eyJ", b".", b"==", b"../", b"a" * 300,
    b"[" * 70, b'{"a":' * 70, b"[" * 1200, b'{"a":' * 1200,
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """Something that reads bytes from elsewhere. *run* returns an outcome; it raises on whatever must not happen."""

    name: str
    run: Callable[[bytes], str]
    seeds: Sequence[bytes]


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """An input that led to what must not happen."""

    target: str
    data: bytes
    why: str


@dataclass(slots=True, kw_only=True)
class Session:
    """How far the fuzzing of one target is."""

    target: Target
    source: random.Random
    kept: list[bytes] = field(default_factory=list)
    outcomes: Counter[str] = field(default_factory=Counter)
    findings: dict[str, Finding] = field(default_factory=dict)  # by the place in the code
    inputs: int = 0

    def begin(self) -> None:
        """Run the seeds."""
        for seed in self.target.seeds:
            self._try(seed)
        if not self.kept:
            self.kept.append(b"")

    def work(self, until_s: float, inputs: int | None = None) -> None:
        """Mutate until the monotonic clock shows *until_s*, or that many *inputs* were run."""
        last = None if inputs is None else self.inputs + inputs
        while time.monotonic() < until_s and (last is None or self.inputs < last):
            self._try(self._mutated())

    def _try(self, data: bytes) -> None:
        self.inputs += 1
        outcome, finding = attempt(self.target, data)
        if finding is not None:
            if outcome not in self.findings:
                self.findings[outcome] = shrunk(self.target, finding, outcome)
            return
        if outcome not in self.outcomes and len(self.kept) < MAX_KEPT:
            self.kept.append(data)
        self.outcomes[outcome] += 1

    def _mutated(self) -> bytes:
        source = self.source
        data = bytearray(source.choice(self.kept))
        for _ in range(1 << source.randrange(4)):
            self._mutate(data)
        return bytes(data[:MAX_BYTES])

    def _mutate(self, data: bytearray) -> None:
        source = self.source
        at = source.randrange(len(data) + 1)
        until = min(len(data), at + source.choice((1, 1, 2, 4, 16, 64, 256)))
        match source.randrange(7):
            case 0:
                data[at:until] = b""
            case 1:
                data[at:at] = source.choice(WORDS)
            case 2:
                data[at:until] = source.choice(WORDS)
            case 3:
                data[at:at] = data[at:until]
            case 4 if data:
                data[at % len(data)] ^= 1 << source.randrange(8)
            case 5:
                other = source.choice(self.kept)
                start = source.randrange(len(other) + 1)
                data[at:until] = other[start : start + source.choice((4, 16, 64, 256))]
            case _ if data:
                data[at % len(data)] = source.randrange(256)


def attempt(target: Target, data: bytes) -> tuple[str, Finding | None]:
    """Return what came of *data*: the outcome, or the place of the finding and the finding."""
    started_s = time.perf_counter()  # the processor's own time costs more to ask than most inputs take
    try:
        outcome = target.run(data)
    except Exception as error:  # noqa: BLE001 - whatever it is, it must not be
        place = traceback.extract_tb(error.__traceback__)[-1]
        where = f"{type(error).__name__} at {place.filename.rpartition('/')[2]}:{place.lineno}"
        why = "".join(traceback.format_exception(error)[-4:])
        return where, Finding(target=target.name, data=data, why=why)
    took_s = time.perf_counter() - started_s
    if took_s > MAX_S and _takes(target, data) > MAX_S:
        return "slow", Finding(target=target.name, data=data, why=f"took {took_s:.1f} s for {len(data)} bytes")
    return outcome, None


def _takes(target: Target, data: bytes) -> float:
    """Return the processor's seconds of a second attempt: the first may have been the machine's fault."""
    started_s = time.process_time()
    target.run(data)
    return time.process_time() - started_s


def shrunk(target: Target, finding: Finding, where: str) -> Finding:
    """Return the finding with pieces of its input taken away, as long as it stays the same one."""
    size, attempts = len(finding.data) // 2, 0
    while size and attempts < SHRINKS:
        at = 0
        while at < len(finding.data) and attempts < SHRINKS:
            attempts += 1
            smaller = finding.data[:at] + finding.data[at + size :]
            place, found = attempt(target, smaller)
            if found is not None and place == where:
                finding = found
            else:
                at += size
        size //= 2
    return finding
