"""Makes the engines of a bundle; loads only those that it uses, because each costs 10 to 25 MB.

Refuses a bundle whose policies do not load. Decides nothing.
"""

from sidecar.core.authorise import Engine
from sidecar.core.bundle import DATA, WASM, Bundle
from sidecar.core.projection import Projection, Remembering
from sidecar.errors import BundleError


def engines(bundle: Bundle, *, compiled: str | None = None) -> tuple[Engine, ...]:
    """Return the engines of *bundle*: all must allow; none when it holds no policies, and then nothing is allowed.

    *compiled* is a file that `sidecar.core.rego.compile` made of this bundle's policy.wasm on this machine, in a child
    that has ended; without it the compiler's 20 MB stay in this process. Raises BundleError.
    """
    policies = bundle.profile.policies
    try:
        projection = Projection(policies.reads)
    except ValueError as error:
        raise BundleError(f"sidegate.json: policies.reads: {error}") from error
    made: list[Engine] = []
    if policies.cedar:
        from sidecar.core.cedar import CedarEngine  # noqa: PLC0415 - see the module's first line

        made.append(CedarEngine(bundle.cedar(), projection=projection))
    if policies.rego:
        from sidecar.core.rego import RegoEngine  # noqa: PLC0415 - same

        data = bundle.files.get(DATA, b"{}")
        made.append(RegoEngine(bundle.files[WASM], data=data, compiled=compiled, projection=projection))
    return (Remembering(made, projection),) if made and policies.pure else tuple(made)
