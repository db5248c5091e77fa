"""The calibration of a machine: its memory and the engine's own rounds, timed and fitted to a step model."""
