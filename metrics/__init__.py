"""What Sidestream tells Prometheus: every metric defined once, the view of the fleet, the scrape endpoint and
the fleet page.

Knows messages (:mod:`contract`) and ``prometheus_client``; knows no broker, no journal and no clock.
"""
