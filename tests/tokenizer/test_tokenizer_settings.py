from __future__ import annotations

from pathlib import Path

import pytest

from self_model_sop.errors import USAGE
from self_model_sop.tokenizer import select
from self_model_sop.tokenizer.settings import AuxConfig, CorpusConfig, EvaluateConfig, SelectionConfig

OUTSIDE = [
    (CorpusConfig, "held_out", 1.0), (CorpusConfig, "max_chars", 0), (CorpusConfig, "weights", {"a": -1.0}), (AuxConfig, "vocab_size", 0), (AuxConfig, "character_coverage", 1.5),
    (AuxConfig, "max_sentence_length", 0), (AuxConfig, "num_threads", 0), (SelectionConfig, "new_tokens", 0), (SelectionConfig, "new_tokens", -5),
    (SelectionConfig, "max_new_tokens", 0),
    (SelectionConfig, "min_freq", 0), (SelectionConfig, "min_gain", -1.0), (SelectionConfig, "max_unused", 1.1), (SelectionConfig, "max_token_chars", 0),
    (SelectionConfig, "max_samples", 0), (SelectionConfig, "max_base_pieces", 0), (SelectionConfig, "lexicon_share", 1.0), (EvaluateConfig, "samples", -1),
]  # fmt: skip


@pytest.mark.parametrize(("section", "key", "value"), OUTSIDE)
def test_a_number_that_makes_no_sense_is_refused_by_name(section: type, key: str, value: object) -> None:
    with pytest.raises(ValueError, match=rf"\.{key} must be "):
        section(**{key: value})


def test_all_of_them_at_once_before_anything_is_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    yaml = tmp_path / "config.yaml"
    yaml.write_text(f"base_tokenizer: nowhere\nwork_dir: {tmp_path / 'work'}\ncorpus:\n  held_out: 2\nselection:\n  new_tokens: -5\n  min_freq: 0\n", encoding="utf-8")
    assert select.main(["--config", str(yaml)]) == USAGE
    said = capsys.readouterr().err
    for words in (":3: corpus: corpus.held_out must be in [0, 1)", "selection.new_tokens must be at least 1; selection.min_freq must be at least 1"):
        assert words in said
    assert not (tmp_path / "work").exists()
