"""`/tokenize`, `/detokenize` and `/tokenizer_info`: pure, from fields to an answer."""

from typing import Any

from meshlm.serving.api.logprobs import token_name
from meshlm.serving.api.prompts import Vocabulary, check_ids, encode_text
from meshlm.serving.api.protocol import DetokenizeRequest, TokenizeRequest
from meshlm.serving.errors import bad_field


def tokenize(request: TokenizeRequest, vocabulary: Vocabulary) -> dict[str, Any]:
    """Returns the ids of a text.

    A text that is nothing but end-of-text's name is that token: clients ask for its id this way.

    Raises:
        ApiError: 400 unless there is one of `prompt` and `text`.
    """
    given = [text for text in (request.prompt, request.text) if text is not None]
    if len(given) != 1:
        raise bad_field("prompt", "give the text as one of prompt and text")
    text = given[0]
    tokenizer = vocabulary.tokenizer
    is_end = text == tokenizer.end_of_text
    tokens = [tokenizer.end_of_text_id] if is_end else encode_text("prompt", text, vocabulary)
    found: dict[str, Any] = {
        "tokens": tokens,
        "count": len(tokens),
        "max_model_len": vocabulary.context_length,
    }
    if request.return_token_strs:
        found["token_strs"] = [token_name(tokenizer, token) for token in tokens]
    return found


def detokenize(request: DetokenizeRequest, vocabulary: Vocabulary) -> dict[str, Any]:
    """Returns the text of ids; raises the 400 that names one that is no token."""
    check_ids("tokens", request.tokens, vocabulary.size)
    return {"prompt": vocabulary.tokenizer.decode(request.tokens)}


def tokenizer_info(vocabulary: Vocabulary) -> dict[str, Any]:
    """Returns what clients that tokenize by this server want to know."""
    tokenizer, special_tokens = vocabulary.tokenizer, vocabulary.special_tokens
    ends = special_tokens.end_ids(tokenizer)
    own_end = special_tokens.eos_token
    is_end = own_end is not None and tokenizer.id_of(own_end) in ends
    return {
        "tokenizer_class": "GPT2Tokenizer",
        "name": tokenizer.name,
        "fingerprint": tokenizer.fingerprint,
        "vocab_size": tokenizer.vocab_size,
        "model_max_length": vocabulary.context_length,
        "bos_token": special_tokens.bos_token or tokenizer.end_of_text,
        "eos_token": own_end if is_end else tokenizer.decode(ends[:1]),
        "eos_token_id": tokenizer.id_of(own_end) if own_end and is_end else ends[0],
        "eos_token_ids": list(ends),
        "unk_token": special_tokens.unk_token,
        "pad_token": special_tokens.pad_token,
        "special_tokens": special_tokens.mode,
        "add_bos_token": False,
        "chat_template": None,
    }
