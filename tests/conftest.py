"""Settings of all tests."""

from hypothesis import HealthCheck, settings

# Properties are about values; on a machine that is busy with other things, time says nothing about them.
settings.register_profile("sidegate", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("sidegate")
