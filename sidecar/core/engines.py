"""Makes the engines of a bundle; loads only those that it uses, because each costs 10 to 25 MB.

Every enforced set must allow. A guard rail alone opens nothing: where no set grants, there is no engine, and without
engine nothing is allowed. Refuses a bundle whose policies do not load. Decides nothing.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from sidecar.core.authorise import Engine, Named, Shadow
from sidecar.core.bundle import DATA, WASM, Bundle
from sidecar.core.content import compiled as compiled_content
from sidecar.core.profile import PolicySet
from sidecar.core.projection import Projection, Remembering
from sidecar.errors import BundleError


@dataclass(frozen=True, slots=True, kw_only=True)
class Engines:
    """What judges: *enforced* must all allow; *shadows* are asked and not heeded."""

    enforced: tuple[Engine, ...] = ()
    shadows: tuple[Shadow, ...] = ()


def engines(bundle: Bundle, *, compiled: Mapping[str, str] | None = None) -> Engines:
    """Return the engines of *bundle*.

    *compiled* names, for a set's path, the file that `sidecar.core.rego.compile` made of its policy.wasm on this machine,
    in a child that has ended; without it the compiler's 20 MB stay in this process. Raises BundleError.
    """
    compiled_content(bundle.profile.content)  # a rule that cannot be read must not be passed over
    enforced: list[Engine] = []
    shadows: list[Shadow] = []
    for each in bundle.profile.policies:
        made = _load(bundle, each, (compiled or {}).get(each.path))
        if each.mode == "shadow":
            shadows.append(Shadow(name=each.name, engines=made))
        else:
            enforced.extend(Named(engine, each.name) if each.path else engine for engine in made)
    grants = any(
        each.grants and each.mode == "enforce" and (each.cedar or each.rego) for each in bundle.profile.policies
    )
    return Engines(enforced=tuple(enforced) if grants else (), shadows=tuple(shadows))


def _load(bundle: Bundle, policies: PolicySet, compiled: str | None) -> tuple[Engine, ...]:
    """Return the engines of one set."""
    try:
        projection = Projection(policies.reads)
    except ValueError as error:
        raise BundleError(f"sidegate.json: policies.reads: {error}") from error
    made: list[Engine] = []
    if policies.cedar:
        from sidecar.core.cedar import CedarEngine  # noqa: PLC0415 - see the module's first line

        cedar = bundle.cedar(policies.path)
        made.append(CedarEngine(cedar, projection=projection, vocabulary=policies.vocabulary))
    if policies.rego:
        from sidecar.core.rego import RegoEngine  # noqa: PLC0415 - same

        wasm, data = bundle.files[policies.path + WASM], bundle.files.get(policies.path + DATA, b"{}")
        made.append(RegoEngine(wasm, data=data, compiled=compiled, projection=projection))
    return (Remembering(made, projection),) if made and policies.pure else tuple(made)
