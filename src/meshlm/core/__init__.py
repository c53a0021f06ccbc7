"""Knows no model: trees, sharding, the platform and errors. Imports nothing of MeshLM's."""
