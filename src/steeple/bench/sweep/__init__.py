"""The sweep: drafters and draft lengths over batch x context x temperature, on one target cache with shared prompts."""
