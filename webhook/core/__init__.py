"""The decisions of the control plane; no clock, socket, environment or logger."""
