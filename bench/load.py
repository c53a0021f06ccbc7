"""A load test: `meshlm serve` under many clients with random lengths, some of whom give up.

Starts a server on a port of its own, on the weights at a path or on random ones of a preset, and
has clients ask it over loopback, half of them streaming, until the time is up. A request that ends
in any other way than whole, refused with 429 or given up by its client counts as lost. How long
/health takes is measured by a process of its own. Progress goes to stderr. stdout gets one line of
JSON; the exit code is 1 where something was lost, or where the server's counts do not add up.

    .venv/bin/python bench/load.py --clients 200 --seconds 60
    .venv/bin/python bench/load.py runs/first --seconds 1800 --slots 16
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import dataclasses
import json
import multiprocessing
import os
import random
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import psutil

# The first part of the time does not count for memory: buffers and caches fill up.
WARM_SHARE = 1 / 3
TEXT = "A server takes what comes, and gives back what it can; nobody is forgotten. " * 50


class LostError(Exception):
    """An answer that is not what it has to be."""


@dataclasses.dataclass
class Outcome:
    """What the clients met."""

    counts: Counter[str] = dataclasses.field(default_factory=Counter)
    losses: list[str] = dataclasses.field(default_factory=list)
    whole_s: list[float] = dataclasses.field(default_factory=list)
    first_token_s: list[float] = dataclasses.field(default_factory=list)
    memory: list[tuple[float, float]] = dataclasses.field(default_factory=list)
    """(seconds since the start, resident bytes)"""


def write_random(folder: Path, preset: str) -> Path:
    """Returns a checkpoint of a preset's shape with random weights."""
    import jax

    from meshlm.checkpoint import Checkpointer
    from meshlm.core.config import to_dict, to_json
    from meshlm.core.tree import to_named
    from meshlm.data.tokenizer import train_bpe
    from meshlm.model.params import init_params
    from meshlm.model.presets import PRESETS, vocab_rows

    tokenizer = train_bpe([TEXT], 300)
    model = dataclasses.replace(PRESETS[preset], vocab_size=vocab_rows(tokenizer.vocab_size))
    params = init_params(model, jax.random.key(0))
    files = {
        "config.json": to_json({"run": {"model": to_dict(model)}, "options": {}}),
        "tokenizer.json": tokenizer.to_json(),
    }
    with Checkpointer(folder / "checkpoints") as checkpointer:
        checkpointer.save(1, {"params." + n: a for n, a in to_named(params).items()}, files)
    return folder


@contextlib.contextmanager
def served(weights: Path, options: list[str], scratch: Path) -> Iterator[tuple[str, int]]:
    """Runs a server; gives its URL and process id."""
    command = [str(Path(sys.executable).with_name("meshlm")), "serve", str(weights), "--port", "0"]
    out = scratch / "out"
    with open(out, "wb") as stdout, open(scratch / "err", "wb") as stderr:
        process = subprocess.Popen([*command, *options], stdout=stdout, stderr=stderr)
    try:
        while not (ready := re.search(r"ready in .*(http://\S+)", out.read_text())):
            if process.poll() is not None:
                raise SystemExit((scratch / "err").read_text())
            time.sleep(0.1)
        yield ready[1], process.pid
        process.send_signal(signal.SIGTERM)
        if process.wait(60) != 0:
            raise SystemExit(f"the server ended with {process.returncode}")
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()


