"""The private names of torch that the compiled kernels rely on."""

from __future__ import annotations

from kalman_rl.hooks import HookedMethod, Host

TORCH = Host(
    "torch",
    ">=2.7",
    {
        "torch.autograd.forward_ad": {"_current_level": None},
        "torch._C._functorch": {"peek_interpreter_stack": HookedMethod()},
    },
    otherwise="plain torch computes the same, slower",
)
