"""What every test shares: no network, few threads, reproducible examples."""

from __future__ import annotations

import ipaddress
import os
import signal
import socket
from typing import Any

# Before any import of the libraries that read them.
OFFLINE = {
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "TRL_EXPERIMENTAL_SILENCE": "1",
    "WANDB_MODE": "disabled",
}
os.environ.update(OFFLINE)
collect_ignore = [
    "hosts/verl_driver.py",
    "kernels/triton_interpreted.py",
    "kernels/triton_compiled.py",
]  # for processes of their own
if (
    signal.getsignal(signal.SIGINT) is signal.SIG_IGN
):  # as a shell leaves it to what it starts in the background
    signal.signal(signal.SIGINT, signal.default_int_handler)
PARALLEL = "PYTEST_XDIST_WORKER" in os.environ
if PARALLEL:  # for subprocesses too
    os.environ["OMP_NUM_THREADS"] = "1"

import hypothesis  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402

if PARALLEL:
    torch.set_num_threads(1)

hypothesis.settings.register_profile("default", deadline=None)
hypothesis.settings.register_profile("ci", deadline=None, derandomize=True, print_blob=True)
hypothesis.settings.load_profile("ci" if os.environ.get("CI") else "default")


class NetworkBlocked(RuntimeError):
    """A test reached for a machine other than this one."""


def _is_local(host: object) -> bool:
    if host in (None, "", "localhost", b"localhost"):
        return True
    text = host.decode() if isinstance(host, bytes) else str(host)
    try:
        return ipaddress.ip_address(text.partition("%")[0]).is_loopback
    except ValueError:
        return False


def _guarded(method: Any, position: int) -> Any:
    """``method`` of a socket, refusing a remote address in argument ``position``."""

    def call(self: socket.socket, *args: Any) -> Any:
        address = args[position]
        if self.family in (socket.AF_INET, socket.AF_INET6) and not _is_local(address[0]):
            raise NetworkBlocked(
                f"network: got a connection to {address!r}, expected none; tests run offline"
            )
        return method(self, *args)

    return call


@pytest.fixture(scope="session", autouse=True)
def no_network() -> Any:
    """Loopback and Unix sockets only; names of other machines are not even looked up."""
    lookup = socket.getaddrinfo

    def local_lookup(host: Any, *args: Any, **kwargs: Any) -> Any:
        if not _is_local(host):
            raise NetworkBlocked(f"network: got a lookup of {host!r}, expected none; tests run offline")
        return lookup(host, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        for name in ("connect", "connect_ex"):
            patch.setattr(socket.socket, name, _guarded(getattr(socket.socket, name), 0))
        patch.setattr(socket.socket, "sendto", _guarded(socket.socket.sendto, -1))
        patch.setattr(socket, "getaddrinfo", local_lookup)
        yield


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A directory with a language model of one layer and its tokenizer of characters."""
    from benchmarks.chaos.made import tiny_model

    return str(tiny_model(tmp_path_factory.mktemp("model")))
