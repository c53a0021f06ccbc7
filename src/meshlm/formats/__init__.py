"""Containers of arrays, from bytes to named arrays and back. Knows no model."""
