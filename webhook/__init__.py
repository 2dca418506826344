"""The control plane: puts the sidecar into pods, compiles what it enforces, hands it out."""
