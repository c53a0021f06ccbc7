"""Runs: the loop, what it measures, how it stops and goes on, and its report."""