class Client:
    """One client after another request's end asks the next."""

    def __init__(self, http: httpx.AsyncClient, outcome: Outcome, limits: Any, seed: int) -> None:
        self.http, self.outcome, self.limits = http, outcome, limits
        self.random = random.Random(seed)

    async def ask_until(self, end_s: float) -> None:
        while time.monotonic() < end_s:
            self.outcome.counts["sent"] += 1
            try:
                await self.ask()
            except (LostError, httpx.HTTPError, ValueError, KeyError) as error:
                self.outcome.counts["lost"] += 1
                self.outcome.losses.append(f"{type(error).__name__}: {error}"[:200])

    async def ask(self) -> None:
        """Asks once, and notes how it ended."""
        context = self.limits["context_length"]
        length = min(int(self.random.expovariate(4 / context)) + 1, context - 2)
        wanted = min(int(self.random.expovariate(1 / 32)) + 1, context - length)
        body = {
            "prompt": [self.random.randrange(256) for _ in range(length)],
            "max_tokens": wanted,
            "seed": self.random.randrange(1 << 32),
        }
        patience_s = self.random.expovariate(4) if self.random.random() < 0.3 else None
        ask = self.stream if self.random.random() < 0.5 else self.whole
        try:
            async with asyncio.timeout(patience_s):
                await ask(body, wanted)
        except TimeoutError:
            self.outcome.counts["given_up"] += 1

    async def whole(self, body: dict[str, Any], wanted: int) -> None:
        begin = time.monotonic()
        answer = await self.http.post("/v1/completions", json=body)
        if await self.refused(answer):
            return
        told = answer.json()
        self.check(told["choices"][0]["finish_reason"], told["usage"]["completion_tokens"], wanted)
        self.outcome.whole_s.append(time.monotonic() - begin)
        self.outcome.counts["finished"] += 1

    async def stream(self, body: dict[str, Any], wanted: int) -> None:
        begin = time.monotonic()
        first_s, reasons, events = None, [], []
        body = {**body, "stream": True, "stream_options": {"include_usage": True}}
        async with self.http.stream("POST", "/v1/completions", json=body) as answer:
            if await self.refused(answer):
                return
            # Not by str.splitlines: a text may hold what that takes for the end of a line.
            rest = b""
            async for data in answer.aiter_bytes():
                *lines, rest = (rest + data).split(b"\n")
                events += [line[6:].decode() for line in lines if line.startswith(b"data: ")]
                if events:
                    first_s = first_s or time.monotonic() - begin
        if events[-1:] != ["[DONE]"]:
            raise LostError("a stream has no end")
        chunks = [json.loads(event) for event in events[:-1]]
        reasons = [c["finish_reason"] for chunk in chunks for c in chunk["choices"]]
        reasons = [reason for reason in reasons if reason]
        if len(reasons) != 1:
            raise LostError(f"a stream has the ends {reasons}")
        self.check(reasons[0], chunks[-1]["usage"]["completion_tokens"], wanted)
        assert first_s is not None
        self.outcome.first_token_s.append(first_s)
        self.outcome.whole_s.append(time.monotonic() - begin)
        self.outcome.counts["finished"] += 1

    async def refused(self, answer: httpx.Response) -> bool:
        """Whether the queue was full; waits then as long as the server says."""
        if answer.status_code == 429:
            self.outcome.counts["refused"] += 1
            await asyncio.sleep(int(answer.headers["retry-after"]) * self.random.random())
            return True
        if answer.status_code != 200:
            raise LostError(f"status {answer.status_code}")
        return False

    @staticmethod
    def check(reason: str, count: int, wanted: int) -> None:
        if not (count == wanted if reason == "length" else reason == "stop" and count <= wanted):
            raise LostError(f"{count} of {wanted} tokens, and {reason}")


