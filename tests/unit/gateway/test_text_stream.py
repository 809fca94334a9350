"""Streamed text is the decoded text up to the first stop string, however the tokens arrive."""

from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models

from expertmesh.services.gateway.text_stream import Decode, TextStream

SPECIAL_ID = 0


def byte_level() -> Decode:
    """GPT-2's: every id is a run of bytes, some of them not whole characters."""
    alphabet = sorted(_byte_chars().values())
    pieces = [*alphabet, "ab", "bc", "Ġa", "\u00e2\u0124", "\u00c3\u00a9"]
    vocab = {piece: index + 1 for index, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.BPE({"<s>": SPECIAL_ID} | vocab, []))
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<s>"])
    return lambda ids: str(tokenizer.decode(list(ids)))


def _byte_chars() -> dict[int, str]:
    """GPT-2's printable stand-ins for the 256 bytes."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [byte for byte in range(256) if byte not in plain]
    return {b: chr(b) for b in plain} | {b: chr(256 + i) for i, b in enumerate(rest)}


def sentencepiece() -> Decode:
    """Llama's: words carry their space, the first one is stripped, rare characters are bytes."""
    pieces = ["<s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    pieces += ["\u2581a", "\u2581b", "a", "b", "c", "\u2581", "\u2581\u2581c", "\u00e9"]
    vocab = {piece: index for index, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.BPE(vocab, [], byte_fallback=True))
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("\u2581", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    tokenizer.add_special_tokens(["<s>"])
    return lambda ids: str(tokenizer.decode(list(ids)))


DECODERS = {"byte_level": byte_level(), "sentencepiece": sentencepiece()}


def first_stop(text: str, stop: Sequence[str]) -> int | None:
    """Where the stop string begins that is complete first."""
    for end in range(1, len(text) + 1):
        starts = [end - len(s) for s in stop if text[:end].endswith(s)]
        if starts:
            return min(starts)
    return None


def streamed(decode: Decode, chunks: Sequence[Sequence[int]], stop: Sequence[str]) -> list[str]:
    stream = TextStream(decode, stop)
    texts = []
    for chunk in chunks:
        piece = stream.push(chunk)
        texts.append(piece.text)
        if piece.stopped:
            return texts
    return [*texts, stream.flush().text]


def chunks_of(ids: st.SearchStrategy[list[int]]) -> st.SearchStrategy[list[list[int]]]:
    """Ids in a row, cut anywhere."""

    def cut(units: list[list[int]], size: int) -> list[list[int]]:
        flat = [token for unit in units for token in unit]
        return [flat[at : at + size] for at in range(0, len(flat), size)]

    return st.builds(cut, st.lists(ids, max_size=12), st.integers(1, 4))


# any bytes, but mostly the end of the vocabulary, which has the longer pieces
ANY_BYTES = st.one_of(st.integers(250, 261), st.integers(0, 261)).map(lambda token: [token])
# a run of byte tokens decodes as a whole or not at all, so whole characters
WHOLE_CHARACTERS = st.one_of(
    st.sampled_from([SPECIAL_ID, *range(257, 265)]).map(lambda token: [token]),
    st.characters(codec="utf-8").map(lambda text: [1 + byte for byte in text.encode()]),
)
UNITS = {"byte_level": ANY_BYTES, "sentencepiece": WHOLE_CHARACTERS}


@pytest.mark.parametrize("kind", DECODERS)
@settings(deadline=None)
@given(data=st.data())
def test_pieces_join_to_the_decoded_text_up_to_the_first_stop(
    kind: str, data: st.DataObject
) -> None:
    decode = DECODERS[kind]
    chunks = data.draw(chunks_of(UNITS[kind]))
    full = decode([token for chunk in chunks for token in chunk])
    substring = st.tuples(st.integers(0, max(len(full) - 1, 0)), st.integers(1, 4)).map(
        lambda span: full[span[0] : span[0] + span[1]]
    )
    stop = data.draw(st.lists(st.one_of(substring, st.text("abc ", min_size=1)), max_size=3))
    stop = [text for text in stop if text]
    texts = streamed(decode, chunks, stop)
    assert "".join(texts) == full[: first_stop(full, stop)]


@given(chunks=chunks_of(ANY_BYTES))
def test_only_whole_characters_before_the_end(chunks: list[list[int]]) -> None:
    decode = DECODERS["byte_level"]
    *texts, _ = streamed(decode, chunks, ())
    assert not any(text.endswith("\ufffd") for text in texts)


def ids_of(text: str) -> list[int]:
    alphabet = sorted(_byte_chars().values())
    return [1 + alphabet.index(_byte_chars()[byte]) for byte in text.encode()]


def test_a_character_of_three_tokens_comes_out_once_complete() -> None:
    stream = TextStream(DECODERS["byte_level"])
    pieces = [stream.push([token]).text for token in ids_of("a\u20acb")]
    assert pieces == ["a", "", "", "\u20ac", "b"]


def test_possible_beginning_of_a_stop_is_held_back_until_decided() -> None:
    stream = TextStream(DECODERS["byte_level"], ["###"])
    pieces = [stream.push([token]) for token in ids_of("x##y###")]
    assert [piece.text for piece in pieces] == ["x", "", "", "##y", "", "", ""]
    assert [piece.stopped for piece in pieces] == [False] * 6 + [True]


def test_a_wrong_byte_after_a_character_leaves_the_character() -> None:
    stream = TextStream(DECODERS["sentencepiece"])
    euro = [1 + byte for byte in "\u20ac".encode()]
    assert stream.push(euro).text == "\u20ac"
    assert stream.push([euro[0]]).text == ""
    assert stream.flush().text == "\ufffd"


def test_flush_gives_what_was_held_back() -> None:
    stream = TextStream(DECODERS["byte_level"], ["###"])
    stream.push(ids_of("x##"))
    stream.push(ids_of("\u20ac")[:2])
    assert stream.flush().text == "##\ufffd"


def test_decoding_cost_does_not_grow_with_the_text() -> None:
    decode, seen = DECODERS["byte_level"], []

    def counting(ids: Sequence[int]) -> str:
        seen.append(len(ids))
        return decode(ids)

    stream = TextStream(counting)
    for token in ids_of("abcdefgh" * 50):
        stream.push([token])
    assert max(seen) <= 4
