"""What the trainer says: plan, weights, receipts, signed and only by the job's one trainer."""

__all__ = [
    "announcements",
    "downlink",
    "home_assistant",
    "leader_election",
    "leader_transport",
    "presence",
    "publisher",
    "releases",
    "replies",
    "retained",
    "signing",
]
