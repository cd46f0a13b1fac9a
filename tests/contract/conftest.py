"""Property tests give the same verdict on every machine; HYPOTHESIS_PROFILE=explore looks further."""

from __future__ import annotations

import os

from hypothesis import settings

settings.register_profile("suite", derandomize=True, max_examples=60)
settings.register_profile("explore", max_examples=5000)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "suite"))
