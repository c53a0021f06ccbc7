"""The server: an OpenAI-compatible API and a page, over an engine that batches continuously.

requests.py    what is asked of the engine and what it answers
config.py      every bound and size
scheduler.py   who runs, who waits, what form the batch has: without JAX
prefixes.py    keys and values of earlier prompts
steps.py       the compiled functions: prefill in chunks, a step of the whole batch
compiled.py    each of them for every size, before the first request
settings.py    what requests ask for, as arrays
runner.py      the batch on the device, and prompts on their way into it
worker.py      one turn: give up, run prompts, take a step
engine.py      the one thread that owns the device
stats.py       its counts
errors.py      OpenAI's error body and headers
metrics.py     the numbers for Prometheus
api/           what HTTP asks, and what it is answered
http/          the server around the API, which knows nothing of it
static/        the page
"""
