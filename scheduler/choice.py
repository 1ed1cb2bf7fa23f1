"""One of the answers to a request while it comes: tokens become text, which is cut into pieces."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Self

from protocol.openai import Answer, TokenLogprobs
from protocol.openai import FinishReason as ToldReason
from protocol.plan import Scored
from protocol.request import Request
from scheduler.chat import Chat
from scheduler.core.sequence import FinishReason
from scheduler.journal.entry import Entry, Piece, Token, sequence_id, token_id
from scheduler.logprobs import ScoredText
from scheduler.text import Detokenizer, StopStrings
from scheduler.tools import Said, ToolParser

if TYPE_CHECKING:
    from tokenizers import Tokenizer


@dataclass(slots=True)
class Choice:
    """What it says follows from its text alone, tool calls included. ``reason``: why it has ended, if it has; ``logprob``: the
    sum of its tokens' log probabilities, where they are scored. ``output``: the tokens that an earlier process generated.

    ``cut_at``: the text's length at the end of the newest piece; ``is_begun``: there is one; ``is_closed``: it is the last. A
    piece tells the scores of the tokens that begin in it, so nothing of a stop string.
    """

    request: Request
    index: int
    tokenizer: "Tokenizer"
    detokenizer: Detokenizer
    stops: StopStrings
    tools: ToolParser | None = None
    reason: FinishReason | None = None
    last_token_at: float | None = None
    completion_tokens: int = 0
    logprob: float = 0.0
    text: str = ""
    output: list[int] = field(default_factory=list)
    cut_at: int = 0
    is_begun: bool = False
    is_closed: bool = False
    scored: ScoredText = field(default_factory=ScoredText)
    _uncut: list[Token] = field(default_factory=list)
    _finish: FinishReason | None = None
    _decoded: int = 0

    @classmethod
    def of(cls, entry: Entry, chat: Chat, index: int) -> Self:
        """A choice of which there is nothing yet."""
        request = entry.request
        assert isinstance(request, Request)
        tools = chat.tool_parser(request, sequence_id(entry.id, index))
        keep_special = tools is not None and tools.format.is_special
        return cls(
            request,
            index,
            chat.backend,
            Detokenizer(chat.backend, entry.prompt, keep_special=keep_special),
            StopStrings(request.stop_strings, include=request.include_stop_str_in_output),
            tools,
        )

    def push(self, token: Token, finish: FinishReason | None) -> None:
        """Take one token, with which its sequence ends or not; a stop string may end the choice all the same."""
        self.completion_tokens += 1
        self._uncut.append(token)
        self._finish = finish
        if isinstance(token, Scored):
            self.logprob += token.logprob
        if finish != "stop" or self.request.include_stop_str_in_output:
            if isinstance(token, Scored):
                self.scored.add(token, self._decoded)
            self._scan(self.detokenizer.push(token_id(token)))
        if finish is not None and not self.stops.stopped:
            self._scan(self.detokenizer.finish())
            self.text += self.stops.finish()
        self.reason = "stop" if self.stops.stopped else finish

    def replay(self, piece: Piece) -> None:
        """Take what was journalled of it."""
        self.output += map(token_id, piece.tokens)
        for token in piece.tokens[:-1]:
            self.push(token, None)
        self.push(piece.tokens[-1], piece.finish)

    @property
    def has_news(self) -> bool:
        """Whether there is a piece to cut off: where it is streamed, one that says something."""
        if self.reason is not None:
            return not self.is_closed
        if not self.request.stream:
            return bool(self._uncut)
        return bool(self._uncut) and self.said(len(self.text)) != self.said(self.cut_at)

    def cut(self) -> Piece:
        """End a piece here; of a choice that has ended it is the last."""
        piece = Piece(self._uncut, self.index, self._finish)
        self._uncut = []
        self.cut_at = len(self.text)
        self.is_begun = True
        self.is_closed = self.reason is not None
        return piece

    def said(self, length: int, *, complete: bool = False) -> Said:
        """What this much of the text says."""
        text = self.text[:length]
        return Said(text) if self.tools is None else self.tools.parse(text, complete=complete)

    def told_reason(self, said: Said) -> ToldReason | None:
        """Why it ended, as its tenant is told."""
        return "tool_calls" if said.calls and self.reason == "stop" else self.reason

    def logprobs(self, start: int, end: int, *, last: bool) -> TokenLogprobs | None:
        """Of the tokens that begin in this part of the text; of the ``last`` one at its end too, unless a stop string ends it."""
        if self.request.num_logprobs is None:
            return None
        return self.scored.between(start, None if last and not self.stops.stopped else end, self.tokenizer)

    def answer(self) -> Answer:
        """All of it, once it has ended."""
        said = self.said(len(self.text), complete=True)
        reason = self.told_reason(said)
        assert reason is not None
        return Answer(said.content, reason, said.calls, self.logprobs(0, len(self.text), last=True))

    def _scan(self, text: str) -> None:
        self._decoded += len(text)
        self.text += self.stops.push(text, search=self.completion_tokens > self.request.min_tokens)
