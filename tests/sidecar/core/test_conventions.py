"""The tables of names agree with themselves and with what makes them."""

import re

from sidecar.core.conventions import ATTRIBUTES, INSTRUMENTS, LINE_FIELDS

_NAME = re.compile(r"[a-z][a-z0-9]*([._][a-z0-9]+)*")


def test_every_name_is_well_formed_and_there_once() -> None:
    """OpenTelemetry, naming: lower case, dots between name spaces; what is ours says so."""
    for table in (ATTRIBUTES, INSTRUMENTS):
        names = [each.name for each in table]

        assert len(names) == len(set(names))
        assert all(_NAME.fullmatch(name) for name in names)
        assert all(each.ours == each.name.startswith("sidegate.") for each in table)
    assert len({name for name, _, _ in LINE_FIELDS}) == len(LINE_FIELDS)


def test_names_for_prometheus_follow_the_compatibility_specification() -> None:
    """Unit and `_total` as suffixes, dots as underscores."""
    exposed = {each.name: each.exposed for each in INSTRUMENTS}

    assert exposed["mcp.server.operation.duration"] == "mcp_server_operation_duration_seconds"
    assert exposed["sidegate.refusals"] == "sidegate_refusals_total"
    assert exposed["sidegate.bundle.age"] == "sidegate_bundle_age_seconds"
    assert exposed["sidegate.svid.expiry_timestamp"] == "sidegate_svid_expiry_timestamp_seconds"
    assert exposed["sidegate.bundle.info"] == "sidegate_bundle_info"
