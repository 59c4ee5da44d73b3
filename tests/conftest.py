"""How many cases hypothesis tries: some hundreds per property, or by HYPOTHESIS_PROFILE=nightly 200,000."""

import os

from hypothesis import settings

settings.register_profile("default", max_examples=300, deadline=None)
settings.register_profile("nightly", max_examples=200_000, deadline=None)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))
