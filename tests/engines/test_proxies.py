"""launch/nginx.conf and launch/Caddyfile before two real servers, with ports of this machine."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from programs import LAUNCH, Program, environment, eventually, need
from servers import Server, events
from teams import free_port

pytestmark = pytest.mark.timeout(300)

NAME = "llm.example.org"
KEY = {"authorization": "Bearer secret"}
LONG = {"prompt": "the quick", "max_tokens": 1500, "n": 8, "model": "tiny"}
SERVE = ("--api-key", "secret", "--model-id", "tiny", "--slots", "1", "--max-queue", "31")


class Proxy:
    """A proxy and what it stands before."""

    def __init__(self, name: str, port: int, program: Program, servers: list[Server]) -> None:
        self.name, self.program, self.servers = name, program, servers
        self.url = f"https://127.0.0.1:{port}"
        self.headers = {"host": NAME}
        self.client = httpx.Client(
            verify=False, http2=False, timeout=60, headers={"host": NAME, **KEY}
        )

    def answers(self) -> bool:
        """Whether a request comes to a server and back."""
        assert self.program.process.poll() is None, self.program.text
        try:
            return self.client.get(f"{self.url}/ready").status_code == 200
        except httpx.TransportError:
            return False

    def total(self, metric: str) -> float:
        """Returns the sum of a metric over the servers that run."""
        running = [server for server in self.servers if server.process.poll() is None]
        return sum(server.metrics(KEY)[metric] for server in running)


def nginx(folder: Path, port: int, ports: list[int]) -> list[str | Path]:
    """Writes the template with its addresses replaced, and returns the command."""
    certificate, key = folder / "certificate.pem", folder / "key.pem"
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256"]
    command += ["-nodes", "-days", "1", "-subj", f"/CN={NAME}", "-keyout", str(key)]
    subprocess.run([*command, "-out", str(certificate)], check=True, capture_output=True)
    text = (LAUNCH / "nginx.conf").read_text()
    for old, new in (
        ("listen 443 ssl", f"listen 127.0.0.1:{port} ssl"),
        ("127.0.0.1:8001", f"127.0.0.1:{ports[0]}"),
        ("127.0.0.1:8002", f"127.0.0.1:{ports[1]}"),
        (f"/etc/ssl/{NAME}.pem", str(certificate)),
        (f"/etc/ssl/{NAME}.key", str(key)),
    ):
        assert old in text
        text = text.replace(old, new)
    if "1.22" in subprocess.run(["/usr/sbin/nginx", "-v"], capture_output=True, text=True).stderr:
        # Before 1.25.1 it stood with `listen`.
        text = text.replace("    http2 on;\n", "").replace(" ssl;", " ssl http2;", 1)
    (folder / "site.conf").write_text(text)
    paths = "".join(
        f"{kind}_temp_path {folder}/{kind};\n"
        for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    user = "user root;\n" if os.geteuid() == 0 else ""
    (folder / "nginx.conf").write_text(
        f"{user}daemon off;\nerror_log stderr;\npid {folder}/pid;\nevents {{}}\n"
        f"http {{\naccess_log off;\n{paths}include {folder}/site.conf;\n}}\n"
    )
    program = shutil.which("nginx", path=os.environ["PATH"] + ":/usr/sbin")
    assert program is not None
    return [program, "-p", folder, "-e", "stderr", "-c", folder / "nginx.conf"]


def caddy(folder: Path, port: int, ports: list[int]) -> list[str | Path]:
    """As `nginx`; the certificate is Caddy's own, for nobody outside knows the name."""
    text = (LAUNCH / "Caddyfile").read_text()
    for old, new in (
        (f"{NAME} {{", f"https://{NAME}:{port} {{\n\tbind 127.0.0.1\n\ttls internal"),
        ("127.0.0.1:8001", f"127.0.0.1:{ports[0]}"),
        ("127.0.0.1:8002", f"127.0.0.1:{ports[1]}"),
    ):
        assert old in text
        text = text.replace(old, new)
    settings = "admin off\n\tskip_install_trust\n\tauto_https disable_redirects"
    settings += f"\n\tdefault_sni {NAME}"
    (folder / "Caddyfile").write_text(f"{{\n\t{settings}\n}}\n{text}")
    return ["caddy", "run", "--config", folder / "Caddyfile", "--adapter", "caddyfile"]


