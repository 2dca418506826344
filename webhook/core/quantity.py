"""Resource quantities: read what Kubernetes accepts, write the one form that Kubernetes itself would write.

The canonical form matters: the API server rewrites quantities, and a sidecar that comes back for a second look must
equal what we would render. Source: k8s.io/apimachinery, api/resource, grammar and canonical form.
"""

import re
from decimal import Decimal
from typing import Final

_SUFFIXES: Final = {
    "": Decimal(1),
    "n": Decimal("1e-9"),
    "u": Decimal("1e-6"),
    "m": Decimal("1e-3"),
    **{suffix: Decimal(1000) ** power for power, suffix in enumerate("kMGTPE", 1)},
    **{f"{suffix}i": Decimal(1024) ** power for power, suffix in enumerate("KMGTPE", 1)},
}
_QUANTITY: Final = re.compile(r"([+-]?[0-9]{1,18}(?:\.[0-9]{0,9})?)(n|u|m|[kMGTPE]|[KMGTPE]i|)", re.ASCII)
_CPU: Final = re.compile(r"[0-9]{1,6}m|[0-9]{1,3}(?:\.[0-9]{1,3})?", re.ASCII)
_MEMORY: Final = re.compile(r"[0-9]{1,9}(?:Ki|Mi|Gi)", re.ASCII)


def parse(text: object) -> Decimal | None:
    """Return the amount that *text* (or a bare number, as YAML has them) stands for; None when it is no quantity."""
    found = _QUANTITY.fullmatch(str(text)) if isinstance(text, str | int) else None
    return Decimal(found[1]) * _SUFFIXES[found[2]] if found else None


def parse_cpu(text: str) -> int:
    """Return millicores; raises ValueError saying what is allowed."""
    amount = parse(text) if _CPU.fullmatch(text) else None
    if not amount:
        raise ValueError("cores above zero, such as 100m or 0.5 or 2")
    return int(amount * 1000)


def parse_memory(text: str) -> int:
    """Return bytes; raises ValueError saying what is allowed."""
    amount = parse(text) if _MEMORY.fullmatch(text) else None
    if not amount:
        raise ValueError("a size above zero with its unit Ki, Mi or Gi, such as 96Mi")
    return int(amount)


def cpu(millicores: int) -> str:
    """Return *millicores* in canonical form."""
    return f"{millicores}m" if millicores % 1000 else str(millicores // 1000)


def memory(size_bytes: int) -> str:
    """Return *size_bytes*, a multiple of 1024, in canonical form: the largest unit that leaves no fraction."""
    amount, unit = size_bytes // 1024, 0
    while amount % 1024 == 0 and unit < len("KMGTPE") - 1:
        amount, unit = amount // 1024, unit + 1
    return f"{amount}{'KMGTPE'[unit]}i"
