"""Checks Cedar policies in a child process: their parser is native code, and a nested enough text kills its process.

Source: measured with cedarpy 4.12, 400 to 800 nested parentheses.
"""

import asyncio
import json
import os
import sys
from typing import Any

from webhook.core import compile as compiler
from webhook.core.check import Finding
from webhook.errors import BadPolicy

DEADLINE_S = 10.0


async def compile(policies: compiler.Policies) -> compiler.Compiled:  # noqa: A001 - as Opa.compile; no call of the builtin
    """Return what the Cedar policies read; raises BadPolicy with file, line and column."""
    return compiler.cedar((await _ask(policies))["reads"])


async def check(policies: compiler.Policies) -> list[Finding]:
    """Return what is wrong with Cedar policies that parse; raises BadPolicy for those that do not."""
    return [Finding(**each) for each in (await _ask(policies, check=True))["findings"]]


async def _ask(policies: compiler.Policies, *, check: bool = False) -> Any:
    """Return the child's answer; raises BadPolicy."""
    asked = json.dumps(
        {"policies": dict(policies.cedar), "schema": policies.schema, "vocabulary": policies.vocabulary, "check": check}
    ).encode()
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        *("-m", "webhook.shell.cedar_parser"),
        env={"PYTHONPATH": os.pathsep.join(sys.path)},  # and nothing else of this process's environment
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.DEVNULL,
    )
    try:
        async with asyncio.timeout(DEADLINE_S):
            output, _ = await process.communicate(asked)
    except TimeoutError:
        raise BadPolicy("cedar", f"took longer than {DEADLINE_S:g} s to parse") from None
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    if process.returncode != 0:
        raise BadPolicy("cedar", "the parser gave up, as it does on deeply nested expressions")
    answer = json.loads(output)
    if "message" in answer:
        raise BadPolicy(answer["file"], answer["message"], line=answer["line"], column=answer["column"])
    return answer
