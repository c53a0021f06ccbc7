"""Proof of a conversion: hashes of all tensors, and logits against an independent forward pass."""
