"""The server: an OpenAI-compatible API and a page, over an engine that batches continuously.

requests.py   what is asked of the engine and what it answers
config.py     every bound and size
scheduler.py  who runs, who waits, what is computed next: without JAX
runner.py     the compiled functions: prefill in chunks, a decoding step over all slots
prefixes.py   keys and values of earlier prompts
engine.py     the one thread that owns the device
"""
