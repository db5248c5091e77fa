"""A discrete-event simulation of a serving fleet: what a load needs, at which latency and cost. Arithmetic only."""
