"""Batched speculative decoding for any causal language model of ``transformers``, unmodified."""
