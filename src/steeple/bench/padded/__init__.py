"""``steeple bench padded``: padded batches of ``transformers`` models, with and without drafts, by schedule."""
