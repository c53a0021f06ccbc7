"""The API: what HTTP asks, turned into requests to the engine, and its events into answers.

bodies.py      a request's body to a JSON object, within bounds
protocol.py    the requests' fields, types and bounds, and what is wrong with them
prompts.py     the four forms of a prompt to token ids
plans.py       fields to requests to the engine
answers.py     the engine's events to an answer, streamed or whole; pure
logprobs.py    log-probabilities as OpenAI's APIs tell them
completions.py, chat.py, compat.py, tokens.py   one API each
waiting.py     waiting for the engine, giving up when the client is gone, server-sent events
schema.py      what /openapi.json says
app.py         the routes
"""
