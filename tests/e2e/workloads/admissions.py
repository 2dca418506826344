"""Creates pods by dry run at a steady rate, and prints what came of them: KUBECONFIG NAMESPACE PODS_PER_S SECONDS."""

import asyncio
import contextlib
import json
import sys
import time
from typing import Any

from webhook.errors import KubeError
from webhook.shell.kube import Kube

POD: dict[str, Any] = {
    "apiVersion": "v1",
    "kind": "Pod",
    "metadata": {"generateName": "tried-", "labels": {"sidegate.dev/server": "true"}},
    "spec": {"containers": [{"name": "server", "image": "server", "ports": [{"name": "mcp", "containerPort": 8000}]}]},
}


async def main(kubeconfig: str, namespace: str, rate: float, seconds: float) -> None:
    """Start a creation every 1/*rate* seconds, whatever became of the ones before."""
    taken_s: list[float] = []
    failures: list[str] = []
    not_injected = 0

    async def create(kube: Kube) -> None:
        nonlocal not_injected
        begun = time.monotonic()
        try:
            made = await kube.create(f"/api/v1/namespaces/{namespace}/pods", POD, dry_run=True)
        except KubeError as error:
            failures.append(f"begun at {begun - start:.1f} s: {error}")
            return
        taken_s.append(time.monotonic() - begun)
        not_injected += not any(each["name"] == "sidegate" for each in made["spec"].get("initContainers") or ())

    kube = await Kube.open(kubeconfig)
    start = time.monotonic()
    async with contextlib.aclosing(kube), asyncio.TaskGroup() as tasks:
        for number in range(int(rate * seconds)):
            await asyncio.sleep(max(0.0, start + number / rate - time.monotonic()))
            tasks.create_task(create(kube))
    outcome = {"made": len(taken_s), "failures": failures, "not_injected": not_injected, "slowest_s": max(taken_s)}
    print(json.dumps(outcome))


if __name__ == "__main__":
    _, config, where, per_second, duration = sys.argv
    asyncio.run(main(config, where, float(per_second), float(duration)))
