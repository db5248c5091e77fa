"""A load generator for OpenAI-compatible servers: requests by a schedule, latencies, goodput and acceptance."""
