"""THE table: every stage and verb, with its module, its door at a documented path, and its default YAML.

`sop --help`, the test of the doors, the docs index and the pipeline runner all derive from it.
"""

from __future__ import annotations

from typing import NamedTuple

from .errors import SopError, suggest


class Entry(NamedTuple):
    """One command. `name` is `group.verb` and the module's name below the package (`ops` verbs have no group on the command line)."""

    name: str
    help: str
    config: str = ""
    door: str = ""
    stage: bool = True

    @property
    def module(self) -> str:
        return f"self_model_sop.{self.name}"

    @property
    def command(self) -> tuple[str, ...]:
        group, _, verb = self.name.partition(".")
        words = verb.replace("_", "-")
        return (words,) if group == "ops" else (group, words)


_TOKENIZER = "config/tokenizer_config/config.yaml"

STAGES: tuple[Entry, ...] = (
    Entry("data.model", "bring a base model: hub, mirror, ModelScope, a folder, or an installed package", "config/model_config/base.yaml"),
    Entry("data.fetch", "fetch a dataset, every field as it is", "config/data_config/fetch.yaml", "data_process/fetch_dataset.py"),
    Entry("data.process", "clean, filter, deduplicate, split", "config/data_config/process.yaml", "data_process/process_data.py"),
    Entry("data.preference", "preference pairs, and prompts for RL", "config/data_config/preference.yaml", "data_process/process_preference.py"),
    Entry("data.inspect", "what became of every row, on one page", stage=False),
    Entry("tokenizer.baseline", "record the base tokenizer as the contract", _TOKENIZER, "tokenizer/aux_tokenizer/extract_tokenizer_config.py"),
    Entry("tokenizer.corpus", "training and held-out text for the tokenizer", _TOKENIZER),
    Entry("tokenizer.train", "train the auxiliary tokenizer on the domain corpus", _TOKENIZER, "tokenizer/aux_tokenizer/train_aux_tokenizer.py"),
    Entry("tokenizer.select", "choose new tokens by measured gain", _TOKENIZER, "tokenizer/aux_tokenizer/select_new_tokens.py"),
    Entry("tokenizer.extend", "append the chosen tokens; the old ones never move", _TOKENIZER, "tokenizer/aux_tokenizer/extend_base_tokenizer.py"),
    Entry("tokenizer.resize", "grow the embeddings and initialise the new rows", _TOKENIZER, "tokenizer/aux_tokenizer/resize_embeddings.py"),
    Entry("tokenizer.evaluate", "compare two tokenizers on a text", _TOKENIZER, "tokenizer/evaluate/eval_tokenizer.py"),
    Entry("tokenizer.mlm_loss", "masked-token loss of a masked model", "", "tokenizer/evaluate/eval_mlm_loss.py", stage=False),
    Entry("train.pretrain", "continued pretraining", "config/self_model_config/pretrain.yaml", "self_model/pretrain/train_pretrain.py"),
    Entry("train.sft", "supervised fine-tuning", "config/self_model_config/finetune.yaml", "self_model/fine_tuning/train_finetune.py"),
    Entry("train.dpo", "learn preferences: DPO, KTO, ORPO, SimPO", "config/self_model_config/rlhf.yaml", "self_model/rlhf/train_dpo.py"),
    Entry("train.reward", "a reward model from pairs of answers", "config/self_model_config/rlhf.yaml", "self_model/rlhf/train_reward.py"),
    Entry("train.grpo", "learn from rewards: GRPO, RLOO", "config/self_model_config/rlhf.yaml", "self_model/rlhf/train_grpo.py"),
    Entry("train.ppo", "learn from rewards with a critic: PPO by verl", "config/self_model_config/rlhf.yaml", "self_model/rlhf/train_ppo.py"),
    Entry("train.merge", "merge an adapter into its base model", "config/self_model_config/merge.yaml", "self_model/merge_lora.py"),
    Entry("train.lint", "show exactly which tokens are trained", "config/self_model_config/finetune.yaml", stage=False),
    Entry("eval.mcq", "multiple-choice questions to several models, with intervals", "config/eval_config/mcq.yaml"),
    Entry("eval.compare", "bits per byte and answers of several models, side by side", "config/eval_config/compare.yaml"),
    Entry("infer.gguf", "export to GGUF for llama.cpp and Ollama, proven equal", "config/infer_config/gguf.yaml", "inference/llama.cpp/convert_to_gguf.py"),
    Entry("infer.gptq", "quantise to 4 bits by GPTQ, calibrated on your text", "config/infer_config/gptq.yaml", "inference/quantize/gptq_quantize.py"),
    Entry("infer.awq", "quantise to 4 bits by AWQ, calibrated on your text", "config/infer_config/awq.yaml", "inference/quantize/awq_quantize.py"),
    Entry("infer.chat", "talk to a trained model", "config/infer_config/chat.yaml", stage=False),
    Entry("infer.serve", "an OpenAI-compatible API on this machine", "config/infer_config/serve.yaml", stage=False),
    Entry("infer.vllm", "serve on a GPU through vLLM, after checking the artifact", "config/infer_config/vllm.yaml", stage=False),
    Entry("ops.run", "run a whole pipeline", stage=False),
    Entry("ops.init", "write the configs and the sample data into a folder", stage=False),
    Entry("ops.config", "check or show a configuration", stage=False),
    Entry("ops.runs", "list and verify artifacts", stage=False),
    Entry("ops.report", "one HTML page about a finished run", stage=False),
    Entry("ops.card", "the model card of an artifact, from the manifests of its lineage", stage=False),
    Entry("ops.doctor", "what this machine can do, and what is missing", stage=False),
)


def by_name(name: str) -> Entry:
    """The entry of a stage, with a suggestion where there is none."""
    for entry in STAGES:
        if entry.name == name:
            return entry
    raise SopError(f"no stage {name!r}", fix=suggest(name, [e.name for e in STAGES], "stages: " + ", ".join(e.name for e in STAGES if e.stage)))
