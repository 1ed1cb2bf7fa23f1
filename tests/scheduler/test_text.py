"""Text that streams: whole characters only, nothing after a stop string, nothing withheld at the end."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from scheduler.text import Detokenizer, StopStrings


def byte_tokenizer() -> Tokenizer:
    """Byte-level BPE without merges: a token per byte, so that most characters are cut."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={char: index for index, char in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


TOKENIZER = byte_tokenizer()
# Real text hasn't the replacement character; it stands for what is broken.
any_text = st.text(
    st.characters(exclude_characters="\N{REPLACEMENT CHARACTER}", exclude_categories=["Cs"]), max_size=40
)


@given(prompt=any_text, text=any_text)
@settings(deadline=None)
def test_pieces_add_up_and_are_never_broken(prompt, text):
    detokenizer = Detokenizer(TOKENIZER, TOKENIZER.encode(prompt).ids)
    pieces = [detokenizer.push(token) for token in TOKENIZER.encode(text).ids]
    assert "\N{REPLACEMENT CHARACTER}" not in "".join(pieces)
    assert "".join(pieces) + detokenizer.finish() == text


@given(text=any_text.filter(bool), cut=st.integers(1, 3))
@settings(deadline=None)
def test_a_character_cut_off_by_length_is_left_out(text, cut):
    ids = TOKENIZER.encode(text + "\N{FACE WITH TEARS OF JOY}").ids[:-cut]
    detokenizer = Detokenizer(TOKENIZER, TOKENIZER.encode("x").ids)
    assert "".join(map(detokenizer.push, ids)) + detokenizer.finish() == text


@given(ids=st.lists(st.integers(0, 255), max_size=60))
@settings(deadline=None)
def test_any_bytes_a_model_may_come_up_with_are_survived(ids):
    detokenizer = Detokenizer(TOKENIZER, TOKENIZER.encode("prompt").ids)
    text = "".join(map(detokenizer.push, ids)) + detokenizer.finish()
    text.encode()


@given(
    pieces=st.lists(st.text("abc🚌", max_size=4), max_size=20),
    stops=st.lists(st.text("abc🚌", min_size=1, max_size=4), max_size=3),
)
def test_stop_strings_anywhere_across_pieces(pieces, stops):
    scanner = StopStrings(stops)
    published = ""
    for piece in pieces:
        out = scanner.push(piece)
        published += out
        if scanner.stopped:
            break
    else:
        published += scanner.finish()
    whole = "".join(pieces)
    found = [whole.find(stop) for stop in stops if stop in whole]
    if not found:
        assert published == whole
        return
    # It stops with the piece that completes the first stop string; of several complete by then, at the leftmost.
    assert scanner.stopped
    assert whole.startswith(published)
    assert not any(stop in published for stop in stops)
    assert any(whole.startswith(stop, len(published)) for stop in stops)


@pytest.mark.parametrize(
    ("stop", "pieces", "out"),
    [("END", ["ab", "E", "N", "X"], ["ab", "", "", "ENX"]), ("aab", ["aa", "ab!"], ["", "a"])],
)
def test_what_may_become_a_stop_string_is_held_back_only_so_long(stop, pieces, out):
    scanner = StopStrings([stop])
    assert [scanner.push(piece) for piece in pieces] == out
