"""The proof that speculation changes nothing: greedy equality, and the sampled law against the exact one."""
