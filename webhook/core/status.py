"""What is said of each custom resource: whether it is accepted, whether it compiles, and how many pods enforce it.

`selecting` says which resources go into one pod's bundle; `tally` counts, for each resource, the pods it selects and
those whose sidecar says that it enforces the bundle made of the present resources; `judge` puts that into conditions.
A resource says nothing new while all of its pods are still being compiled for: the last word stays until then.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from webhook.core import resources
from webhook.core.conditions import Condition
from webhook.core.effective import is_agent
from webhook.core.reports import PodKey, Report
from webhook.errors import BadResource

Source = tuple[str, str, str]
"""Kind, namespace ("" for kinds of the cluster) and name."""


@dataclass(frozen=True, slots=True)
class Held:
    """A resource as last seen; *spec* is the reason when it cannot be read."""

    spec: Any
    generation: int = 0
    status: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class PodState:
    """What was made for a pod of the present resources: the revision of its bundle, or the problem.

    *is_profiles*: the problem lies with its profile. *notes* are for the profile's author.
    """

    sources: tuple[Source, ...]
    revision: str
    problem: str = ""
    is_profiles: bool = False
    notes: tuple[str, ...] = ()


@dataclass(slots=True)
class Tally:
    """The pods of one resource. Mutated by `tally` alone."""

    selected: int = 0
    pending: int = 0  # not compiled for yet
    holding: int = 0
    built: int = 0  # a bundle was made of it
    failing: str = ""  # pod: why no bundle could be made for it
    unusable: str = ""  # why its profile could not be used
    notes: tuple[str, ...] = ()
    refused: str = ""  # pod: why its sidecar refused the bundle
    silent: str = ""  # a pod that enforces an older bundle, or says nothing


def selecting(labels: Mapping[str, str], namespace: str, held: Iterable[tuple[Source, Held]]) -> Iterator[Source]:
    """Yield which of *held* are meant for a pod of *namespace* with *labels*; what cannot be read selects nothing."""
    for source, each in held:
        where = source[1]
        match each.spec:
            case resources.ServerProfileSpec() as spec:
                is_meant = (spec.agent is not None) is is_agent(labels)
                if where == namespace and is_meant and spec.selector.matches(dict(labels)):
                    yield source
                    yield from (
                        (resources.IDENTITY_PROVIDER.name, "", each.name)
                        for each in spec.identity.providers
                        if not is_agent(labels)
                    )
            case resources.ClusterPolicySpec() as spec:
                is_meant = not spec.namespaces or namespace in spec.namespaces
                if is_meant and not is_agent(labels) and spec.selector.matches(dict(labels)):
                    yield source
            case resources.PolicySpec() | resources.LimitSpec() as spec:
                if where == namespace and not is_agent(labels) and spec.selector.matches(dict(labels)):
                    yield source
            case _:
                continue  # a profile names its providers


def tally(
    pods: Iterable[tuple[PodKey, tuple[Source, ...]]],
    states: Mapping[PodKey, PodState],
    reports: Mapping[PodKey, Report],
    others: frozenset[PodKey] = frozenset(),
    tallies: dict[Source, Tally] | None = None,
) -> dict[Source, Tally]:
    """Return for each resource its pods: *pods* by what selects them, *states* of those that were compiled for.

    The pods of *others*, another installation's, count only if they report to us. Adds to *tallies*, if given.
    """
    tallies = {} if tallies is None else tallies
    for pod, sources in pods:
        state, report = states.get(pod), reports.get(pod)
        if report is None and pod in others:
            continue
        is_built = state is not None and not state.problem
        is_holding = is_built and state is not None and report is not None and report.revision == state.revision
        for source in dict.fromkeys(sources):
            found = tallies.get(source)
            if found is None:
                found = tallies[source] = Tally()
            found.selected += 1
            found.pending += state is None
            found.built += is_built
            found.holding += is_holding
            if state is not None and source[0] == resources.SERVER_PROFILE.name:
                found.notes = found.notes or state.notes
                found.unusable = found.unusable or (state.problem if state.is_profiles else "")
            if state is not None and not is_holding:
                _explain(found, pod, state, report)
    return tallies


def _explain(found: Tally, pod: PodKey, state: PodState, report: Report | None) -> None:
    name = "/".join(pod)
    if state.problem:
        found.failing = found.failing or f"{name}: {state.problem}"
    elif report is not None and report.error:
        found.refused = found.refused or f"{name}: {report.error}"
    else:
        found.silent = found.silent or (f"{name} has not reported" if report is None else f"{name} has an older one")


def judge(held: Held, found: Tally, problem: str | None) -> tuple[Condition, ...] | None:
    """Return the conditions of a resource, None while it is too early to say.

    *problem* says why a policy does not compile, None when that is not known; what was built did compile.
    """
    if isinstance(held.spec, BadResource):
        message = str(held.spec)
        return (
            Condition(type="Accepted", status="False", reason="Invalid", message=message),
            Condition(type="Compiled", status="False", reason="Invalid", message="it cannot be read"),
            _not_distributed("Invalid", found, "it cannot be read; the last good bundles stay"),
        )
    if found.selected and found.pending == found.selected:
        return None
    if found.built:
        problem = ""
    elif not isinstance(held.spec, resources.PolicySpec):
        problem = found.unusable
    elif _is_external(held.spec):
        problem = found.failing  # it is fetched and compiled for pods only
    if problem is None:
        return None
    accepted = Condition(
        type="Accepted",
        status="True",
        reason="Selects" if found.selected else "SelectsNoPod",
        message="; ".join(("selects injected pods" if found.selected else "selects no injected pod", *found.notes)),
    )
    if problem:
        return (
            accepted,
            Condition(type="Compiled", status="False", reason="DoesNotCompile", message=problem),
            _not_distributed("DoesNotCompile", found, "it does not compile; the last good bundles stay"),
        )
    compiled = Condition(type="Compiled", status="True", reason="Compiled", message="compiles")
    return accepted, compiled, _distributed(found)


def _distributed(found: Tally) -> Condition:
    if not found.selected:
        return Condition(type="Distributed", status="Unknown", reason="SelectsNoPod", message="selects no injected pod")
    if found.holding == found.selected:
        return Condition(
            type="Distributed", status="True", reason="AllPods", message=f"{counted(found)} pods enforce it"
        )
    if found.failing:
        return _not_distributed("BundleFails", found, f"last good bundle stays at {found.failing}")
    if found.refused:
        return _not_distributed("Refused", found, f"refused by {found.refused}")
    return _not_distributed("InProgress", found, found.silent or "bundles are being made")


def _not_distributed(reason: str, found: Tally, why: str) -> Condition:
    message = f"{counted(found)} pods enforce it: {why}"
    return Condition(type="Distributed", status="False", reason=reason, message=message)


def counted(found: Tally) -> str:
    """Return how many of the selected pods enforce it, as `2/3`."""
    return f"{found.holding}/{found.selected}"


def needs_trial(held: Mapping[Source, Held], tallies: Mapping[Source, Tally]) -> Iterable[Source]:
    """Yield the policies that no bundle proves to compile: they select no pod, or one of their pods' bundles fails."""
    for source, each in held.items():
        found = tallies.get(source, Tally())
        is_waiting = found.selected > 0 and found.pending == found.selected
        is_policy = isinstance(each.spec, resources.PolicySpec) and not _is_external(each.spec)
        if is_policy and not found.built and not is_waiting:
            yield source


def _is_external(spec: resources.PolicySpec) -> bool:
    return spec.bundle is not None and not (spec.cedar or spec.rego)
