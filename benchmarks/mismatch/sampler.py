"""Completions and their log-probabilities by vLLM, in a process of its own: ``python sampler.py JOB.json``.

The job names a model folder, settings of ``vllm.LLM``, prompts as token ids, how many completions each, how long, and
where to write. It runs with the Python of ``make engines``, which has no need of this package.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

os.environ |= {
    "VLLM_CPU_KVCACHE_SPACE": "2",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
}


def sample(job: dict[str, Any]) -> list[dict[str, Any]]:
    from vllm import LLM, SamplingParams

    engine = LLM(job["model"], enforce_eager=True, logprobs_mode="processed_logprobs", **job["settings"])
    asked = SamplingParams(
        n=job["group"], max_tokens=job["longest"], temperature=1.0, logprobs=0, seed=job["seed"]
    )
    outputs = engine.generate([{"prompt_token_ids": ids} for ids in job["prompts"]], asked, use_tqdm=False)
    return [
        {
            "prompt": index,
            "tokens": list(one.token_ids),
            "logp": [table[token].logprob for token, table in zip(one.token_ids, one.logprobs, strict=True)],
        }
        for index, output in enumerate(outputs)
        for one in output.outputs
    ]


if __name__ == "__main__":
    given = json.loads(Path(sys.argv[1]).read_text())
    Path(given["output"]).write_text(json.dumps(sample(given)))
