"""What Sidestream shows of a fleet: each metric defined once, scrape endpoint, rules, alerts, the page.

Knows messages (:mod:`sidestream.contract`) and ``prometheus_client``; connects to no broker, and knows no
journal.
"""

from sidestream.host.signals import heed_interrupts_of_module

heed_interrupts_of_module()

__all__ = ["accounts", "broker_figures", "catalogue", "cli", "server", "telemetry"]
