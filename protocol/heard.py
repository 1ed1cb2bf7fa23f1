"""What a client has heard of an answer: chunks may be lost, and the result makes up for them."""

from collections import defaultdict
from dataclasses import dataclass

from protocol.errors import ServiceError
from protocol.openai import ChatChoice, ChatCompletion, EmbeddingList, TextChoice, piece
from protocol.replies import Chunk, Result


@dataclass(slots=True)
class _Choice:
    text: str = ""
    calls: int = 0
    begun: bool = False
    ended: bool = False


class Heard:
    """The chunks that came so far, in their order."""

    def __init__(self) -> None:
        self._chunks = 0
        self._choices: defaultdict[int, _Choice] = defaultdict(_Choice)

    def take(self, chunk: Chunk) -> bool:
        """Whether it is the next one: others came twice, or after one that was lost."""
        if chunk.seq != self._chunks:
            return False
        self._chunks += 1
        choice = self._choices[chunk.index]
        choice.begun = True
        choice.text += chunk.text
        choice.calls += len(chunk.calls)
        choice.ended = chunk.data.choices[0].finish_reason is not None
        return True

    def missing(self, result: Result) -> list[Chunk]:
        """What was lost on the way, as one more chunk for each choice that lacks something.

        Raises ServiceError for a result that doesn't begin with what was heard.
        """
        chunks: list[Chunk] = []
        lossy = self._chunks < result.chunks
        for whole in result.choices:
            heard = self._choices[whole.index]
            rest = whole.text.removeprefix(heard.text)
            if heard.text + rest != whole.text:
                raise ServiceError("internal", "the result doesn't begin with the text that was streamed")
            if rest or (lossy and not heard.ended):
                chunks.append(_rest(result, whole, heard, rest, self._chunks + len(chunks)))
        return chunks


def _rest(result: Result, whole: ChatChoice | TextChoice, heard: _Choice, text: str, seq: int) -> Chunk:
    assert not isinstance(result.data, EmbeddingList)
    data = piece(
        chat=isinstance(result.data, ChatCompletion),
        request_id=result.request_id,
        created=result.data.created,
        model=result.data.model,
        text=text,
        reason=whole.finish_reason,
        first=not heard.begun,
        index=whole.index,
        calls=whole.calls[heard.calls :],
        calls_before=heard.calls,
    )
    return Chunk(result.request_id, seq, data)
