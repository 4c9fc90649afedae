"""What of a model's text is its answer: the part after the thought, and the places where it concludes."""

from __future__ import annotations

import re
from collections.abc import Iterator

_CONCLUDES = re.compile(
    r"(?:最终|正确|标准|参考)?(?:答案|结果|结论|得数)(?:应该?|应当|就|便)?(?:是|为|等于|选择?|[:=])+|(?<!不)(?<!相)等于|(?:因此|所以|故而?|综上(?:所述)?)[,:]?\s*(?:应该?|共|一共|总共)?(?:是|为|选|得|需要?|有)|####|"
    r"\b(?:the\s+)?(?:final\s+)?answer\s*(?:is|:|=)",
    re.IGNORECASE,
)
_BOXED = re.compile(r"\\boxed\s*\{([^{}]*)\}")
_TAGGED = re.compile(r"<answer>(.*?)</answer>", re.DOTALL | re.IGNORECASE)


def spoken(text: str) -> str:
    """The text after a closed thought; an unclosed one is no answer yet."""
    _, closed, tail = text.rpartition("</think>")
    if closed:
        return tail
    return "" if "<think>" in text else text


def marked(text: str) -> str | None:
    """The content of the last `<answer>` or `\\boxed{}`, or None where there is none."""
    found = [*_TAGGED.finditer(text), *_BOXED.finditer(text)]
    return max(found, key=lambda m: m.end())[1] if found else None


def conclusions(text: str) -> Iterator[str]:
    """What follows each mark of a conclusion (答案是, 所以共, ####, ...) up to the next mark or the end of its line, the last one first.

    `text` is folded: a comma is `,` and a colon `:`.
    """
    ends = len(text)
    for mark in reversed(list(_CONCLUDES.finditer(text))):
        piece = re.split(r"[\n。!?;]", text[mark.end() : ends], maxsplit=1)[0].strip()
        ends = mark.start()
        if piece:
            yield piece
