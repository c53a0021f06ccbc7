"""Text from bytes, piece by piece: the joined pieces are the text that decoding at once gives."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from meshlm.generation.text import TextStream


def cut_at_first_stop(text: str, stop: list[str]) -> str:
    """Plain reference: looks at every end, in order."""
    for end in range(len(text) + 1):
        starts = [end - len(s) for s in stop if s and text[:end].endswith(s)]
        if starts:
            return text[: min(starts)]
    return text


def run(pieces: list[bytes], stop: list[str]) -> tuple[list[str], bool]:
    stream = TextStream(stop)
    shown = [stream.push(piece) for piece in pieces]
    shown.append(stream.finish())
    return shown, stream.stopped


def cut(data: bytes, places: list[int]) -> list[bytes]:
    ends = sorted(place % (len(data) + 1) for place in places)
    return [data[a:b] for a, b in zip([0, *ends], [*ends, len(data)], strict=True)]


PLACES = st.lists(st.integers(0, 1000), max_size=12)


@given(st.binary(max_size=60), PLACES)
def test_any_bytes_cut_anywhere_give_the_text_of_decoding_at_once(
    data: bytes, places: list[int]
) -> None:
    shown, _ = run(cut(data, places), [])
    assert "".join(shown) == data.decode("utf-8", errors="replace")


@given(
    st.text(alphabet="abé→😀", max_size=40),
    PLACES,
    st.lists(st.text(alphabet="abé→😀", min_size=1, max_size=4), max_size=3),
)
def test_stop_texts_do_not_depend_on_where_tokens_end(
    text: str, places: list[int], stop: list[str]
) -> None:
    shown, stopped = run(cut(text.encode(), places), stop)
    expected = cut_at_first_stop(text, stop)
    assert "".join(shown) == expected
    assert stopped == any(s in text for s in stop)


@given(st.text(alphabet="abc", max_size=30), st.lists(st.text("abc", min_size=1), max_size=3))
def test_nothing_waits_that_cannot_be_a_stop(text: str, stop: list[str]) -> None:
    stream = TextStream(stop)
    shown = ""
    for i, character in enumerate(text):
        shown += stream.push(character.encode())
        if stream.stopped:
            break
        waiting = text[len(shown) : i + 1]
        assert waiting == "" or any(s.startswith(waiting) and s != waiting for s in stop)


def test_half_a_character_waits_for_the_rest() -> None:
    stream = TextStream()
    first, second = "é".encode()[:1], "é".encode()[1:]
    assert stream.push(b"a" + first) == "a"
    assert stream.push(second) == "é"


def test_half_a_character_at_the_end_becomes_a_replacement() -> None:
    shown, _ = run([b"a\xe2\x82"], [])
    assert shown == ["a", "�"]


def test_what_begins_a_stop_is_shown_once_it_is_none() -> None:
    shown, stopped = run([b"one\n", b"two\n", b"\nthree"], ["\n\n"])
    assert shown == ["one", "\ntwo", "", ""]
    assert stopped


def test_unfinished_stop_is_text_at_the_end() -> None:
    assert run([b"a STO"], ["STOP"]) == (["a ", "STO"], False)


def test_of_two_stops_the_one_complete_first_wins() -> None:
    assert run([b"xabc"], ["abc", "b"]) == (["xa", ""], True)


def test_of_two_stops_that_end_together_the_longer_wins() -> None:
    assert run([b"xabc"], ["bc", "abc"]) == (["x", ""], True)


def test_nothing_comes_after_a_stop() -> None:
    stream = TextStream(["."])
    assert stream.push(b"a.b") == "a"
    assert stream.push(b"c") == ""
    assert stream.finish() == ""
