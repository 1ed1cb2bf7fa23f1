"""A token's own text and bytes, whatever kind of tokenizer it is of."""

import pytest
from hypothesis import given, settings
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from scheduler.logprobs import token_bytes, token_text
from tests.scheduler.test_text import any_text, byte_tokenizer
from workers.weights import demo_model


def sentencepiece() -> Tokenizer:
    """As Llama 2's: words begin with a mark, and what is in no token comes in bytes."""
    pieces = ["<unk>", "▁", "▁a", "b", "▁the", *(f"<0x{byte:02X}>" for byte in range(256))]
    vocab = {piece: index for index, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>", byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return tokenizer


DEMO = Tokenizer.from_file(str(demo_model() / "tokenizer.json"))


@given(text=any_text)
@settings(deadline=None)
def test_the_bytes_of_a_text_s_tokens_together_are_the_text(text):
    for tokenizer in (byte_tokenizer(), DEMO):
        ids = tokenizer.encode(text).ids
        if tokenizer.decode(ids) != text:
            continue  # the demo model has no tokens for bytes that only rare scripts need
        assert b"".join(token_bytes(tokenizer, token) for token in ids) == text.encode()


@pytest.mark.parametrize(
    ("piece", "value", "text"),
    [
        ("▁the", b" the", " the"),
        ("b", b"b", "b"),
        ("<0xF0>", b"\xf0", r"\xf0"),
        ("<0x41>", b"A", "A"),
        ("▁", b" ", " "),
    ],
)
def test_a_piece_of_sentencepiece_keeps_its_space_and_its_byte(piece, value, text):
    tokenizer = sentencepiece()
    token = tokenizer.token_to_id(piece)
    assert (token_bytes(tokenizer, token), token_text(tokenizer, token)) == (value, text)


def test_special_and_unknown_tokens():
    assert token_text(DEMO, 2) == "<|im_end|>"
    assert token_text(DEMO, DEMO.get_vocab_size() + 1) == ""
    words = Tokenizer(models.WordLevel({"one": 0, "two": 1}, unk_token="one"))
    assert token_text(words, 1) == "two"
