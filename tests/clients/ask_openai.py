"""The openai package: at once and awaited, whole and streamed, with every neutral field."""

import asyncio
from typing import Any

from loopback import BASE_URL, COMMON, MESSAGES, MORE, PROMPT, TOOL, answer, refusal
from openai import AsyncOpenAI, OpenAI

KEY: dict[str, Any] = {"base_url": BASE_URL, "api_key": "none", "max_retries": 0}
TEXT: Any = {"model": "tiny", "prompt": PROMPT, **COMMON}
CHAT: Any = {"model": "tiny", "messages": MESSAGES, **COMMON}
NEUTRAL_TEXT: Any = {
    "best_of": 1,
    "echo": False,
    "frequency_penalty": 0,
    "logit_bias": {},
    "logprobs": None,
    "n": None,
    "presence_penalty": 0,
    "stop": None,
    "suffix": "",
    "temperature": 1,
    "top_p": 1,
    "user": "somebody",
}
NEUTRAL_CHAT: Any = {
    "audio": None,
    "frequency_penalty": 0,
    "function_call": "none",
    "functions": [],
    "logit_bias": None,
    "logprobs": False,
    "metadata": {"for": "a test"},
    "modalities": ["text"],
    "n": 1,
    "parallel_tool_calls": True,
    "prediction": None,
    "presence_penalty": 0,
    "prompt_cache_key": "a",
    "reasoning_effort": None,
    "response_format": {"type": "text"},
    "safety_identifier": "b",
    "service_tier": "auto",
    "stop": ["no such text 1", "2nd no such", "3rd no such", "4th no such", "5th no such"],
    "store": False,
    "stream_options": None,
    "tool_choice": "none",
    "tools": [],
    "top_logprobs": 0,
    "verbosity": "medium",
    "web_search_options": None,
}


def text_of(chunks: Any) -> str:
    return "".join(chunk.choices[0].text for chunk in chunks if chunk.choices)


def chat_of(chunks: Any) -> str:
    return "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)


async def ask() -> dict[str, str]:
    usage = {"include_usage": True, "include_obfuscation": False}
    async with AsyncOpenAI(**KEY) as client:
        text, chat = await asyncio.gather(
            client.completions.create(**TEXT), client.chat.completions.create(**CHAT)
        )
        texts = await client.completions.create(**TEXT, stream=True, stream_options=usage)
        chats = await client.chat.completions.create(**CHAT, stream=True, stream_options=usage)
        return {
            "text_awaited": text.choices[0].text,
            "chat_awaited": chat.choices[0].message.content or "",
            "text_awaited_stream": text_of([chunk async for chunk in texts]),
            "chat_awaited_stream": chat_of([chunk async for chunk in chats]),
        }


with OpenAI(**KEY) as client:
    complete, chat = client.completions, client.chat.completions
    raw = chat.with_raw_response.create(**CHAT)
    said = chat.create(**CHAT, **NEUTRAL_CHAT).choices[0].message
    with chat.stream(**CHAT) as stream:
        helped = "".join(event.delta for event in stream if event.type == "content.delta")
    whole = said.model_dump() | {"id": "msg_1", "name": "tiny", "reasoning_content": None}
    mine: Any = {"role": "user", "content": MORE, "name": "somebody"}
    again = {**CHAT, "messages": [*MESSAGES, whole | {"tool_calls": []}, mine]}
    answer(
        text=complete.create(**TEXT).choices[0].text,
        text_neutral=complete.create(**TEXT, **NEUTRAL_TEXT).choices[0].text,
        text_stream=text_of(complete.create(**TEXT, stream=True)),
        text_raw=complete.with_raw_response.create(**TEXT).parse().choices[0].text,
        chat=chat.create(**CHAT).choices[0].message.content,
        chat_neutral=said.content,
        chat_stream=chat_of(chat.create(**CHAT, stream=True)),
        chat_helper=helped,
        chat_raw=raw.parse().choices[0].message.content,
        second=chat.create(**again).choices[0].message.content,
        refused_tools=refusal(lambda: chat.create(**CHAT, tools=[TOOL])),
        refused_suffix=refusal(lambda: complete.create(**TEXT, suffix="end")),
        **asyncio.run(ask()),
    )
