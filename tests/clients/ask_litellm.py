"""litellm: completions and chats, as OpenAI's API and as vLLM's, whole, streamed and awaited."""

import asyncio
from typing import Any

from loopback import BASE_URL, COMMON, MESSAGES, MORE, PROMPT, TOOL, answer, refusal

import litellm  # isort: skip - after the variables that loopback sets

litellm.suppress_debug_info = True
SERVED: Any = {"api_base": BASE_URL, "api_key": "none", "num_retries": 0, **COMMON}
NEUTRAL: Any = {
    "functions": [],
    "logit_bias": {},
    "logprobs": False,
    "n": 1,
    "parallel_tool_calls": None,
    "response_format": {"type": "text"},
    "service_tier": "auto",
    "tool_choice": None,
    "tools": [],
    "user": "somebody",
}


def chat(messages: Any = MESSAGES, model: str = "openai/tiny", **options: Any) -> Any:
    return litellm.completion(model, messages, **SERVED, **options)


def text(**options: Any) -> Any:
    model = "text-completion-openai/tiny"
    return litellm.text_completion(model=model, prompt=PROMPT, **SERVED, **options)


async def ask() -> str:
    chunks = await litellm.acompletion("openai/tiny", MESSAGES, stream=True, **SERVED)
    return "".join([chunk.choices[0].delta.content or "" async for chunk in chunks])


said = chat().choices[0].message
chunks = list(chat(stream=True, stream_options={"include_usage": True}))
built: Any = litellm.stream_chunk_builder(chunks, messages=MESSAGES)
mine = {"role": "user", "content": MORE}
answer(
    text=text().choices[0].text,
    text_neutral=text(suffix="", echo=False, logprobs=None, best_of=1).choices[0].text,
    text_stream="".join(chunk.choices[0].text or "" for chunk in text(stream=True)),
    chat=said.content,
    chat_neutral=chat(**NEUTRAL).choices[0].message.content,
    chat_stream="".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices),
    chat_of_vllm=chat(model="hosted_vllm/tiny").choices[0].message.content,
    chat_awaited=asyncio.run(ask()),
    second=chat([*MESSAGES, said, mine]).choices[0].message.content,
    second_dumped=chat([*MESSAGES, said.model_dump(), mine]).choices[0].message.content,
    second_streamed=chat([*MESSAGES, built.choices[0].message, mine]).choices[0].message.content,
    refused_tools=refusal(lambda: chat(tools=[TOOL])),
)
