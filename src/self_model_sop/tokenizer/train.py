"""`sop tokenizer train`: an auxiliary SentencePiece tokenizer of the domain corpus, a source of candidates for new tokens."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from .. import console
from ..errors import DATA, SopError
from ..stage import Artifact, Run, stage_main
from . import corpus
from .earlier import TokenizerStage
from .settings import AuxConfig, TokenizerConfig

MODEL = "aux.model"
VOCAB = "aux.vocab"
_TOO_HIGH = re.compile(r"value <= (\d+)")
_TOO_LOW = re.compile(r"smaller than required_chars\. (\d+) vs (\d+)")
_BREAK = re.compile(r"(?<=[。！？；\n])")


def sentences(path: Path, limit: int) -> Iterator[str]:
    """The lines of the corpus, repeated by weight; a line above `limit` bytes comes in several parts, none is lost."""
    for document in corpus.documents(path):
        for line in document.text.split("\n"):
            for part in split(line.strip(), limit):
                for _ in range(max(1, round(document.weight))):
                    yield part


def split(line: str, limit: int) -> Iterator[str]:
    """Parts of at most `limit` bytes, cut behind sentence ends where there are any."""
    part, size = "", 0
    for sentence in _BREAK.split(line):
        while sentence:
            head = sentence.encode()[: max(4, limit)].decode("utf-8", "ignore")
            if part and size + len(head.encode()) > limit:
                yield part
                part, size = "", 0
            part, size, sentence = part + head, size + len(head.encode()), sentence[len(head) :]
    if part:
        yield part


def train(lines: Path, settings: AuxConfig, seed: int) -> tuple[bytes, int]:
    """The serialised model and its vocabulary size, which is smaller than asked for where the corpus supports no more.

    Raises:
        SopError: where `vocab_size` cannot hold the characters of the corpus.
    """
    import sentencepiece

    sentencepiece.set_random_generator_seed(seed)
    size = settings.vocab_size
    while True:
        out = io.BytesIO()
        try:
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=sentences(lines, settings.max_sentence_length), model_writer=out, vocab_size=size, model_type=settings.model_type,
                character_coverage=settings.character_coverage, split_digits=settings.split_digits, byte_fallback=settings.byte_fallback,
                max_sentence_length=settings.max_sentence_length * 2, hard_vocab_limit=True, normalization_rule_name="identity", num_threads=settings.num_threads, minloglevel=2,
            )  # fmt: skip
            return out.getvalue(), size
        except RuntimeError as error:
            size = _smaller(str(error), size)


def _smaller(message: str, size: int) -> int:
    """The vocabulary size that SentencePiece says is possible."""
    low, high = _TOO_LOW.search(message), _TOO_HIGH.search(message)
    if low:
        what = f"aux_tokenizer.vocab_size {low[1]} is below the {low[2]} single characters and bytes of the corpus"
        raise SopError(what, fix=f"raise it to {int(low[2]) * 2} or more, or lower character_coverage", code=DATA)
    if not high or int(high[1]) >= size:
        raise SopError(f"SentencePiece: {message.splitlines()[-1]}", fix="check the corpus and the aux_tokenizer keys", code=DATA)
    console.warn(f"the corpus supports a vocabulary of {high[1]}, not {size}: reduced")
    return int(high[1])


def pieces(model: Path) -> list[tuple[str, float]]:
    """Pieces of a SentencePiece model in order of rank, with their scores; control, byte and unknown pieces are left out."""
    import sentencepiece

    sp = sentencepiece.SentencePieceProcessor(model_file=str(model))
    ids = (i for i in range(sp.get_piece_size()) if not (sp.is_control(i) or sp.is_byte(i) or sp.is_unknown(i)))
    return [(sp.id_to_piece(i), sp.get_score(i)) for i in ids]


# --- the stage ----------------------------------------------------------------------------------------------------------------------------


def build(run: Run[TokenizerConfig]) -> dict[str, Any]:
    """Train, and write the model and its pieces."""
    settings = run.config.aux_tokenizer
    console.note(f"training a SentencePiece {settings.model_type} of up to {settings.vocab_size} pieces")
    data, size = train(run.config.below("corpus").folder / corpus.TRAIN, settings, run.config.seed)
    (run.work / MODEL).write_bytes(data)
    found = pieces(run.work / MODEL)
    (run.work / VOCAB).write_text("".join(f"{piece}\t{score:g}\n" for piece, score in found), encoding="utf-8")
    return {"vocab_size": size, "asked_for": settings.vocab_size, "pieces": len(found), "longest": max((len(p) for p, _ in found), default=0)}


def inputs(config: TokenizerConfig) -> Mapping[str, Path]:
    """The training text."""
    return {"corpus": config.below("corpus").folder / corpus.TRAIN}


def summary(done: Artifact) -> list[str]:
    """One line."""
    s = done.stats
    reduced = f" ({s['asked_for']} asked for; the corpus supports no more)" if s["vocab_size"] < s["asked_for"] else ""
    return [f"{s['vocab_size']} pieces{reduced}, the longest has {s['longest']} characters"]


STAGE = TokenizerStage(
    name="tokenizer.train", version=1, config=TokenizerConfig, output=lambda c: c.below("aux"), build=build, inputs=inputs, uses=("aux_tokenizer", "seed"),
    earlier=lambda c: (corpus.STAGE,), summary=summary, next=lambda c: "sop tokenizer extend",
)  # fmt: skip


def run(config: TokenizerConfig) -> Artifact:
    """Train the auxiliary tokenizer."""
    return STAGE.run(config)


def main(argv: Sequence[str] | None = None) -> int:
    """`sop tokenizer train`."""
    return stage_main(STAGE, argv)
