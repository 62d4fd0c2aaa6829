"""Settings of all tests: properties are tried on the same examples in every run."""

import os

from hypothesis import HealthCheck, settings

# Examples are few: the normal run stays short on two busy cores. Tests marked `slow` ask for more.
settings.register_profile(
    "bear",
    derandomize=True,
    deadline=None,
    max_examples=25,
    database=None,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("bear")

# No test reads the bear.toml of whoever runs it.
os.environ["XDG_CONFIG_HOME"] = os.devnull
os.environ.pop("BEAR_CONFIG", None)
