"""Give the containers of governed servers the bounds of CPU and memory that they lack, or refuse them without.

A server without bounds can starve the sidecar beside it, and the node. What a container says itself is never changed;
a request that is missing comes with its limit, for the API server would make it as large as the limit. Pods with
resources of their own as a whole (KEP-2837) are bounded by these.
"""

from webhook.core import quantity
from webhook.core.container import Amounts, Template
from webhook.core.pod import JSON, Container, Pod
from webhook.errors import Denial, DenyCode


def bounded(raw: JSON, bare: Pod, template: Template) -> JSON:
    """Return the pod *raw*, of which *bare* is the view, with every container bounded. Raises Denial."""
    if template.server_limits == "off" or bare.spec.resources is not None:
        return raw
    containers = list(raw["spec"]["containers"])
    for index, view in enumerate(bare.spec.containers):
        missing = [name for name in ("cpu", "memory") if name not in _limits(view)]
        if missing and template.server_limits == "require":
            raise Denial(
                DenyCode.LIMITS_MISSING,
                f"container {view.name}: resources.limits must name {' and '.join(missing)}: this cluster requires them of servers",
            )
        if missing:
            containers[index] = _with(containers[index], view, missing, template.server_amounts)
    if containers == raw["spec"]["containers"]:
        return raw
    return raw | {"spec": raw["spec"] | {"containers": containers}}


def _limits(view: Container) -> dict[str, str | int | float]:
    return (view.resources and view.resources.limits) or {}


def _with(each: JSON, view: Container, missing: list[str], amounts: Amounts) -> JSON:
    resources = dict(each.get("resources") or {})
    requests, limits = dict(resources.get("requests") or {}), dict(resources.get("limits") or {})
    ours = amounts.rendered(guaranteed=False)
    for name in missing:
        asked = ((view.resources and view.resources.requests) or {}).get(name)
        wanted, default = quantity.parse(asked), quantity.parse(ours["limits"][name])
        # A limit below the request would be refused.
        limits[name] = asked if wanted and default and wanted > default else ours["limits"][name]
        requests.setdefault(name, ours["requests"][name])
    return each | {"resources": resources | {"requests": requests, "limits": limits}}
