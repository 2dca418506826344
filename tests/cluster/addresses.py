"""Names and addresses of the one-node cluster, the same in every cluster: each has a network namespace of its own."""

from __future__ import annotations

NODE_NAME = "node1"
NODE_IP = "10.98.0.2"
GATEWAY_IP = "10.98.0.1"  # nobody answers there: a default route must exist, the outside must not
SERVICE_CIDR = "10.96.0.0/16"
API_SERVICE_IP = "10.96.0.1"
DNS_IP = "10.96.0.10"
SPIRE_SERVER_IP = "10.96.0.81"  # fixed, so that the agent on the host network needs no cluster DNS
POD_CIDR = "10.244.0.0/24"
# The same of IPv6: pods have an address of each family, Services one of IPv4 unless they ask for both.
NODE_IP6 = "fd98::2"
GATEWAY_IP6 = "fd98::1"
SERVICE_CIDR6 = "fd96::/112"
POD_CIDR6 = "fd44::/112"
