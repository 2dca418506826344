"""A stdio server that does what each message says: `params.do` is one of the verbs below. Needs nothing but Python."""

import json
import os
import sys
import time
from typing import Any


def say(**members: Any) -> None:
    """Write one message."""
    sys.stdout.write(json.dumps({"jsonrpc": "2.0", **members}) + "\n")
    sys.stdout.flush()


def act(message: dict[str, Any], heard: list[Any]) -> None:  # noqa: C901, PLR0912 - a table in the form of code
    """Do what *message* wants."""
    params = message.get("params") or {}
    do, token = params.get("uri", "answer"), (params.get("_meta") or {}).get("progressToken")
    result: dict[str, Any] = {"pid": os.getpid(), "heard": message}
    match do:
        case "history":
            result["heard"] = heard
        case "hang":
            return
        case "die":
            os._exit(3)
        case "garbage":
            sys.stdout.write("npm WARN this is a banner\n{\n\n")
        case "progress":
            for step in range(3):
                say(method="notifications/progress", params={"progressToken": token, "progress": step})
        case "log":
            say(method="notifications/message", params={"level": "info", "data": "said aloud"})
        case "ask":
            say(id="ask-1", method="roots/list", params={})
        case "changed":
            say(method="notifications/tools/list_changed")
        case "large":
            result["filler"] = "x" * params["bytes"]
        case "endless":
            while True:
                sys.stdout.write("x" * 2**16)
        case "deaf":
            time.sleep(1000)
        case "stderr":
            sys.stderr.write("a word to the operator\n")
            sys.stderr.flush()
        case "fail":
            say(id=message["id"], error={"code": -32601, "message": "no"})
            return
    say(id=message["id"], result=result)


def main() -> None:
    """Serve until the input ends."""
    heard = []
    for line in sys.stdin:
        message = json.loads(line)
        heard.append(message)
        if "method" not in message:
            say(method="notifications/message", params={"level": "info", "data": message})
        elif message.get("method") == "initialize":
            result = {"protocolVersion": "2025-11-25", "capabilities": {}, "serverInfo": {"name": str(os.getpid())}}
            if (message["params"].get("clientInfo") or {}).get("name") == "unwelcome":
                say(id=message["id"], error={"code": -32602, "message": "not you"})
            else:
                say(id=message["id"], result=result)
        elif message.get("method") == "ping":
            say(id=message["id"], result={"heard": heard})
        elif "id" in message:
            act(message, heard)


if __name__ == "__main__":
    main()
