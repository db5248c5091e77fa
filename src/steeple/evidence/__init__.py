"""What bench and proof share: real prompts, the environment of a run, and the target's logits without the engine."""
