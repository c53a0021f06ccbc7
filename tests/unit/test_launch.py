"""The templates for servers, and the page about running one: what they name is there."""

from __future__ import annotations

import ast
import asyncio
import re
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from meshlm.serving.config import Limits
from meshlm.serving.metrics import FINISHED, REJECTED, Metrics

ROOT = Path(__file__).resolve().parents[2]
LAUNCH = ROOT / "launch"
PAGE = (ROOT / "docs" / "serving-operations.md").read_text()
FLAGS = (ROOT / "tests" / "golden" / "flags" / "serve.txt").read_text()
OPTIONS = set(re.findall(r"^(--[\w.-]+)", FLAGS, re.MULTILINE))
TEMPLATES = ("kubernetes-serve.yaml", "ray_serve.py", "nginx.conf", "Caddyfile")


@pytest.mark.parametrize("name", TEMPLATES)
def test_options_in_a_template_exist(name):
    text = (LAUNCH / name).read_text()
    used = set(re.findall(r"(?<![\w-])--[a-z][\w-]*(?:\.[a-z]+)?", text)) - {"--from-file"}
    assert used
    assert used <= OPTIONS
    assert name in PAGE


def test_the_kubernetes_template():
    documents = yaml.safe_load_all((LAUNCH / "kubernetes-serve.yaml").read_text())
    deployment, service, policy = documents
    pod = deployment["spec"]["template"]
    (container,) = pod["spec"]["containers"]
    arguments = dict(argument.partition("=")[::2] for argument in container["args"])
    assert float(arguments["--drain-s"]) < pod["spec"]["terminationGracePeriodSeconds"]
    assert arguments["--host"] == "0.0.0.0"
    port = {p["name"]: p["containerPort"] for p in container["ports"]}["http"]
    assert int(arguments["--port"]) == port
    paths = {kind: container[f"{kind}Probe"]["httpGet"]["path"] for kind in PROBES}
    assert paths == {"startup": "/ready", "readiness": "/ready", "liveness": "/health"}
    mounts = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
    assert set(mounts.values()) == {volume["name"] for volume in pod["spec"]["volumes"]}
    for option in ("--api-key-file", "--compile-cache"):
        assert str(Path(arguments[option]).parent) in mounts
    labels = pod["metadata"]["labels"]
    assert service["spec"]["selector"] == labels == deployment["spec"]["selector"]["matchLabels"]
    assert policy["spec"]["podSelector"]["matchLabels"] == labels


PROBES = ("startup", "readiness", "liveness")


def test_the_ray_template_is_python():
    tree = ast.parse((LAUNCH / "ray_serve.py").read_text())
    assert {node.name for node in tree.body if isinstance(node, ast.ClassDef)} == {"Replica"}


def test_the_ray_template_notices_who_leaves_before_the_answer():
    tree = ast.parse((LAUNCH / "ray_serve.py").read_text())
    wanted = ("_unless_gone", "_gone")
    tree.body = [node for node in tree.body if getattr(node, "name", None) in wanted]
    names: dict = {"asyncio": asyncio, "Any": Any, "Coroutine": Coroutine}
    names |= {"Request": Any, "httpx": httpx}
    exec(compile(tree, "ray_serve.py", "exec"), names)

    async def check():
        messages = [{"type": "http.request"}, {"type": "http.disconnect"}]
        cancelled, is_read = asyncio.Event(), asyncio.Event()
        is_read.set()

        class Asked:
            async def receive(self):
                if not messages:
                    await asyncio.Event().wait()
                return messages.pop(0)

        async def silent():
            try:
                await asyncio.Event().wait()
            finally:
                cancelled.set()

        async def quick():
            return "told"

        async with asyncio.timeout(5):
            assert await names["_unless_gone"](Asked(), is_read, silent()) is None
            assert cancelled.is_set()
            assert await names["_unless_gone"](Asked(), is_read, quick()) == "told"

    asyncio.run(check())


@pytest.mark.parametrize("name", ["nginx.conf", "Caddyfile"])
def test_the_proxies_templates_are_balanced(name):
    text = re.sub(r"#.*", "", (LAUNCH / name).read_text())
    assert text.count("{") == text.count("}") > 3
    if name == "nginx.conf":
        assert all(re.search(r"[;{}]$", line.strip()) for line in text.splitlines() if line.strip())
        assert Limits().max_body_bytes == 2 << 20
        assert "client_max_body_size 2m;" in text


def test_the_page_has_every_option():
    named = set(re.findall(r"`(--[a-z][\w.-]*)", PAGE))
    assert named == OPTIONS | {"--api-key"}


def test_the_page_has_every_metric():
    rendered = Metrics().render().decode()
    names = set(re.findall(r"^# TYPE (meshlm_\w+) ", rendered, re.MULTILINE))
    names = {name for name in names if not name.endswith("_created")}
    told = set(re.findall(r"`(meshlm_\w+)", PAGE))
    assert told == names
    for reason in (*FINISHED, *REJECTED):
        assert f"`{reason}`" in PAGE
