"""Simon Willison's llm, told of the server by its extra-openai-models.yaml: command and library."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from loopback import BASE_URL, COMMON, MESSAGES, MORE, PROMPT, answer, refusal

# No dashes before keys: a document of JSON is one of YAML.
MODELS: Any = [
    {"model_id": "tiny-text", "model_name": "tiny", "api_base": BASE_URL, "completion": True},
    {"model_id": "tiny-chat", "model_name": "tiny", "api_base": BASE_URL},
]
SYSTEM, USER = (message["content"] for message in MESSAGES)


def ask(*words: str) -> str:
    """What the command prints."""
    options = [word for name, value in COMMON.items() for word in ("-o", name, str(value))]
    command = [sys.executable, "-m", "llm", *words, *options]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, check=True)
    return done.stdout.decode().removesuffix("\n")


with tempfile.TemporaryDirectory() as home:
    Path(home, "extra-openai-models.yaml").write_text(json.dumps(MODELS))
    os.environ["LLM_USER_PATH"] = home
    import llm

    text, chat = llm.get_model("tiny-text"), llm.get_model("tiny-chat")
    talk: Any = chat.conversation()
    answer(
        text=text.prompt(PROMPT, stream=False, **COMMON).text(),
        text_stream="".join(text.prompt(PROMPT, **COMMON)),
        text_command=ask("prompt", "-m", "tiny-text", PROMPT),
        chat=talk.prompt(USER, system=SYSTEM, stream=False, **COMMON).text(),
        second=talk.prompt(MORE, **COMMON).text(),
        chat_command=ask("prompt", "-m", "tiny-chat", "-s", SYSTEM, USER, "--no-stream"),
        second_command=ask("prompt", "-c", MORE),
        refused_format=refusal(lambda: chat.prompt(USER, json_object=True).text()),
    )
