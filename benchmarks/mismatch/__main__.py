"""SmolLM2-135M sampled by vLLM in several precisions beside a float32 trainer: ``python -m benchmarks.mismatch``.

The gap is ``log p_trainer - log p_sampler`` of each sampled token. The gradient (of the last block's weights, with the
leave-one-out advantage of "the reply begins with the right number") under each correction is compared with the same
samples' gradient under exact weights of whole sequences, which is unbiased for the trainer's own policy. vLLM comes
with ``make engines``. Writes ``benchmarks/results/mismatch``.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from benchmarks.mismatch import measure
from kalman_rl.engine.models.load import load_model
from kalman_rl.instruments.reproduce.smollm2 import LEAD
from kalman_rl.objectives.advantage.group import leave_one_out

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "mismatch"
SAMPLERS: dict[str, dict[str, Any]] = {
    "float32": {"dtype": "float32"},
    "bfloat16": {"dtype": "bfloat16"},
    "bfloat16, fp8 cache": {"dtype": "bfloat16", "kv_cache_dtype": "fp8"},
    "fp8 weights": {"dtype": "bfloat16", "quantization": "fp8"},
}


def questions(number: int, seed: int) -> list[tuple[str, str]]:
    rng = random.Random(seed)
    pairs = [(rng.randint(2, 19), rng.randint(2, 12)) for _ in range(number)]
    return [(f"{LEAD}{a} * {b} = ", str(a * b)) for a, b in pairs]


def sampled_by(name: str, job: dict[str, Any], python: Path, folder: Path) -> list[dict[str, Any]] | str:
    """What the sampler ``name`` returned, or the last line of what it said when it could not start."""
    job = job | {"settings": SAMPLERS[name] | {"max_model_len": 256}, "output": str(folder / "out.json")}
    (folder / "job.json").write_text(json.dumps(job))
    command = [str(python), str(Path(__file__).with_name("sampler.py")), str(folder / "job.json")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        lines = [line for line in done.stderr.strip().splitlines() if "Error" in line]
        return (lines or [f"exit status {done.returncode}"])[-1].strip()
    found: list[dict[str, Any]] = json.loads((folder / "out.json").read_text())
    return found


def advantages(rows: list[dict[str, Any]], texts: list[str], answers: list[str]) -> torch.Tensor:
    """Reward 1 for a reply that begins with the right number and no more digits; minus the others' mean."""
    right = []
    for row, text in zip(rows, texts, strict=True):
        answer = answers[row["prompt"]]
        rest = text.strip().removeprefix(answer)
        right.append(float(text.strip().startswith(answer) and not rest[:1].isdigit()))
    return leave_one_out(torch.tensor(right), torch.tensor([row["prompt"] for row in rows])).float()


def study(
    name: str, rows: list[dict[str, Any]], prompts: list[list[int]], loaded: Any, answers: list[str]
) -> Any:
    tokens = [row["tokens"] for row in rows]
    width = max(map(len, tokens))
    sampler = torch.tensor([row["logp"] + [0.0] * (width - len(row["logp"])) for row in rows])
    mask = torch.tensor([[True] * len(row) + [False] * (width - len(row)) for row in tokens])
    asked = [prompts[row["prompt"]] for row in rows]
    trainer = measure.trainer_logp(loaded.model, asked, tokens)
    sampled = measure.Sampled(asked, tokens, sampler, trainer, mask)
    factors = measure.weights(sampled)
    texts = loaded.tokenizer.batch_decode(tokens)
    advantage = advantages(rows, texts, answers)
    vectors = measure.gradients(loaded.model, sampled, advantage, factors)
    reference = vectors.pop("reference")
    return {
        "sampler": name,
        "rewarded": (advantage > 0).float().mean().item(),
        "gaps": measure.gaps(sampled),
        "noise": measure.noise_models(sampled),
        "corrections": {
            key: {
                "cosine": torch.cosine_similarity(vector.double(), reference.double(), dim=0).item(),
                "length": (vector.norm() / reference.norm()).item(),
                "tokens_kept": (factors[key][mask] > 0).float().mean().item(),
                "ess": measure.ess(factors[key][mask].double().clamp(min=1e-300).log()),
            }
            for key, vector in vectors.items()
        },
    }


