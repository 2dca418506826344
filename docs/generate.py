"""Write the reference pages that are made of code: `python docs/generate.py`; with --check, fail if one is out of date."""

import dataclasses
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Final

import msgspec

import sidecar.config
import webhook.config
from sidecar.core import profile
from sidecar.core.message import NOTIFICATIONS, REQUESTS, Message, Shape
from sidecar.core.replies import answer
from sidecar.errors import Reason, Refusal
from webhook.core import annotations, quantity, resources

REFERENCE: Final = Path(__file__).parent / "reference"
NOTE: Final = "<!-- Made by docs/generate.py from the code; edit the code. -->\n"


def pages() -> Iterator[tuple[str, str]]:
    """Yield (file name, text) of every generated page."""
    yield "sidecar-settings.md", _settings("Settings of the sidecar", sidecar.config)
    yield "control-plane-settings.md", _settings("Settings of the control plane", webhook.config)
    yield "annotations.md", _annotations()
    yield "profile.md", _profile()
    yield "custom-resources.md", _resources()
    yield "refusals.md", _refusals()
    yield "methods.md", _methods()


def _table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    head = list(head)
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    lines += ["| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in row) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def _settings(title: str, module: Any) -> str:
    rows = [
        (
            f"`{module.PREFIX}{field.name.upper()}`",
            f"`{spelt}`" if (spelt := _spelt(field)) else "",
            field.metadata["meaning"],
        )
        for field in dataclasses.fields(module.Settings)
    ]
    text = (
        "Read once from the environment; an unknown or unusable one stops the process with a message that names it.\n"
    )
    return f"{NOTE}# {title}\n\n{text}\n{_table(('variable', 'default', 'meaning'), rows)}"


def _spelt(field: Any) -> str:
    """Return the default of a setting as its variable would say it."""
    match field.default:
        case int() as amount if field.metadata["parse"] is quantity.parse_cpu:
            return quantity.cpu(amount)
        case int() as amount if field.metadata["parse"] is quantity.parse_memory:
            return quantity.memory(amount)
        case tuple() as names:
            return ",".join(names)
        case float() as number:
            return f"{number:.15g}"
        case other:
            return str(other)


def _annotations() -> str:
    rows = [
        (f"`{annotations.GROUP}/{each.name}`", f"`{each.example}`", each.default, each.meaning)
        for each in annotations.TABLE
    ]
    text = "On a pod's template. An unknown `sidegate.dev/` annotation, or a value that its line does not allow, is refused.\n"
    return f"{NOTE}# Annotations\n\n{text}\n{_table(('annotation', 'example', 'default', 'meaning'), rows)}"


def _profile() -> str:
    text = "`sidegate.json` in a bundle. Unknown fields are refused.\n"
    return f"{NOTE}# The profile of a workload\n\n{text}{_records(profile)}"


def _resources() -> str:
    text = (
        f"In `sidegate.dev/{resources.VERSION}`; each table is the `spec` of a kind, or a part of one.\n"
        "A workload gets what is selected for its pod: a namespace can tighten what the cluster says, never widen it.\n"
    )
    return f"{NOTE}# Custom resources\n\n{text}{_records(resources)}"


def _records(module: Any) -> str:
    """Return a section for each record that *module* defines."""
    parts = []
    for record in vars(module).values():
        is_record = isinstance(record, type) and issubclass(record, module.Record) and record is not module.Record
        if not is_record:
            continue
        rows = []
        for field in msgspec.inspect.type_info(record).fields:
            required = field.default is msgspec.NODEFAULT and field.default_factory is msgspec.NODEFAULT
            default = "required" if required else f"`{msgspec.json.encode(_default(field)).decode()}`"
            rows.append((f"`{field.encode_name}`", _type_name(field.type), default))
        parts.append(f"\n## {record.__name__}\n\n{record.__doc__}\n\n{_table(('field', 'type', 'default'), rows)}")
    return "".join(parts)


def _default(field: Any) -> Any:
    return field.default if field.default is not msgspec.NODEFAULT else field.default_factory()


def _type_name(kind: Any) -> str:
    match kind:
        case msgspec.inspect.LiteralType(values=values):
            return " | ".join(f"`{value}`" for value in values)
        case msgspec.inspect.VarTupleType(item_type=item) | msgspec.inspect.ListType(item_type=item):
            return f"list of {_type_name(item)}"
        case msgspec.inspect.UnionType(types=types):
            return " or ".join(_type_name(each) for each in types)
        case msgspec.inspect.StructType(cls=cls):
            return f"[{cls.__name__}](#{cls.__name__.lower()})"
        case msgspec.inspect.NoneType():
            return "null"
        case msgspec.inspect.IntType(ge=low, le=high):
            return "integer" + (f", {low} to {high}" if low is not None and high is not None else "")
        case _:
            return type(kind).__name__.removesuffix("Type").lower().replace("str", "string").replace("dict", "object")


def _refusals() -> str:
    rows = []
    call = Message(shape=Shape.REQUEST, method="tools/call", id=1, params={})
    for reason in Reason:
        response = answer(Refusal(reason, ""), call)
        code = msgspec.json.decode(response.body)["error"]["code"]
        rows.append((f"`{reason}`", str(response.status), str(code)))
    text = (
        "Every message that does not pass has one of these reasons: in the answer, the audit record, the metric and the log.\n"
        "Status and code are those of a refused call; what could not be read at all is answered with HTTP 400.\n"
    )
    return f"{NOTE}# Refusals\n\n{text}\n{_table(('reason', 'HTTP status', 'JSON-RPC code'), rows)}"


def _methods() -> str:
    rows = [(f"`{method}`", _judged_on(method)) for method in REQUESTS]
    rows += [(f"`{method}`", "nothing: passes from an identified caller") for method in sorted(NOTIFICATIONS)]
    text = "What a client may send, and what it is authorised on. A method that is not here is refused.\n"
    return f"{NOTE}# Methods\n\n{text}\n{_table(('method', 'authorised on'), rows)}"


def _judged_on(method: str) -> str:
    try:
        target = REQUESTS[method]({"name": "x", "uri": "x", "ref": {"type": "ref/prompt", "name": "x"}})
    except Refusal:  # pragma: no cover - every method takes these
        return ""
    if target is None:
        return "nothing: passes from an identified caller"
    name = type(target).__name__
    return "each item of the answer" if name == "Listing" else name.lower()


def main() -> int:
    """Write or check the pages; return the exit status."""
    check = "--check" in sys.argv[1:]
    stale = []
    for name, text in pages():
        path = REFERENCE / name
        if not path.exists() or path.read_text() != text:
            stale.append(name)
            if not check:
                path.write_text(text)
    if check and stale:
        print(f"out of date: {', '.join(stale)}; hint: make docs", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
