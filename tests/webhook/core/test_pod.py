"""What is read of a pod."""

from typing import Any

import pytest

from webhook.core import pod as pods
from webhook.core.pod import Workload
from webhook.errors import Denial, DenyCode


def a_pod(kind: str = "", name: str = "", **metadata: Any) -> pods.Pod:
    """Return a pod that the *kind* called *name* controls."""
    owners = [{"kind": "Other", "name": "other"}, {"kind": kind, "name": name, "controller": True}] if kind else []
    return pods.read({"metadata": {"ownerReferences": owners, **metadata}, "spec": {"containers": []}})


@pytest.mark.parametrize(
    ("pod", "workload"),
    [
        (a_pod(generateName="x-"), Workload(kind="Pod", name="x")),
        (
            pods.read({"metadata": {"generateName": "x-", "name": "x-ab"}, "spec": {"containers": []}}),
            Workload(kind="Pod", name="x"),
        ),
        (pods.read({"metadata": {"name": "solo"}, "spec": {"containers": []}}), Workload(kind="Pod", name="solo")),
        (a_pod("ReplicaSet", "pay-abc", labels={"pod-template-hash": "abc"}), Workload(kind="Deployment", name="pay")),
        (a_pod("ReplicaSet", "billing-api"), Workload(kind="ReplicaSet", name="billing-api")),
        (a_pod("ReplicaSet", "-abc", labels={"pod-template-hash": "abc"}), Workload(kind="ReplicaSet", name="-abc")),
        (a_pod("Job", "report-28391040"), Workload(kind="CronJob", name="report")),
        (a_pod("Job", "report-2839"), Workload(kind="Job", name="report-2839")),
        (a_pod("DaemonSet", "agent"), Workload(kind="DaemonSet", name="agent")),
        (a_pod("StatefulSet", "db-28391040"), Workload(kind="StatefulSet", name="db-28391040")),
    ],
)
def test_workload_is_told_by_the_controlling_owner(pod: pods.Pod, workload: Workload) -> None:
    """Only the controller counts, and only suffixes that are known to be generated are cut."""
    assert pods.workload(pod) == workload


@pytest.mark.parametrize(
    ("raw", "field"),
    [
        (None, "pod"),
        ({"spec": {}}, "containers"),
        ({"spec": {"containers": [{}]}}, "name"),
        ({"spec": {"containers": []}, "metadata": None}, "metadata"),
        ({"spec": {"containers": [], "hostPID": "yes"}}, "hostPID"),
    ],
)
def test_what_is_no_pod_is_refused_by_field(raw: Any, field: str) -> None:
    """The message names the field that has the wrong shape."""
    with pytest.raises(Denial, match=field) as refused:
        pods.read(raw)

    assert refused.value.code is DenyCode.MALFORMED
