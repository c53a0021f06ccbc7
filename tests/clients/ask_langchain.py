"""langchain-openai: both of its models, invoked, streamed, and in a batch."""

from typing import Any

from langchain_core.messages import AIMessageChunk, HumanMessage
from langchain_openai import ChatOpenAI, OpenAI
from loopback import BASE_URL, COMMON, MESSAGES, MORE, PROMPT, TOOL, answer, refusal

SERVED: Any = {"base_url": BASE_URL, "api_key": "none", "model": "tiny", "max_retries": 0}
text = OpenAI(**SERVED, **COMMON, temperature=1)
chat = ChatOpenAI(**SERVED, **COMMON)

said = chat.invoke(MESSAGES)
streamed = sum(chat.stream(MESSAGES, stream_usage=True), AIMessageChunk(""))
v1 = ChatOpenAI(**SERVED, **COMMON, output_version="v1")
answer(
    text=text.invoke(PROMPT),
    text_stream="".join(text.stream(PROMPT)),
    text_batch=text.batch([PROMPT, MORE])[0],
    chat=str(said.content),
    chat_stream=str(streamed.content),
    chat_batch=str(chat.batch([MESSAGES, MORE])[0].content),
    chat_blocks=v1.invoke(MESSAGES).text,
    chat_no_tools=str(chat.bind_tools([]).invoke(MESSAGES).content),
    second=str(chat.invoke([*MESSAGES, said, HumanMessage(MORE, name="somebody")]).content),
    second_streamed=str(chat.invoke([*MESSAGES, streamed, HumanMessage(MORE)]).content),
    second_blocks=v1.invoke([*MESSAGES, v1.invoke(MESSAGES), HumanMessage(MORE)]).text,
    refused_tools=refusal(lambda: chat.bind_tools([TOOL]).invoke(MESSAGES)),
)
