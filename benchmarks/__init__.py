"""Programs that measure Sidestream beside what it competes with; each prints a table and can write JSON."""

import os

from sidestream.host.signals import heed_interrupts_of_module

heed_interrupts_of_module()
# Of processes that are started here, as sidestream's commands have it:
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
