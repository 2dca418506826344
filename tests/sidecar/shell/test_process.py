"""sidecar.shell.process: a process ends when it is told to, whatever it thinks of that, and leaves nothing behind."""

import asyncio

import pytest

from sidecar.shell import process
from sidecar.shell.process import Pipe
from tests.fakes import eventually
from tests.relays import is_alive


class Listener:
    """The owner of a pipe."""

    def __init__(self) -> None:
        self.data = b""  # its first words
        self.bytes = 0
        self.ends: list[str] = []

    def heard(self, data: bytes) -> None:
        """Keep *data*, if it is not too much."""
        self.bytes += len(data)
        if len(self.data) < 2**16:
            self.data += data

    def ended(self, detail: str) -> None:
        """Keep *detail*."""
        self.ends.append(detail)

    async def pids(self) -> list[int]:
        """The numbers that it said first, on one line."""
        await eventually(lambda: b"\n" in self.data, what="its process ids")
        return [int(word) for word in self.data.split(b"\n")[0].split()]


async def shell(script: str) -> tuple[Pipe, Listener]:
    """Start *script*."""
    listener = Listener()
    async with asyncio.timeout(10):
        return await process.start(("/bin/sh", "-c", script), listener), listener


async def test_the_end_of_the_input_is_enough_for_most() -> None:
    """Its last words are heard."""
    pipe, heard = await shell("echo $$; cat; echo bye")
    (pid,) = await heard.pids()
    pipe.write(b"hello\n")
    pipe.end()
    await eventually(lambda: heard.ends, what="the end")

    assert heard.data.split(b"\n")[1:] == [b"hello", b"bye", b""]
    assert heard.ends == ["the process is gone: exit status 0"]
    assert not is_alive(pid)


async def test_a_stubborn_one_is_killed_with_its_group(monkeypatch: pytest.MonkeyPatch) -> None:
    """It ignores the end of its input and SIGTERM."""
    monkeypatch.setattr(process, "GRACE_S", 0.2)
    pipe, heard = await shell("trap '' TERM; sleep 1000 & echo $$ $!; wait; sleep 1000")
    pids = await heard.pids()
    pipe.end()
    pipe.end()
    await eventually(lambda: heard.ends, what="the end")
    await eventually(lambda: not any(is_alive(pid) for pid in pids), what="the end of the group")

    assert heard.ends == ["the process is gone: exit status -9"]


async def test_what_it_leaves_behind_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Even while that holds its output open."""
    monkeypatch.setattr(process, "DRAIN_S", 0.1)
    _, heard = await shell("sleep 1000 & echo $!; exit 5")
    (left_behind,) = await heard.pids()
    await eventually(lambda: heard.ends, what="the end")
    await eventually(lambda: not is_alive(left_behind), what="the end of what it left behind")

    assert heard.ends == ["the process is gone: exit status 5"]


async def test_one_that_closes_its_output_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing more can come of it."""
    monkeypatch.setattr(process, "GRACE_S", 0.2)
    _, heard = await shell("echo $$; exec >&-; sleep 1000")
    (pid,) = await heard.pids()
    await eventually(lambda: heard.ends, what="the end")

    assert not is_alive(pid)


async def test_writing_to_one_that_is_gone_is_no_error() -> None:
    """It may go at any moment."""
    pipe, heard = await shell("exit 0")
    await eventually(lambda: heard.ends, what="the end")
    pipe.write(b"x\n")
    pipe.hold(hold=True)
    pipe.end()

    assert pipe.unread_bytes == 0
    assert len(heard.ends) == 1


async def test_standard_error_is_logged_line_by_line(caplog: pytest.LogCaptureFixture) -> None:
    """A line beyond the bound is cut."""
    caplog.set_level("INFO")
    _, heard = await shell(
        f"echo one >&2; head -c {2 * process.MAX_LOG_LINE_BYTES} /dev/zero | tr '\\0' x >&2; echo two >&2"
    )
    await eventually(lambda: heard.ends, what="the end")
    said = [record.__dict__["stderr"] for record in caplog.records if "stderr" in record.__dict__]

    assert said[0] == "one"
    assert "x" * 100 in "".join(said)
    assert all(len(line) <= process.MAX_LOG_LINE_BYTES for line in said)


async def test_holding_stops_the_flow(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is not read stays in the pipe, and the process waits."""
    monkeypatch.setattr(process, "GRACE_S", 0.1)
    pipe, heard = await shell("echo $$; while :; do echo xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx; done")
    await heard.pids()
    pipe.hold(hold=True)
    pipe.hold(hold=True)
    before = heard.bytes
    for _ in range(100):
        await asyncio.sleep(0)
    assert heard.bytes == before
    pipe.hold(hold=False)
    await eventually(lambda: heard.bytes > before + 2**18, what="more of it")
    pipe.end()
    await eventually(lambda: heard.ends, what="the end")
