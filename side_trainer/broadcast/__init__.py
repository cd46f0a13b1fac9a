"""What the trainer says: plan, weights, receipts, signed and only by the job's one trainer."""
