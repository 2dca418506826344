"""What a decision costs: both engines, 50 rules, arguments of three sizes; afresh, and remembered. `python -m bench.decisions`.

CPU time of this process, the least of some blocks less that of an empty loop: what else the machine does hardly counts.
`first` is the first question of all, for which Cedar reads entities; `elsewhere` is a caller's first about another tool,
`afresh` asks with other arguments, `again` with the same. Rules read the role, the tool and one argument, so a larger argument
that no rule reads should cost nothing more.
"""

import asyncio
import itertools
import time
from collections.abc import Callable, Iterator
from typing import Final

from sidecar.core.authorise import Agent, Engine, Question, Verdict
from sidecar.core.bundle import PROFILE, Bundle
from sidecar.core.cedar import MAX_ENTITIES, CedarEngine
from sidecar.core.engines import engines
from sidecar.core.identity import Principal
from sidecar.core.message import Message, Shape, Tool
from sidecar.core.profile import Profile, Server, decode
from sidecar.core.projection import Remembering
from sidecar.shell.snapshot import load
from tests.parts import part
from tests.sidecar.questions import a_user
from webhook.core.compile import Policies
from webhook.shell.opa import Opa, files

RULES: Final = 50
SIZES: Final = {"200 B": 8, "10 KB": 400, "100 KB": 4000}  # arguments of about 25 bytes each
BLOCKS: Final = 25
CALLS: Final = 100
SERVER: Final = Server(namespace="bench", workload="bench", name="bench", port=1)


def policies() -> tuple[Policies, Policies]:
    """Return 50 rules in Cedar, and the same in Rego."""
    cedar = "\n".join(
        f'permit (principal in Role::"role-{n}", action == Action::"tools/call", resource)'
        f' when {{ resource.name == "tool-{n}" && context.args has a0 && context.args.a0 == "x" }};'
        for n in range(RULES)
    )
    rego = "package mcp.authz\n\ndefault allow := false\n\n" + "\n".join(
        f'allow if {{\n\tinput.user.role == "role-{n}"\n\tinput.tool.name == "tool-{n}"\n\tinput.tool.args.a0 == "x"\n}}\n'
        for n in range(RULES)
    )
    return Policies(cedar={"bench.cedar": cedar}), Policies(rego={"bench.rego": rego})


def questions_of(members: int) -> Iterator[Question]:
    """Yield questions with so many arguments, each about another tool; the last rule allows the first of them."""
    arguments = {f"a{n}": "x" if n == 0 else f"value-{n:06}-xxxxx" for n in range(members)}
    principal = Principal(workload=None, user=a_user(f"role-{RULES - 1}"), expires_at_s=2e9)
    for number in itertools.count(RULES - 1):
        target = Tool(name=f"tool-{number}", arguments=arguments)
        message = Message(shape=Shape.REQUEST, method="tools/call", id=1, target=target, params={})
        yield Question(principal=principal, message=message, server=SERVER, agent=Agent(), time_ns=1)


def cost_us(engine: Engine, question: Question) -> float:
    """Return the CPU time of one decision."""
    return 1e6 * (_least_s(lambda: engine.decide(question)) - _least_s(lambda: None))


def _least_s(act: Callable[[], object]) -> float:
    blocks = []
    for _ in range(BLOCKS):
        started_s = time.process_time()
        for _ in range(CALLS):
            act()
        blocks.append((time.process_time() - started_s) / CALLS)
    return min(blocks)


class Forgetful:
    """An engine that has never been asked."""

    name = "forgetful"

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def decide(self, question: Question) -> Verdict:
        """Return the verdict."""
        if isinstance(self._engine, CedarEngine):
            self._engine.forget()
        return self._engine.decide(question)


class Moving:
    """An engine that is asked about another tool each time, of so many that it cannot keep them."""

    name = "moving"

    def __init__(self, engine: Engine, members: int) -> None:
        self._engine = engine
        self._questions = itertools.cycle(itertools.islice(questions_of(members), 2 * MAX_ENTITIES))

    def decide(self, _: Question) -> Verdict:
        """Return the verdict on the next question."""
        return self._engine.decide(next(self._questions))


def rows() -> Iterator[tuple[str, str, float, float, float, float]]:
    """Yield engine, size of the arguments, and microseconds of a decision: first, elsewhere, afresh, again."""
    for each in policies():
        bundle = bundle_of(each)
        (remembering,) = engines(bundle).enforced
        assert isinstance(remembering, Remembering)  # noqa: S101 - for the type checker: the rules are pure
        (engine,) = remembering.engines
        for size, members in SIZES.items():
            question = next(questions_of(members))
            asked = (Forgetful(engine), Moving(engine, members), engine, remembering)
            first_us, elsewhere_us, fresh_us, again_us = (cost_us(one, question) for one in asked)
            yield engine.name, size, first_us, elsewhere_us, fresh_us, again_us


def bundle_of(policies_: Policies) -> Bundle:
    """Return the compiled bundle."""
    content = asyncio.run(files([policies_], Profile(server=SERVER), Opa(part("opa"))))
    return Bundle(revision="bench", files=content, profile=decode(content[PROFILE]))


def activation_s(bundle: Bundle) -> float:
    """Return how long a sidecar takes to load *bundle*, its compiler's child included."""
    started_s = time.monotonic()
    asyncio.run(load(bundle, None))
    return time.monotonic() - started_s


def main() -> None:
    """Print the table."""
    print(f"{'engine':8} {'arguments':>10} {'first':>10} {'elsewhere':>10} {'afresh':>10} {'again':>10}")
    for engine, size, first_us, elsewhere_us, fresh_us, again_us in rows():
        print(f"{engine:8} {size:>10} {first_us:7.1f} us {elsewhere_us:7.1f} us {fresh_us:7.1f} us {again_us:7.2f} us")
    for each in policies():
        bundle = bundle_of(each)
        kind = "cedar" if each.cedar else "rego"
        print(f"activation of {RULES} rules in {kind}: {activation_s(bundle) * 1e3:.0f} ms")


if __name__ == "__main__":
    main()
