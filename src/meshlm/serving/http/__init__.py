"""The server around the API: its life, and what stands between it and the network.

server.py         it listens, loads, serves, drains and ends
connections.py    time and number of connections: slow headers, slow readers
middleware.py     the layers around the routes: log, hosts, origins, keys, draining, bodies
guards.py         who may ask: keys, host names, origins
refusals.py       answers that come before the request's end, or instead of a route's
pages.py          health, metrics and the files of the page
logs.py           log lines as JSON
announcements.py  what a person at the terminal reads
fingerprint.py    a name for what answers
"""
