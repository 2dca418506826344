"""What can go wrong in the control plane, split by whose fault it is.

A BadReview is the API server's (or of whoever poses as it), a Denial the pod author's, a BadResource or BadPolicy the
author's of a custom resource, a BadSetting the operator's; a KubeError is an answer of the Kubernetes API.
"""

from enum import StrEnum


class DenyCode(StrEnum):
    """Why a pod is refused; the strings appear in the answer's reason, in metrics, audit annotations and docs."""

    MALFORMED = "malformed"  # not the shape of a pod
    LABEL_INVALID = "label_invalid"
    ANNOTATION_INVALID = "annotation_invalid"
    PROFILE_AMBIGUOUS = "profile_ambiguous"  # two profiles select the pod: which is stricter is not ours to guess
    PORT_UNKNOWN = "port_unknown"  # nothing says which port speaks MCP
    PORT_RESERVED = "port_reserved"
    CONTAINER_UNKNOWN = "container_unknown"  # nothing says which container is the stdio server
    COMMAND_UNKNOWN = "command_unknown"  # of a stdio server; the image's own is not seen at admission
    PORT_UNRESOLVED = "port_unresolved"  # a probe names a port that its container does not have
    LIMITS_MISSING = "limits_missing"  # of a server's container, where the cluster requires them
    PLACE_SHARED = "place_shared"  # another server in the pod or its namespace, where the cluster forbids it
    ROLE_CONFLICT = "role_conflict"  # agent and server at once
    AGENT_WITHOUT_SERVERS = "agent_without_servers"  # no profile says which servers an agent calls
    PROXY_TAKEN = "proxy_taken"  # the application has a proxy of its own, where capture needs the variable
    DECOY_CONTAINER = "decoy_container"  # a container of our name that is not what we would have made
    DECOY_VOLUME = "decoy_volume"
    DECOY_MOUNT = "decoy_mount"  # an application container mounts what only the sidecar may
    UNENFORCEABLE_HOST_NETWORK = "unenforceable_host_network"
    UNENFORCEABLE_HOST_PID = "unenforceable_host_pid"
    UNENFORCEABLE_HOST_IPC = "unenforceable_host_ipc"
    UNENFORCEABLE_HOST_PATH = "unenforceable_host_path"  # a directory of the node from which the sidecar can be read
    UNENFORCEABLE_HOST_PORT = "unenforceable_host_port"
    UNENFORCEABLE_SHARED_PROCESSES = "unenforceable_shared_processes"
    UNENFORCEABLE_WINDOWS = "unenforceable_windows"
    UNENFORCEABLE_PRIVILEGED = "unenforceable_privileged"
    UNENFORCEABLE_CAPABILITY = "unenforceable_capability"
    UNENFORCEABLE_USER = "unenforceable_user"
    UNENFORCEABLE_EGRESS = "unenforceable_egress"  # what is let out by host name could go round the sidecar
    UNENFORCEABLE_MESH = "unenforceable_mesh"  # another mesh takes the same traffic


class WebhookError(Exception):
    """Anything this package refuses."""


class BadSetting(WebhookError):  # noqa: N818 - the names say what is wrong; the parent says that it is an error
    """One or more settings are unusable; the message lists all of them, a line each."""


class BadReview(WebhookError):  # noqa: N818 - same
    """The request is no AdmissionReview that can be answered; *status* is the HTTP status to say so with."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class Denial(WebhookError):  # noqa: N818 - same
    """A pod may not be created as it is; the message says what to change."""

    def __init__(self, code: DenyCode, message: str) -> None:
        super().__init__(message)
        self.code = code


class BadResource(WebhookError):  # noqa: N818 - same
    """A custom resource cannot be used; *resource* is `Kind namespace/name`, the message names the field."""

    def __init__(self, resource: str, message: str) -> None:
        super().__init__(f"{resource}: {message}")
        self.resource = resource


class BadPolicy(WebhookError):  # noqa: N818 - same
    """A policy does not compile; *line* and *column* count from 1, 0 where the compiler names none."""

    def __init__(self, file: str, message: str, *, line: int = 0, column: int = 0) -> None:
        super().__init__(f"{file}:{line}:{column}: {message}" if line else f"{file}: {message}")
        self.file = file
        self.line = line
        self.column = column
        self.message = message


class BadReports(WebhookError):  # noqa: N818 - same
    """Another replica's reports cannot be read."""


class KubeError(WebhookError):
    """The Kubernetes API refused or did not answer; *status* is 0 when there was no answer."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(f"{status} {message}" if status else message)
        self.status = status
