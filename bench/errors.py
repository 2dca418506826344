"""What can go wrong in a bench: no figures at all, or a target that this machine does not have."""


class BenchError(Exception):
    """No figure can be given; the text says why. A figure taken beside an error would not be one."""


class UnavailableError(Exception):
    """A target cannot be measured here; the text says why, and the table repeats it."""
