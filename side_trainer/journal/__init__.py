"""Every fact that changes the weights, in order, durable before anyone is told."""