@pytest.fixture(scope="module")
def servers(weights, compiled) -> Iterator[list[Server]]:
    options = (*SERVE, "--allowed-host", NAME, "--compile-cache", str(compiled))
    with Server(weights, *options) as first, Server(weights, *options) as second:
        yield [first.wait_ready(240), second.wait_ready(240)]


@pytest.fixture(scope="module", params=["nginx", "caddy"])
def proxy(request, servers, tmp_path_factory) -> Iterator[Proxy]:
    name = request.param
    need(name, *(["openssl"] if name == "nginx" else []))
    folder, port = tmp_path_factory.mktemp(name), free_port()
    ports = [server.port for server in servers]
    command = {"nginx": nginx, "caddy": caddy}[name](folder, port, ports)
    env = environment(XDG_DATA_HOME=str(folder), XDG_CONFIG_HOME=str(folder), HOME=str(folder))
    program = Program(command, folder / "log", env)
    made = Proxy(name, port, program, servers)
    try:
        eventually(made.answers, 30, lambda: program.text)
        yield made
    finally:
        made.client.close()
        program.end()


def test_answers_and_keys_pass(proxy):
    assert proxy.client.get(f"{proxy.url}/v1/models").json()["data"][0]["id"] == "tiny"
    without = {"authorization": "Bearer other"}
    answer = proxy.client.get(f"{proxy.url}/v1/models", headers=without)
    assert (answer.status_code, answer.json()["error"]["code"]) == (401, "invalid_api_key")
    body = {"prompt": "the quick", "max_tokens": 8, "seed": 1}
    url = "/v1/completions"
    behind = httpx.post(proxy.servers[0].url + url, headers=KEY, json=body).json()["choices"]
    assert proxy.client.post(proxy.url + url, json=body).json()["choices"] == behind
    stream = proxy.client.post(proxy.url + url, json={**body, "stream": True})
    assert events(stream.text)[-1] == "[DONE]"


def test_a_stream_is_not_held_back_and_a_client_that_leaves_frees_its_slot(proxy):
    name = 'meshlm_requests_finished_total{reason="cancelled"}'
    before = proxy.total(name)
    url, body = f"{proxy.url}/v1/completions", {**LONG, "stream": True}
    with proxy.client.stream("POST", url, json=body) as answer:
        lines = answer.iter_lines()  # kept: the client leaves when it is gone
        assert next(lines).startswith("data: {")
        eventually(lambda: proxy.total("meshlm_samples_running") == 1, 20)
    eventually(lambda: proxy.total("meshlm_samples_running") == 0, 30)
    assert proxy.total(name) == before + 1


def test_limits_and_what_is_the_operators(proxy):
    body = {"prompt": "x" * (3 << 20)}
    assert proxy.client.post(f"{proxy.url}/v1/completions", json=body).status_code == 413
    # nginx lets this machine in, Caddy nobody.
    wanted = {"nginx": 200, "caddy": 404}[proxy.name]
    assert proxy.client.get(f"{proxy.url}/metrics").status_code == wanted


def test_requests_go_to_the_other_server_when_one_stops(proxy, weights, compiled):
    """The last test of each proxy: the server is there again on its port for the next one."""
    body = {"prompt": "the quick", "max_tokens": 4}
    with proxy.client.stream(
        "POST", f"{proxy.url}/v1/completions", json={**LONG, "stream": True}
    ) as answer:
        lines = answer.iter_lines()
        text = [next(lines)]
        busy = next(s for s in proxy.servers if s.metrics(KEY)["meshlm_samples_running"])
        busy.send(signal.SIGTERM)
        # It drains: 503 to all that is new, which the proxy gives to the other.
        for _ in range(10):
            again = proxy.client.post(f"{proxy.url}/v1/completions", json=body)
            assert again.status_code == 200, again.text
        text += lines
    assert events("\n".join(text))[-1] == "[DONE]"
    assert busy.wait_exit() == 0
    for _ in range(4):
        assert proxy.client.post(f"{proxy.url}/v1/completions", json=body).status_code == 200
    options = (*SERVE, "--allowed-host", NAME, "--compile-cache", str(compiled))
    again = Server(weights, *options, "--port", str(busy.port))
    proxy.servers[proxy.servers.index(busy)] = again.wait_ready(120)
