"""A run's model as a folder that transformers, vLLM and the hub take: adapters merged, with a card."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from kalman_rl.engine.card import model_card
from kalman_rl.engine.config import TrainConfig, build, settings_of
from kalman_rl.engine.models.load import checked_directory, load_model, quiet_transformers
from kalman_rl.engine.quiet import quiet_third_parties
from kalman_rl.engine.resume import weights_digest
from kalman_rl.engine.runs.files import explained, replacing
from kalman_rl.engine.runs.reading import read_manifest, read_metrics
from kalman_rl.engine.runs.received import read_json
from kalman_rl.errors import KalmanRLError, PlaceError, RunError, one_line, quote

ADAPTER = "adapter_config.json"


def export(run: Path, output: Path | None = None, *, best: bool = False, overwrite: bool = False) -> Path:
    """Write the trained model of a run, whole, with its tokenizer and a card; returns the folder.

    Args:
        run: directory of a run.
        output: folder to write; None is ``export`` in the run's folder.
        best: the weights of the best held-out mean reward, which a run with keep_best has.
        overwrite: replace the folder, where it is an earlier export.

    Raises: RunError for a run without a trained model, or whose start model is not the one it began with; PlaceError
        for an output that is there.
    """
    run, name = Path(run), "best" if best else "model"
    manifest, config = read_manifest(run), build(TrainConfig, settings_of(run))
    source = run / name
    if not (source / ADAPTER).is_file() and not (source / "config.json").is_file():
        advice = (
            "train with --keep-best"
            if best
            else f"a run writes it at its end: `kalman-rl resume {run}` goes on"
        )
        raise RunError(f"{run}: got no trained model in {name}/, expected one; {advice}")
    target = Path(output).expanduser() if output is not None else run / "export"
    _check_free(target, overwrite)
    with quiet_third_parties(), quiet_transformers():
        try:
            model, tokenizer = _whole(run, source, config, manifest)
        except KalmanRLError:
            raise
        except Exception as error:
            raise RunError(
                f"{source}: cannot be loaded ({one_line(error, 300)}), expected what training wrote"
            ) from error
        _end_as_the_start_model(model, tokenizer)
        card = model_card(config, manifest, read_metrics(run), manifest.get("best") if best else None)
        with explained(target, "write", kind=PlaceError):
            target.parent.mkdir(parents=True, exist_ok=True)
            with replacing(target) as temporary:
                model.save_pretrained(temporary)
                tokenizer.save_pretrained(temporary)
                (temporary / "README.md").write_text(card, encoding="utf-8")
                if target.is_dir():
                    shutil.rmtree(target)
    return target


def _check_free(target: Path, overwrite: bool) -> None:
    with explained(target, "look at", kind=PlaceError):
        if not target.exists() or (target.is_dir() and not any(target.iterdir())):
            return
        ours = target.is_dir() and (target / "README.md").is_file() and (target / "config.json").is_file()
    if not ours:
        raise PlaceError(
            f"output: got {target}, which exists and is no exported model, expected a new folder"
        )
    if not overwrite:
        raise PlaceError(
            f"output: got {target}, which exists; replace it with --overwrite, or choose another"
        )


def _whole(run: Path, source: Path, config: TrainConfig, manifest: dict[str, Any]) -> tuple[Any, Any]:
    """Model and tokenizer with every weight."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    if not (source / ADAPTER).is_file():
        checked_directory(source)
        model = AutoModelForCausalLM.from_pretrained(
            source, dtype="auto", use_safetensors=True, trust_remote_code=False
        )
        return model, tokenizer
    from peft import PeftModel

    base = _base(run, source, config, manifest)
    return PeftModel.from_pretrained(base, source).merge_and_unload(), tokenizer


def _base(run: Path, source: Path, config: TrainConfig, manifest: dict[str, Any]) -> Any:
    """The start model that the adapters belong to: where they say it is, else what the settings name."""
    said = read_json(source, ADAPTER).get("base_model_name_or_path")
    dtype = str(manifest.get("dtype") or "auto")
    names = [name for name in (said, config.model) if isinstance(name, str) and name != "tiny"]
    problem: KalmanRLError = RunError(f"{source}: got adapters that name no start model, expected one")
    for name in dict.fromkeys(names):
        try:
            model = load_model(
                name, cache=run.parent / ".cache", dtype=dtype, progress=lambda text: None
            ).model
        except KalmanRLError as error:
            problem = error
            continue
        known = manifest.get("model_sha256")
        if known not in (None, weights_digest(model)):
            problem = RunError(
                f"{source}: got other weights at {quote(name)} than the run began with, expected the same because the "
                "adapters rest on them; restore them"
            )
            continue
        return model
    raise problem


def _end_as_the_start_model(model: Any, tokenizer: Any) -> None:
    """Without the tokens that ended replies of the task only, such as every token with a newline."""
    ends = model.generation_config.eos_token_id
    ends = ends if isinstance(ends, list) else [] if ends is None else [ends]
    kept = [token for token in ends if token in tokenizer.all_special_ids]
    model.generation_config.eos_token_id = kept or tokenizer.eos_token_id
