"""A server that the kubelet has much to ask of: gRPC health, HTTP probes, hooks. It prints every request, and is slow to end."""

import asyncio
import signal
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from grpclib.health.service import Health
from grpclib.server import Server

HTTP_PORT, GRPC_PORT = 8000, 9000


class Handler(BaseHTTPRequestHandler):
    """Well, whatever is asked."""

    def do_GET(self) -> None:
        """Answer 200."""
        print(self.path, self.headers.get("X-Reason"), self.headers.get("User-Agent"), flush=True)
        self.send_response(200)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        """Say nothing else."""


async def main() -> None:
    """Serve until SIGTERM, and ten seconds more: what the hooks did can be read by then."""
    server = Server([Health()])
    await server.start("127.0.0.1", GRPC_PORT)
    threading.Thread(target=ThreadingHTTPServer(("127.0.0.1", HTTP_PORT), Handler).serve_forever, daemon=True).start()
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    await stop.wait()
    await asyncio.sleep(10)


asyncio.run(main())
