"""Plans on paper: which GPUs would hold which experts, how evenly, and at what price."""
