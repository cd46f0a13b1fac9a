"""What the trainer says: plan, weights, receipts, signed and only by the job's one trainer."""

__all__ = ["downlink", "leader_election", "leader_transport", "presence", "publisher", "retained", "signing"]
