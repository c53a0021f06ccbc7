"""Weights in and out: the original's npz shards, Hugging Face folders, and MeshLM's own."""
