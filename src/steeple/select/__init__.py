"""Which drafter for which request, and how many tokens: arithmetic over past rounds, no torch."""
