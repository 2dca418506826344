"""The input and output of the control plane; decides nothing."""
