"""The entry point ``verl.plugins``: importing it tells verl about our losses and estimators.

verl imports it in every process, workers included, and hides whatever goes wrong at DEBUG level; so this module
reports what went wrong as a warning, and ``registered()`` lists what is there. The trainer is not registered here: it
would pull verl's whole trainer into every worker.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from kalman_rl.errors import AdapterError
from kalman_rl.hooks import check
from kalman_rl.hosts.verl import cpu
from kalman_rl.hosts.verl.hooks import VERL
from kalman_rl.terminal import logger


def check_host() -> None:
    """Raise AdapterError if the installed verl has other hooks than the ones this adapter was tested on."""
    check(VERL)


def register(*more: str) -> None:
    """Register every method's loss and advantage under ``kalman_rl/NAME``; once, however often it is called.

    Methods of installed packages are among them, and imported when verl first calls them.

    Args:
        more: your own methods as ``module:function``, imported here.

    Raises: ConfigError for one that cannot be imported; AdapterError for an untested verl, or if somebody else holds
        one of the names.
    """
    check_host()
    from verl.trainer.ppo import core_algos

    from kalman_rl.hosts.verl.estimators import TRACKED, make_estimator
    from kalman_rl.hosts.verl.learning import watch_engines
    from kalman_rl.hosts.verl.losses import make_loss
    from kalman_rl.methods import METHODS

    for name in more:
        METHODS[name]  # looked for now, not when verl first calls it
    known = [*METHODS, *more]
    _fill(core_algos.POLICY_LOSS_REGISTRY, known, make_loss, core_algos.register_policy_loss)
    _fill(core_algos.ADV_ESTIMATOR_REGISTRY, [*known, TRACKED], make_estimator, core_algos.register_adv_est)
    _check_runs_first()
    _keep_the_batch()
    watch_engines()
    found = registered()
    logger.info(
        "verl %s: %d policy losses and %d advantage estimators under kalman_rl/",
        _version(),
        len(found["losses"]),
        len(found["estimators"]),
    )


def registered() -> dict[str, list[str]]:
    """Names of ours that verl knows in this process: ``{"losses": [...], "estimators": [...]}``."""
    from verl.trainer.ppo import core_algos

    tables = {"losses": core_algos.POLICY_LOSS_REGISTRY, "estimators": core_algos.ADV_ESTIMATOR_REGISTRY}
    return {
        kind: sorted(str(name) for name, function in table.items() if hasattr(function, "kalman_rl"))
        for kind, table in tables.items()
    }


def _fill(
    table: dict[str, Callable[..., object]],
    names: list[str],
    make: Callable[[str], Callable[..., object]],
    enter: Callable[[str], Callable[[Callable[..., object]], object]],
) -> None:
    for name in names:
        key = f"kalman_rl/{name}"
        if key not in table:
            enter(key)(make(name))
        elif not hasattr(table[key], "kalman_rl"):
            raise AdapterError(f"verl: got {key} registered by {table[key]}, expected the name to be free")


def _check_runs_first() -> None:
    """verl's command line imports ``validate_config`` after this and calls it before anything else."""
    from verl.utils import config as module

    validate = module.validate_config
    if hasattr(validate, "kalman_rl"):
        return

    @functools.wraps(validate)
    def validate_config(config: Any, *args: Any, **options: Any) -> None:
        from kalman_rl.hosts.verl.preflight import check_run

        if cpu.chosen():
            from kalman_rl.hosts.verl.cpu.settings import fit

            fit(config)
        check_run(config)
        validate(config, *args, **options)

    validate_config.kalman_rl = True  # type: ignore[attr-defined]
    module.validate_config = validate_config


def _keep_the_batch() -> None:
    """verl's actor calls ``ppo_loss`` with all that is known of a micro-batch, and that calls the policy loss with
    less: the rollout's log-probabilities are not among it."""
    from verl.workers.utils import losses as module

    from kalman_rl.hosts.verl.losses import BATCH

    inner = module.ppo_loss
    if hasattr(inner, "kalman_rl"):
        return

    @functools.wraps(inner)
    def ppo_loss(config: Any, model_output: Any, data: Any, dp_group: Any = None) -> Any:
        token = BATCH.set(data)
        try:
            return inner(config, model_output, data, dp_group)
        finally:
            BATCH.reset(token)

    ppo_loss.kalman_rl = True  # type: ignore[attr-defined]
    module.ppo_loss = ppo_loss


def _without_trl() -> None:
    """verl 0.9 builds no FSDP actor beside a TRL that has lost a class, though it only renames one of its methods.

    Where TRL has the class no longer, verl is told that there is no TRL; a model with a value head then says that it
    needs one. verl asks when it builds a model.
    """
    from verl.utils import import_utils

    there = import_utils.is_trl_available
    if hasattr(there, "kalman_rl"):
        return

    @functools.cache
    def is_trl_available() -> bool:
        if not there():
            return False
        for home in ("trl.experimental.ppo", "trl"):
            with contextlib.suppress(ImportError):
                if hasattr(importlib.import_module(home), "AutoModelForCausalLMWithValueHead"):
                    return True
        return False

    is_trl_available.kalman_rl = True  # type: ignore[attr-defined]
    import_utils.is_trl_available = is_trl_available


def _version() -> str:
    try:
        return version("verl")
    except PackageNotFoundError:
        return "unknown"


try:
    if cpu.chosen():
        from kalman_rl.hosts.verl.cpu import platform  # noqa: F401 before anything asks verl for its platform
    _without_trl()
    register()
except Exception as error:
    logger.warning("kalman_rl is not available in verl: %s: %s", type(error).__name__, error)
    raise
