"""Hypothesis profiles: the default repeats the same examples on every run; `soak` draws new ones, and many.

Choose with KVK_HYPOTHESIS_PROFILE=soak.
"""

from __future__ import annotations

import os

from hypothesis import HealthCheck, settings

settings.register_profile(
    "default",
    deadline=None,
    derandomize=True,
    database=None,
    max_examples=150,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    print_blob=True,
)
settings.register_profile("soak", settings.get_profile("default"), derandomize=False, max_examples=3000)
settings.load_profile(os.environ.get("KVK_HYPOTHESIS_PROFILE", "default"))
