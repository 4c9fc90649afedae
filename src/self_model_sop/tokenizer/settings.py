"""`config/tokenizer_config/config.yaml`: one file for all tokenizer stages; each stage names the keys that it reads."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ..artifact import Target
from ..config import option
from ..hub import HubConfig


def _require(section: str, **rules: tuple[bool, str]) -> None:
    """Raise a ValueError that names every value that does not hold its rule."""
    wrong = [f"{section}.{key} must be {rule}" for key, (holds, rule) in rules.items() if not holds]
    if wrong:
        raise ValueError("; ".join(wrong))


@dataclass(frozen=True, kw_only=True)
class CorpusConfig:
    """`corpus:` which text the new tokens are learned from."""

    inputs: tuple[Path, ...] = option((Path("data_process/final_data"),), "processed files or folders (JSONL of any format, txt)", path="input", flag="--input")
    text_fields: tuple[str, ...] = option((), "fields to read; empty: every text of the recognised format")
    weights: dict[str, float] = option(help="source (file or set name) -> weight of its counts; 1 where not named", factory=dict)
    held_out: float = option(0.1, "share of documents kept for measuring, chosen by content hash")
    max_chars: int = option(200_000_000, "at most so many characters, sampled evenly by content hash")

    def __post_init__(self) -> None:
        weighted = all(w >= 0 for w in self.weights.values())
        _require("corpus", held_out=(0 <= self.held_out < 1, "in [0, 1)"), max_chars=(self.max_chars >= 1, "at least 1"), weights=(weighted, "0 or more each"))


@dataclass(frozen=True, kw_only=True)
class AuxConfig:
    """`aux_tokenizer:` the SentencePiece tokenizer trained on the domain corpus."""

    vocab_size: int = option(20_000, "upper bound; reduced, with a word, where the corpus supports fewer")
    model_type: Literal["bpe", "unigram"] = option("bpe", "SentencePiece algorithm")
    character_coverage: float = option(0.9995, "share of characters covered")
    split_digits: bool = option(True, "digits are single pieces")
    byte_fallback: bool = option(True, "unknown characters become bytes")
    max_sentence_length: int = option(16_384, "bytes; longer lines are split, not dropped")
    num_threads: int = option(2, "training threads", cosmetic=True)

    def __post_init__(self) -> None:
        _require(
            "aux_tokenizer", vocab_size=(self.vocab_size >= 1, "at least 1"), character_coverage=(0 < self.character_coverage <= 1, "above 0, at most 1"),
            max_sentence_length=(self.max_sentence_length >= 4, "at least 4 bytes"), num_threads=(self.num_threads >= 1, "at least 1"),
        )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class SelectionConfig:
    """`selection:` which candidates become tokens."""

    method: Literal["auto", "continued_bpe", "sentencepiece", "added_tokens"] = option("auto", "auto: by the kind of the base tokenizer")
    scope: Literal["script", "free", "word"] = option("script", "script: every new token holds Chinese text, so that other text never changes; word: none crosses a jieba word")
    new_tokens: int | None = option(None, "how many; none: stop where the held-out gain falls below min_gain", flag="--new_tokens")
    max_new_tokens: int = option(20_000, "upper bound of the stopping rule")
    min_gain: float = option(20.0, "stop when the next 100 tokens save fewer than this many tokens per million held-out tokens, each")
    min_freq: int = option(5, "fewest uses in the training text")
    max_unused: float = option(0.01, "share of the new tokens that the training text may leave unused (parts of longer ones); the weakest go, the next ones come")
    max_base_pieces: int | None = option(None, "skip candidates that the base tokenizer writes in more pieces than this")
    max_token_chars: int = option(16, "longest new token, in characters: boilerplate is no vocabulary")
    max_samples: int | None = option(None, "read at most so many documents of the training text, evenly spread")
    lexicon: Path | None = option(None, "own terms, one per line, `term<TAB>frequency` allowed; they compete by the same gain", path="input")
    lexicon_share: float = option(0.05, "bases with merges: the terms, as often as their frequencies say, make up this share of the text that gains are measured on")

    def __post_init__(self) -> None:
        positive = {k: getattr(self, k) for k in ("new_tokens", "max_new_tokens", "min_freq", "max_base_pieces", "max_token_chars", "max_samples")}
        _require(
            "selection", **{k: (v is None or v >= 1, "at least 1") for k, v in positive.items()}, min_gain=(self.min_gain >= 0, "0 or more"),
            max_unused=(0 <= self.max_unused <= 1, "in [0, 1]"), lexicon_share=(0 <= self.lexicon_share < 1, "in [0, 1)"),
        )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class ResizeConfig:
    """`resize:` the embeddings of the new rows."""

    kind: Literal["auto", "causal", "masked", "seq2seq"] = option("auto", "model class; auto: by its config")
    init: Literal["auto", "random", "library", "mean_of_pieces", "weighted", "count_bias", "calibrated"] = option(
        "auto", "auto: calibrated for tied causal models, mean_of_pieces for other tied ones, count_bias for untied ones; calibrated: each new token as likely as it is frequent"
    )
    count_bias: float = option(0.5, "strength of the count bias of untied output rows")
    pad_to_multiple_of: int | None = option(None, "round the number of rows up")
    dtype: str = option("auto", "dtype of the saved model; auto: the checkpoint's")


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """`evaluate:` what two tokenizers are compared on."""

    baseline_tokenizer: str | None = option(None, "none: base_tokenizer", path="model", flag="--baseline_tokenizer")
    extended_tokenizer: str | None = option(None, "none: the top-level extended_tokenizer", path="model", flag="--extended_tokenizer")
    test_corpus: tuple[Path, ...] = option((), "text or JSONL files; empty: the held-out text of the corpus stage", path="input", flag="--test_corpus")
    output_dir: Path | None = option(None, "none: <work_dir>/evaluation", path="output", flag="--output_dir")
    lexicon: Path | None = option(None, "terms whose coverage is reported", path="input")
    samples: int = option(12, "texts shown in the HTML report, cut to 160 characters; 0: none of the corpus in the report")

    def __post_init__(self) -> None:
        _require("evaluate", samples=(self.samples >= 0, "0 or more"))


@dataclass(frozen=True, kw_only=True)
class TokenizerConfig:
    """All tokenizer stages."""

    base_tokenizer: str = option("bert-base-chinese", "folder or hub id", path="model", flag="--base_tokenizer")
    base_model: str | None = option(None, "folder or hub id; none: base_tokenizer", path="model", flag="--base_model")
    work_dir: Path = option(Path("tokenizer/data"), "baseline, corpus, auxiliary tokenizer, plan and evaluation go below it", path="output")
    extended_tokenizer: Path = option(Path("tokenizer/merged_tokenizer"), "the extended tokenizer", path="output")
    extended_model: Path = option(Path("tokenizer/merged_model"), "the model with extended embeddings, its tokenizer beside it", path="output")
    corpus: CorpusConfig = option(factory=CorpusConfig)
    aux_tokenizer: AuxConfig = option(factory=AuxConfig)
    selection: SelectionConfig = option(factory=SelectionConfig)
    resize: ResizeConfig = option(factory=ResizeConfig)
    evaluate: EvaluateConfig = option(factory=EvaluateConfig)
    huggingface: HubConfig = option(factory=HubConfig)
    seed: int = option(0, "random seed")

    def below(self, stage: str) -> Target:
        """The artifact folder of an intermediate stage."""
        return Target(self.work_dir / stage)

    def model_source(self) -> str:
        """Where the base model comes from."""
        return self.base_model or self.base_tokenizer


def local(source: str | Path | None) -> Path | None:
    """A model source as an input path, where it is a local folder; hub ids have no local contents to hash."""
    return Path(source) if source is not None and Path(source).exists() else None


Json = dict[str, Any]