def tables(results: list[dict[str, Any]]) -> str:
    lines = [
        "| sampler | tokens | mean gap | largest | of a sequence (rms) | if independent | ESS of sequences |"
    ]
    lines.append("|---|---|---|---|---|---|---|")
    for found in results:
        if "error" in found:
            lines.append(f"| {found['sampler']} | does not load: {found['error']} | | | | | |")
            continue
        gap = found["gaps"]
        lines.append(
            f"| {found['sampler']} | {gap['tokens']} | {gap['size']:.2g} | {gap['largest']:.2g} "
            f"| {gap['sequence_rms']:.2g} | {gap['sequence_rms_if_independent']:.2g} | {gap['sequence_ess']:.4f} |"
        )
    loaded = [found for found in results if "error" not in found]
    for title, key, form in (
        ("Root mean square of the gap by the trainer's probability", "by_probability", "{low:g} to {high:g}"),
        ("Root mean square of the gap by position", "by_position", "{low:g} to {high:g}"),
    ):
        if not loaded:
            break
        edges = [form.format(**row) for row in loaded[0]["gaps"][key]]
        lines += [
            "",
            f"{title}:",
            "",
            "| sampler | " + " | ".join(edges) + " |",
            "|---" * (len(edges) + 1) + "|",
        ]
        for found in loaded:
            values = {form.format(**row): row["rms"] for row in found["gaps"][key]}
            cells = [f"{values[edge]:.2g}" if edge in values else "-" for edge in edges]
            lines.append(f"| {found['sampler']} | " + " | ".join(cells) + " |")
    lines += ["", "Noise models, nats per held-out token above the best (0 is the best):", ""]
    lines += ["| sampler | " + " | ".join(measure.SHAPES) + " |", "|---" * (len(measure.SHAPES) + 1) + "|"]
    for found in loaded:
        costs = [found["noise"][shape]["held_out"] for shape in measure.SHAPES]
        lines.append(f"| {found['sampler']} | " + " | ".join(f"{c - min(costs):.3f}" for c in costs) + " |")
    lines += ["", "Gradient under each correction against exact sequence weights: cosine (length):", ""]
    lines += ["| sampler | " + " | ".join(measure.WEIGHTS) + " |", "|---" * (len(measure.WEIGHTS) + 1) + "|"]
    for found in loaded:
        cells = [found["corrections"][name] for name in measure.WEIGHTS]
        text = [f"{cell['cosine']:.4f} ({cell['length']:.2f})" for cell in cells]
        lines.append(f"| {found['sampler']} | " + " | ".join(text) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--engine", type=Path, default=ROOT / ".venv" / "engines" / "bin" / "python")
    parser.add_argument("--samplers", nargs="+", default=list(SAMPLERS), choices=list(SAMPLERS))
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--group", type=int, default=8)
    parser.add_argument("--longest", type=int, default=64)
    parser.add_argument("--seed", type=int, default=1000)
    parser.add_argument("--output", type=Path, default=RESULTS)
    args = parser.parse_args()
    if not args.engine.exists():
        parser.error(f"--engine: got {args.engine}, which does not exist; run make engines first")

    loaded = load_model("smollm2", cache=ROOT / "runs" / ".cache", dtype="float32", progress=print)
    for parameter in loaded.model.parameters():
        parameter.requires_grad_(False)
    for parameter in loaded.model.model.layers[-1].parameters():
        parameter.requires_grad_(True)
    asked = questions(args.prompts, args.seed)
    prompts = loaded.tokenizer([text for text, _ in asked])["input_ids"]
    job = {
        "model": loaded.path,
        "prompts": prompts,
        "group": args.group,
        "longest": args.longest,
        "seed": args.seed,
    }
    results: list[dict[str, Any]] = []
    for name in args.samplers:
        with tempfile.TemporaryDirectory() as folder:
            rows = sampled_by(name, job, args.engine, Path(folder))
        if isinstance(rows, str):
            results.append({"sampler": name, "error": rows})
        else:
            results.append(study(name, rows, prompts, loaded, [answer for _, answer in asked]))
        print(f"mismatch: {name} done", flush=True)
    args.output.mkdir(parents=True, exist_ok=True)
    command = " ".join(["python -m benchmarks.mismatch", *sys.argv[1:]])
    (args.output / "mismatch.json").write_text(json.dumps({"command": command, "results": results}, indent=1))
    (args.output / "mismatch.md").write_text(f"`{command}`\n\n" + tables(results))
    print(tables(results))


if __name__ == "__main__":
    main()
