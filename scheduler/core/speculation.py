"""How many tokens to guess: drafts that are verified in the same step as the decodes (Leviathan et al., "Fast Inference from
Transformers via Speculative Decoding", ICML'23).

While a step has few tokens it takes as long as the weights take to be read, and more tokens cost next to nothing; with many, each
costs its own arithmetic. So a draft is worth its place as long as the chance that it is accepted is above what a token costs, and
that grows with the tokens in the step: from nothing to a token's full price at ``cheap_tokens``, where speculation ends.
"""

from collections.abc import Collection

from protocol.plan import Verdict
from scheduler.core.sequence import Sequence

#: Weight of the newest guess in the moving average of those that were right.
_NEWEST = 0.25
#: A sequence whose drafts aren't worth it tries one every so many tokens all the same: its text may have changed.
_RETRY = 16


class Speculation:
    """Drafts at most ``max_draft`` tokens for a sequence, and none in steps of ``cheap_tokens`` or more."""

    def __init__(self, max_draft: int, cheap_tokens: int) -> None:
        self.max_draft = max_draft
        self.cheap_tokens = cheap_tokens

    def shares(self, decoding: Collection[Sequence], budget: int) -> dict[Sequence, int]:
        """How many tokens may be drafted for which of them in a step that has these decodes, of ``budget`` tokens in all."""
        tokens, most = len(decoding), min(self.cheap_tokens, budget)
        if tokens >= most:
            return {}
        shares = {}
        for sequence in decoding:
            # The last token that it may have needs no computing, so it is never a draft. Who isn't told has a row first,
            # and verdicts carry no scores.
            limit = min(self.max_draft, most - tokens, sequence.end_len - 2 - sequence.computed)
            may_draft = sequence.told and sequence.sampling.logprobs is None
            drafts = min(self._worthwhile(sequence, tokens), limit) if may_draft else 0
            if drafts > 0:
                shares[sequence] = drafts
                tokens += drafts
        return shares

    def observe(self, sequence: Sequence, verdict: Verdict) -> None:
        """Each accepted draft was a right guess; the first rejected one was wrong, and of those after it nothing is known."""
        kept = (1 - _NEWEST) ** verdict.accepted
        sequence.acceptance = 1 - kept * (1 - sequence.acceptance)
        if verdict.accepted < verdict.drafted:
            sequence.acceptance *= 1 - _NEWEST

    def _worthwhile(self, sequence: Sequence, tokens: int) -> int:
        """A draft is accepted only if those before it are."""
        drafts, chance = 0, sequence.acceptance
        while drafts < self.max_draft and chance * self.cheap_tokens > tokens + drafts:
            drafts += 1
            chance *= sequence.acceptance
        if not drafts and sequence.planned_len % _RETRY == 0:
            return 1
        return drafts
