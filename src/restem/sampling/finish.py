"""When a completion ends, and what is kept of it: stop strings are matched on text, across token borders.

The completion is cut right before the stop string. Where the cut falls inside a token, the kept characters of that token are
tokenised again: the only tokens of a sample that were not sampled as such.
"""

from __future__ import annotations

from collections.abc import Sequence

from restem.prompts import Renderer


class Finisher:
    """Watches completions for stop strings."""

    def __init__(self, renderer: Renderer, stop: tuple[str, ...]) -> None:
        self.renderer, self.stop = renderer, stop
        # A token adds at least one character, save for parts of one character in bytes: hence the margin.
        self.tail = max((len(text) for text in stop), default=0) + 8
        self._closing: dict[int, bool] = {}

    def stops(self, tokens: Sequence[int]) -> bool:
        """True if the last token completed a stop string."""
        if not self.stop or not self._may_close(tokens[-1]):
            return False
        text = self.renderer.decode(list(tokens[-self.tail :]))
        return any(stop in text for stop in self.stop)

    def _may_close(self, token: int) -> bool:
        """Whether a token holds the last character of a stop string, or parts of characters. Most do not: worth knowing."""
        if token not in self._closing:
            text = self.renderer.decode([token])
            self._closing[token] = "\ufffd" in text or any(stop[-1] in text for stop in self.stop)
        return self._closing[token]

    def close(self, tokens: Sequence[int]) -> tuple[list[int], str]:
        """The tokens and the text that are kept."""
        text = self.renderer.decode(list(tokens))
        cut = min((place for stop in self.stop if (place := text.find(stop)) >= 0), default=-1)
        if cut < 0:
            return list(tokens), text
        kept, head = len(tokens), text
        while not (text.startswith(head) and len(head) <= cut):
            kept -= 1
            head = self.renderer.decode(list(tokens[:kept]))
        rest = self.renderer.tokenizer(text[len(head) : cut], add_special_tokens=False)["input_ids"]
        return [*tokens[:kept], *rest], text[:cut]
