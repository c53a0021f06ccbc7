"""Checkpoints of mesh-transformer-jax: shards of npz files, in a folder or a published archive."""
