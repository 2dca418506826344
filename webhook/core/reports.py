"""What sidecars report with every question for their bundle: the revision in force, and why the last one offered was refused.

A report is a pod's own word, carried by its SVID: it counts for that pod alone, is cut to what fits, and is forgotten
when the pod has not asked for three times the 30 s of a sidecar's long poll. Replicas exchange theirs (`encode`, `decode`, `newest`), since
each hears only the pods that ask it. Refuses reports of peers that it cannot read.
"""

from collections import OrderedDict
from collections.abc import Iterable, Mapping
from typing import Final

import msgspec

from webhook.errors import BadReports

REVISION_HEADER: Final = "Sidegate-Bundle-Revision"
ERROR_HEADER: Final = "Sidegate-Bundle-Error"
EXPIRY_S: Final = 90.0  # three long polls of a sidecar
MAX_PODS: Final = 50_000  # the oldest go first; some 300 B each
MAX_REVISION: Final = 128
MAX_ERROR: Final = 256

PodKey = tuple[str, str]
"""Namespace and name."""


class Report(msgspec.Struct, frozen=True, array_like=True, kw_only=True):
    """What one pod said last. *noted_s* is Unix time; *revision* is empty while it has no bundle."""

    revision: str
    error: str
    noted_s: float


class Reports:
    """The last report of each pod that asked this replica. Mutated by `note` and `forget` alone."""

    def __init__(self) -> None:
        self._known: OrderedDict[PodKey, Report] = OrderedDict()

    def note(self, pod: PodKey, revision: str, error: str, now_s: float) -> None:
        """Take in what *pod* says now: the *revision* in force, and the *error* of the last offer, if it was refused."""
        self._known[pod] = Report(
            revision=_plain(revision)[:MAX_REVISION], error=_plain(error)[:MAX_ERROR], noted_s=now_s
        )
        self._known.move_to_end(pod)
        while len(self._known) > MAX_PODS:
            self._known.popitem(last=False)

    def forget(self, pod: PodKey) -> None:
        """Drop what *pod* said: it is gone."""
        self._known.pop(pod, None)

    def alive(self, now_s: float) -> Mapping[PodKey, Report]:
        """Return the reports that still count at *now_s*, and drop the others."""
        while self._known and next(iter(self._known.values())).noted_s < now_s - EXPIRY_S:
            self._known.popitem(last=False)
        return dict(self._known)

    def of(self, namespace: str, now_s: float) -> Mapping[PodKey, Report]:
        """Return the reports of one namespace that still count at *now_s*."""
        return {pod: report for pod, report in self.alive(now_s).items() if pod[0] == namespace}


def encode(reports: Mapping[PodKey, Report]) -> bytes:
    """Return *reports* as JSON, for other replicas."""
    return msgspec.json.encode([(*pod, report) for pod, report in reports.items()])


def decode(data: bytes) -> Mapping[PodKey, Report]:
    """Return what `encode` wrote. Raises BadReports."""
    try:
        rows = msgspec.json.decode(data, type=list[tuple[str, str, Report]])
    except msgspec.DecodeError as error:
        raise BadReports(f"reports of another replica: {error}") from error
    return {(namespace, name): report for namespace, name, report in rows[:MAX_PODS]}


def newest(sources: Iterable[Mapping[PodKey, Report]]) -> dict[PodKey, Report]:
    """Return for each pod what it said last, whichever replica it told."""
    merged: dict[PodKey, Report] = {}
    for reports in sources:
        for pod, report in reports.items():
            if pod not in merged or merged[pod].noted_s < report.noted_s:
                merged[pod] = report
    return merged


def _plain(text: str) -> str:
    """Return *text* without what would break a line of a terminal or of a log."""
    return text if text.isascii() and text.isprintable() else "".join(c if " " <= c <= "~" else "?" for c in text)
