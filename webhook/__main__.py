"""The control plane's entry point: the environment is read here, once."""

import asyncio
import contextlib
import functools
import gc
import os
import signal
import sys
from pathlib import Path
from typing import Final

import uvloop

from sidecar import __version__
from sidecar.shell import logs
from webhook.config import Settings
from webhook.errors import BadSetting, KubeError
from webhook.shell import opa
from webhook.shell.app import App
from webhook.shell.kube import Kube

GC_THRESHOLDS: Final = (50_000, 20, 100)  # a full collection looks at every object of 10,000 connections


async def serve(settings: Settings) -> None:
    """Run the control plane until SIGTERM or SIGINT. Raises KubeError when there are no credentials."""
    stop = asyncio.Event()
    gc.set_threshold(*GC_THRESHOLDS)
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    kube = await Kube.open(settings.kubeconfig)
    async with contextlib.aclosing(kube):
        program = opa.Opa(Path(settings.opa))
        app = App(
            settings,
            version=__version__,
            kube=kube,
            compile_files=opa.Remembering(program).files,
            check=functools.partial(opa.check, opa=program),
        )
        await app.run(stop)


def main() -> int:
    """Run the control plane; return the exit status."""
    try:
        settings = Settings.from_env(os.environ)  # noqa: TID251 - the one place
        logs.configure(settings.log_level)
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(serve(settings))
    except (BadSetting, KubeError) as error:
        print(f"sidegate: error: {error}", file=sys.stderr)  # noqa: T201 - the log may not be configured yet
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
