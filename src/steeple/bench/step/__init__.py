"""``steeple bench step``: one decoding step, part by part, against the floor of the machine."""
