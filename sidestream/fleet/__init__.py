"""The operator's folder of a fleet: certificates, access list, keys, enrolment bundles."""

__all__ = ["cli"]
