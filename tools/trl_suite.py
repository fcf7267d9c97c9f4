"""Run TRL's own tests of its GRPO trainer with our classes in the place of TRL's, without a network.

    python tools/trl_suite.py --checkout TRL            ours
    python tools/trl_suite.py --checkout TRL --plain    TRL's own classes: what passes at all on this machine
    python tools/trl_suite.py --checkout TRL -k peft    some tests; what stands behind is pytest's

``TRL`` is a checkout of https://github.com/huggingface/trl at the version that is installed. Every test is ``passed``,
``refused`` (an error of ours says why), ``failed``, ``no stand-in`` (a model or data set of the hub that is not made
here) or ``skipped`` by TRL. The exit code is 1 if a test failed or was refused.

Models and data sets of the hub are made here: tiny random models, a tokenizer of bytes, rows of short prompts. The
tests run in a folder where these lie under the names of the hub, so that nothing of TRL or transformers is patched.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

os.environ.update({"HF_HUB_OFFLINE": "1", "TRL_EXPERIMENTAL_SILENCE": "1", "TOKENIZERS_PARALLELISM": "false"})

ORGANIZATION = "trl-internal-testing"
TEST_FILE = "tests/test_grpo_trainer.py"
TRAIN, TEST = 17, 2
"""Rows of the data sets."""

WORDS = 151_643
MARKS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
"""Words and marks of a chat, at the places that Qwen's tokenizer has them, because tests write out numbers of tokens; a
random model hardly ever ends a completion."""

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

    transformers.utils.logging.disable_progress_bar()
    words = tokenizer()
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
        save(model, words, folder / ORGANIZATION / name)
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


def tokenizer() -> Any:
    """Bytes as tokens, the marks of a chat, and tokens that no text has."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    vocabulary |= {f"word{i}": i for i in range(len(vocabulary), WORDS)}
    vocabulary |= {mark: WORDS + i for i, mark in enumerate(MARKS)}
    inner = Tokenizer(models.BPE(vocabulary, []))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    made = PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token=MARKS[0],
        eos_token=MARKS[2],
        additional_special_tokens=[MARKS[1]],
        padding_side="left",
    )
    made.chat_template = TEMPLATE
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


class Outcomes:
    """A plugin of pytest that notes how every test ended, and why."""

    def __init__(self, *, quiet: bool = False) -> None:
        self.found: dict[str, tuple[str, str]] = {}
        self.quiet = quiet

    def pytest_collectreport(self, report: Any) -> None:
        if report.failed:
            self.found[report.nodeid] = "failed", "not collected"
            print(f"not collected: {report.longrepr}", flush=True)

    def pytest_runtest_makereport(self, item: Any, call: Any) -> None:
        if call.when != "call" and call.excinfo is None:
            return
        kind, why = outcome(None if call.excinfo is None else call.excinfo.value)
        name = item.nodeid.rpartition("::")[2]
        if self.found.get(item.nodeid, ("passed", ""))[0] == "passed":
            self.found[item.nodeid] = kind, why
            if not self.quiet:
                print(f"{kind:<12} {name}" + (f": {why}" if why else ""), flush=True)

    def __str__(self) -> str:
        counts = Counter(kind for kind, _ in self.found.values())
        return ", ".join(f"{counts[kind]} {kind}" for kind in KINDS if counts[kind]) or "no test ran"


KINDS = ("passed", "refused", "failed", "no stand-in", "skipped")


def outcome(error: BaseException | None) -> tuple[str, str]:
    """How a test ended, from what it raised, and the first line of the reason.

    >>> outcome(None), outcome(AssertionError("1 == 2"))
    (('passed', ''), ('failed', 'AssertionError: 1 == 2'))
    """
    import pytest

    from kalman_rl.errors import KalmanRLError

    if error is None:
        return "passed", ""
    lines = str(error).strip().splitlines() or [""]
    why = f"{type(error).__name__}: {lines[0][:300]}"
    if isinstance(error, pytest.skip.Exception):
        return "skipped", lines[0]
    if isinstance(error, KalmanRLError):
        return "refused", why
    missing = isinstance(error, OSError) and any(word in str(error) for word in ("offline", "huggingface.co"))
    missing = missing or type(error).__name__ in ("DatasetNotFoundError", "OfflineModeIsEnabled")
    return ("no stand-in" if missing else "failed"), why


def swap() -> None:
    """Let ``from trl import GRPOTrainer, GRPOConfig`` give ours."""
    import trl

    from kalman_rl.hosts.trl import KalmanGRPOConfig, KalmanGRPOTrainer

    trl.GRPOTrainer, trl.GRPOConfig = KalmanGRPOTrainer, KalmanGRPOConfig


def main(words: list[str] | None = None) -> int:
    """Make the stand-ins, run the tests, print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--checkout", type=Path, required=True, help="folder with TRL's repository")
    parser.add_argument("--plain", action="store_true", help="TRL's own classes")
    given, rest = parser.parse_known_args(words)
    checkout = given.checkout.resolve()
    if not (checkout / TEST_FILE).exists():
        parser.error(
            f"--checkout: got {checkout}, expected a folder with {TEST_FILE}; git clone TRL's repository"
        )
    import pytest

    if not given.plain:
        swap()
    outcomes = Outcomes()
    with tempfile.TemporaryDirectory() as folder:
        make_hub(Path(folder))
        before = Path.cwd()
        os.chdir(folder)
        try:
            arguments = [str(checkout / TEST_FILE), f"--rootdir={checkout}", "-c", os.devnull]
            arguments += ["-pno:cacheprovider", "-pno:terminal", f"--basetemp={folder}/tests"]
            pytest.main([*arguments, *rest], plugins=[outcomes])
        finally:
            os.chdir(before)
    print(f"{'TRL' if given.plain else 'ours'}: {outcomes}")
    bad = [kind for kind, _ in outcomes.found.values() if kind in ("failed", "refused")]
    return 1 if bad or not outcomes.found else 0


if __name__ == "__main__":
    sys.exit(main())