async def numbers(http: httpx.AsyncClient) -> dict[str, float]:
    """Returns what /metrics tells."""
    lines = (await http.get("/metrics")).text.splitlines()
    pairs = (line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
    return {name: float(value) for name, value in pairs}


async def watch(outcome: Outcome, process: psutil.Process) -> None:
    """Notes the memory until it is cancelled."""
    begin = time.monotonic()
    while True:
        outcome.memory.append((time.monotonic() - begin, process.memory_info().rss))
        print(f"{time.monotonic() - begin:6.0f} s {dict(outcome.counts)}", file=sys.stderr)
        await asyncio.sleep(1)


def time_health(url: str, seconds: float) -> list[float]:
    """Returns how long /health took, asked ten times a second."""
    times, end_s = [], time.monotonic() + seconds
    with httpx.Client(base_url=url, timeout=60) as http:
        while time.monotonic() < end_s:
            begin = time.monotonic()
            http.get("/health").raise_for_status()
            times.append(time.monotonic() - begin)
            time.sleep(0.1)
    return times


async def load(url: str, pid: int, clients: int, seconds: float, seed: int) -> dict[str, Any]:
    """Returns the result: what the clients and the server itself say."""
    outcome, process = Outcome(), psutil.Process(pid)
    unbounded = httpx.Limits(max_connections=None)
    spawned = multiprocessing.get_context("spawn")
    async with (
        httpx.AsyncClient(base_url=url, timeout=600, limits=unbounded) as http,
        httpx.AsyncClient(base_url=url, timeout=60) as other,
    ):
        pool = ProcessPoolExecutor(1, mp_context=spawned)
        limits = (await other.get("/version", params={"limits": 1})).json()["limits"]
        before = await numbers(other)
        files = process.num_fds()
        watcher = asyncio.create_task(watch(outcome, process))
        health = asyncio.get_running_loop().run_in_executor(pool, time_health, url, seconds)
        begin = time.monotonic()
        asking = [Client(http, outcome, limits, seed + i) for i in range(clients)]
        await asyncio.gather(*(client.ask_until(begin + seconds) for client in asking))
        took_s = time.monotonic() - begin
        watcher.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await watcher
        health_s = await health
        await http.aclose()
        after = await settled(other)
        return {
            "clients": clients,
            "seconds": round(took_s, 1),
            **{name: outcome.counts[name] for name in COUNTS},
            "losses": outcome.losses[:10],
            "latency_s": quantiles(outcome.whole_s),
            "first_token_s": quantiles(outcome.first_token_s),
            "health_s": quantiles(health_s),
            "tokens_per_s": round(
                difference(before, after, "meshlm_generated_tokens_total") / took_s, 1
            ),
            "compilations": difference(before, after, "meshlm_compilations_total"),
            "adds_up": adds_up(after, outcome),
            "memory_mb": [round(b / 1e6, 1) for b in (outcome.memory[0][1], outcome.memory[-1][1])],
            "memory_slope_mb_per_min": memory_slope(outcome.memory),
            "files_more": process.num_fds() - files,
            "threads": process.num_threads(),
        }


COUNTS = ("sent", "finished", "refused", "given_up", "lost")


async def settled(http: httpx.AsyncClient) -> dict[str, float]:
    """Returns the numbers once nothing runs, or after ten seconds."""
    found: dict[str, float] = {}
    for _ in range(100):
        found = await numbers(http)
        if found["meshlm_samples_running"] == found["meshlm_samples_waiting"] == 0:
            break
        await asyncio.sleep(0.1)
    return found


def adds_up(after: dict[str, float], outcome: Outcome) -> bool:
    """Whether the server has an end for each request, and as many whole ones as the clients."""
    ends = {k: v for k, v in after.items() if k.startswith("meshlm_requests_finished_total")}
    whole = sum(v for k, v in ends.items() if '"stop"' in k or '"length"' in k)
    # One that became whole as its client gave up is whole for the server alone.
    known = (
        outcome.counts["finished"]
        <= whole
        <= outcome.counts["finished"] + outcome.counts["given_up"]
    )
    idle = after["meshlm_samples_running"] == after["meshlm_samples_waiting"] == 0
    return known and idle and after["meshlm_requests_total"] == sum(ends.values())


def difference(before: dict[str, float], after: dict[str, float], name: str) -> float:
    return after[name] - before[name]


def quantiles(values: list[float]) -> dict[str, float]:
    """Returns the median, p95 and p99, in seconds."""
    if len(values) < 2:
        return {}
    cut = statistics.quantiles(values, n=100, method="inclusive")
    return {"p50": round(cut[49], 4), "p95": round(cut[94], 4), "p99": round(cut[98], 4)}


def memory_slope(memory: list[tuple[float, float]]) -> float | None:
    """Returns how fast the memory grows after the first third, in MB a minute."""
    late = memory[int(len(memory) * WARM_SHARE) :]
    if len(late) < 3:
        return None
    slope, _ = statistics.linear_regression([t for t, _ in late], [b for _, b in late])
    return round(slope * 60 / 1e6, 3)


def main() -> int:
    """Returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("weights", nargs="?", type=Path, help="what to serve; random, if left out")
    parser.add_argument("--preset", default="test", help="shape of the random weights")
    parser.add_argument("--clients", type=int, default=200)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--slots", type=int, default=8)
    parser.add_argument("--prefix-cache-bytes", type=int, default=1 << 26, help="soon full: flat")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        weights = given.weights or write_random(Path(scratch) / "random", given.preset)
        options = ["--slots", str(given.slots)]
        options += ["--prefix-cache-bytes", str(given.prefix_cache_bytes)]
        with served(weights, options, Path(scratch)) as (url, pid):
            result = asyncio.run(load(url, pid, given.clients, given.seconds, given.seed))
    result |= {"slots": given.slots, "weights": given.preset if given.weights is None else "given"}
    print(json.dumps({**result, "cpus": os.cpu_count()}))
    return 0 if result["lost"] == 0 and result["adds_up"] else 1


if __name__ == "__main__":
    sys.exit(main())
