"""Stand-ins for the models and data sets of the hub that TRL's tests load: see trl_suite.py.

Tiny random models, a tokenizer of bytes that has words and marks where Qwen's has them, rows of short prompts. Chat
templates that a test needs in full are read from the installed TRL.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

ORGANIZATION = "trl-internal-testing"
TRAIN, TEST = 17, 2
"""Rows of the data sets."""

WORDS, END = 151_643, 151_659
MARKS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
"""Marks of a chat begin at WORDS, as in Qwen's vocabulary; a random model hardly ever ends a completion."""

WORD_AT = {
    **{330: ' "', 497: '",', 788: '":', 4913: '{"', 5212: ' {"', 11248: "}}\n", 95642: '"}}\n', 314: " {"},
    **{606: "name", 16370: "arguments", 1318: "text", 9520: "step", 293: " b", 6023: "hi"},
    **{64648: "multiply", 7692: "async", 93054: "_multiply", 22785: "_tool", 35744: "increment"},
    **{
        450: "de",
        13477: "crement",
        927: "sh",
        411: "out",
        14172: "tool",
        6659: "call",
        397: ">\n",
        522: "</",
    },
    **{1513: " don", 944: "'t", 1414: " know", 894: " any", 5392: " tool", 2765: " won", 16252: " increment"},
    17453: "Done",
}
"""Words of Qwen's vocabulary by their numbers, because tests write out completions as numbers of tokens."""

MARK_AT = {151_657: "<tool_call>", 151_658: "</tool_call>"}

SMALL = {
    "hidden_size": 8,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 32}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "tiny-Qwen2ForCausalLM-2.5": ("Qwen2", {}),
    "tiny-Qwen3ForCausalLM": ("Qwen3", {"head_dim": 8}),
    "tiny-LlamaForCausalLM-3.2": ("Llama", {}),
    "tiny-MistralForCausalLM-0.2": ("Mistral", {"head_dim": 8}),
    "tiny-Gemma2ForCausalLM": ("Gemma2", {"head_dim": 8}),
    "tiny-Cohere2ForCausalLM": ("Cohere2", {"logit_scale": 1.0}),
    "tiny-GptOssForCausalLM": ("GptOss", {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 8}),
    "tiny-Qwen3MoeForCausalLM": ("Qwen3Moe", {"num_experts": 4, "head_dim": 8, **EXPERTS}),
    "tiny-Glm4MoeForCausalLM": (
        "Glm4Moe",
        {"n_routed_experts": 4, "head_dim": 8, "attention_bias": True, "use_qk_norm": True, **EXPERTS},
    ),
    "tiny-NemotronHForCausalLM-nano": (
        "NemotronH",
        {
            **{"hidden_size": 16, "layers_block_type": ["mamba", "attention", "moe"], "n_routed_experts": 4},
            **{"mamba_num_heads": 8, "mamba_head_dim": 4, "mamba_n_groups": 1, "ssm_state_size": 16},
            **{"mamba_d_conv": 4, "mamba_expand": 2, "use_mamba_kernels": False},
            **{"moe_shared_expert_intermediate_size": 32, **EXPERTS},
        },
    ),
    "tiny-Qwen2ForSequenceClassification-2.5": ("Qwen2", {"num_labels": 1}),
    "tiny-Qwen3ForSequenceClassification": ("Qwen3", {"num_labels": 1, "head_dim": 8}),
    "tiny-LlamaForSequenceClassification-3.2": ("Llama", {"num_labels": 1}),
}
"""Name on the hub -> family of transformers, and what its configuration has besides SMALL."""

TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
REMOTE = """
from transformers import LlamaConfig, LlamaForCausalLM


class RemoteConfig(LlamaConfig):
    model_type = "remote"


class RemoteForCausalLM(LlamaForCausalLM):
    config_class = RemoteConfig
"""
"""Code that lies beside the weights, for the test of trust_remote_code."""


def make_hub(folder: Path) -> None:
    """Every stand-in under ``folder / ORGANIZATION / name``."""
    import torch
    import transformers
    from trl.chat_template_utils import qwen3_chat_template

    transformers.utils.logging.disable_progress_bar()
    words = tokenizer()
    with_tools = tokenizer(qwen3_chat_template)
    for name, (family, options) in MODELS.items():
        kind = "SequenceClassification" if "SequenceClassification" in name else "CausalLM"
        config = getattr(transformers, f"{family}Config")(
            **SMALL | options,
            vocab_size=len(words),
            pad_token_id=words.pad_token_id,
            eos_token_id=words.eos_token_id,
            bos_token_id=None,
        )
        torch.manual_seed(0)
        model = getattr(transformers, f"{family}For{kind}")(config)
        save(model, with_tools if family.startswith("Qwen3") else words, folder / ORGANIZATION / name)
    place = folder / ORGANIZATION / "tiny-RemoteForCausalLM"
    save(
        transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMALL, vocab_size=len(words))), words, place
    )
    (place / "remote.py").write_text(REMOTE)
    written = json.loads((place / "config.json").read_text())
    classes = {"AutoConfig": "remote.RemoteConfig", "AutoModelForCausalLM": "remote.RemoteForCausalLM"}
    changed = {"model_type": "remote", "architectures": ["RemoteForCausalLM"], "auto_map": classes}
    (place / "config.json").write_text(json.dumps(written | changed))
    make_rows(folder / ORGANIZATION / "zen")


def tokenizer(template: str = TEMPLATE) -> Any:
    """Bytes as tokens, in Qwen's order, its marks, and tokens that no text is made of."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    split = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    places = dict(enumerate(sorted(pre_tokenizers.ByteLevel.alphabet())))
    places |= {i: f"word{i}" for i in range(len(places), END)}
    places |= {i: split.pre_tokenize_str(text)[0][0] for i, text in WORD_AT.items()}
    places |= {WORDS + i: mark for i, mark in enumerate(MARKS)} | MARK_AT
    inner = Tokenizer(models.BPE({word: i for i, word in places.items()}, []))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    inner.add_tokens([AddedToken(mark, special=False) for mark in MARK_AT.values()])
    made = PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token=MARKS[0],
        eos_token=MARKS[2],
        additional_special_tokens=[MARKS[1]],
        padding_side="left",
    )
    made.chat_template = template
    return made


def save(model: Any, words: Any, place: Path) -> None:
    """Weights as TRL's tiny models have them: linear maps of Xavier's size, so that outputs differ."""
    import torch

    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            torch.nn.init.xavier_uniform_(module.weight)
    model.to(torch.bfloat16).save_pretrained(place)
    words.save_pretrained(place)


def make_rows(place: Path) -> None:
    """Prompts as text and as messages, in a folder that ``load_dataset`` reads by configuration and split."""
    texts = [f"Counting to {i} is" for i in range(TRAIN + TEST)]
    forms: dict[str, list[dict[str, Any]]] = {
        "standard_prompt_only": [{"prompt": text} for text in texts],
        "conversational_prompt_only": [{"prompt": [{"role": "user", "content": text}]} for text in texts],
    }
    lines = ["---", "configs:"]
    for name, rows in forms.items():
        lines += [f"- config_name: {name}", "  data_files:"]
        for split, part in (("train", rows[:TRAIN]), ("test", rows[TRAIN:])):
            file = place / name / f"{split}.jsonl"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text("".join(json.dumps(row) + "\n" for row in part))
            lines += [f"  - split: {split}", f"    path: {name}/{split}.jsonl"]
    (place / "README.md").write_text("\n".join([*lines, "---", ""]))
