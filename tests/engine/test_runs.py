"""Run directories: whole or absent, one writer, nothing lost silently, no damaged checkpoint accepted."""

from __future__ import annotations

import json
import logging
import os
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet
import pytest
import safetensors.numpy
import torch
from hypothesis import given
from hypothesis import strategies as st

from kalman_rl.engine.runs.checkpoints import SEAL, verify_checkpoint
from kalman_rl.engine.runs.reading import is_written, read_manifest, read_metrics, read_run
from kalman_rl.engine.runs.run import Run, name_problem
from kalman_rl.engine.runs.traces import NULLABLE, TRACE_COLUMNS
from kalman_rl.errors import RunError, ShapeError

LABELS = {"method": "kpo", "seed": 3}


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Run]:
    with Run.create(tmp_path / "run", "seed = 3\n", LABELS) as run:
        yield run


@contextmanager
def disk_of(size: int) -> Iterator[None]:
    """No file of this process may grow beyond ``size`` bytes: the system's own error, amid a write."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)


# Creating and opening


def test_new_run_has_config_and_manifest(run: Run) -> None:
    assert (run.path / "config.toml").read_text() == "seed = 3\n"
    manifest = read_manifest(run.path)
    assert manifest == run.manifest
    assert manifest["format"] == 1 and manifest["status"] == "running" and manifest["labels"] == LABELS
    assert manifest["seed"] == 3 and manifest["pid"] == os.getpid() and manifest["created"].endswith("+00:00")
    assert manifest["versions"]["torch"] == torch.__version__ and manifest["versions"]["python"]
    assert {"dtype", "device", "threads", "git", "platform", "cpu", "seconds"} <= manifest.keys()
    assert read_metrics(run.path) == []


def test_existing_run_is_kept(run: Run) -> None:
    run.finish("finished")
    with pytest.raises(
        RunError,
        match=r"exists; continue it with `kalman-rl resume .*`, replace it with --overwrite, or choose another --run",
    ):
        Run.create(run.path, "", {})


def test_empty_directory_is_used(tmp_path: Path) -> None:
    Run.create(tmp_path, "", {}).close() if not name_problem(tmp_path) else pytest.fail("unexpected name")


def test_overwrite_replaces_a_run_only(run: Run, tmp_path: Path) -> None:
    run.log("train", 1, loss=1.0)
    (run.path / "traces").mkdir()
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "thesis.txt").write_text("mine")
    (run.path / "link").symlink_to(outside)
    run.finish("finished")
    with Run.create(run.path, "", {"seed": 4}, overwrite=True) as again:
        assert again.manifest["seed"] == 4 and read_metrics(again.path) == []
    assert sorted(p.name for p in run.path.iterdir()) == [
        *(".lock", "checkpoints", "config.toml", "manifest.json", "metrics.jsonl")
    ]
    assert (outside / "thesis.txt").read_text() == "mine"
    with pytest.raises(RunError, match="exists and is no run"):
        Run.create(outside, "", {}, overwrite=True)
    assert [p.name for p in outside.iterdir()] == ["thesis.txt"]


@pytest.mark.parametrize(
    "below", ["a-file", "a-file/deeper/run", "/proc/run", "/dev/null/run", "d" * 90 + "/x"]
)
def test_impossible_places_are_named(tmp_path: Path, below: str) -> None:
    (tmp_path / "a-file").write_text("")
    path = tmp_path / below if len(below) < 90 else tmp_path.joinpath(*[below[:90]] * 50)
    with pytest.raises(RunError, match=r"cannot create: |is no directory; choose another --run") as caught:
        Run.create(path, "", {}, overwrite=True)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    "name", ["..", ".hidden", "a b", "x" * 101, "a\nb", "a\0b", "résumé", "a;b", "$(x)", "-\u202e", "tab\t"]
)
def test_bad_names_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(RunError, match="as a run's name"):
        Run.create(tmp_path / name, "", {})
    assert list(tmp_path.iterdir()) == []


@given(st.text(min_size=1, max_size=120))
def test_names_that_pass_are_plain(name: str) -> None:
    if name_problem(Path("runs") / name) is None:
        last = (Path("runs") / name).name  # "." is runs itself
        assert (
            last.isascii() and last[0] != "." and len(last) <= 100 and "/" not in last and last.isprintable()
        )


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "got no manifest.json, expected a run"),
        ("{", "no JSON object"),
        ("[1]", "no JSON object"),
        ("[" * 100_000, "no JSON object"),
        ('{"format": 2}', "got a run of format 2, expected 1"),
        (" " * 16_000_001, "more than 16,000,000 bytes"),
    ],
)
def test_damaged_manifests_are_named(run: Run, content: str | None, message: str) -> None:
    run.close()
    manifest = run.path / "manifest.json"
    manifest.unlink() if content is None else manifest.write_text(content)
    with pytest.raises(RunError, match=message):
        Run.open(run.path)


def test_missing_run(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="no such run directory"):
        Run.open(tmp_path / "nothing")


def test_links_out_of_a_run_are_not_followed(run: Run, tmp_path: Path) -> None:
    run.close()
    (tmp_path / "elsewhere").write_text('{"kind": "train", "step": 1}\n')
    (run.path / "metrics.jsonl").unlink()
    (run.path / "metrics.jsonl").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(RunError, match="got a link, expected a regular file"):
        read_metrics(run.path)
    with pytest.raises(RunError, match="cannot open"):
        Run.open(run.path)


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_beginning_that_was_cut_short_needs_no_hand(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, overwrite: bool
) -> None:
    """Killed after any call that changes the folder: `train` takes the name again, or `resume` goes on."""
    path = tmp_path / "run"
    changes = [(os, "replace"), (os, "unlink"), (os, "mkdir"), (os, "rmdir"), (shutil, "rmtree")]
    for cut in range(1, 40):
        shutil.rmtree(path, ignore_errors=True)
        if overwrite:
            with Run.create(path, "seed = 3\n", LABELS) as run:
                checkpoint(run, 2)
                run.log("train", 2)
                run.finish("interrupted")
        done: list[str] = []
        with monkeypatch.context() as patch:
            for module, name in changes:
                patch.setattr(module, name, dying(getattr(module, name), done, cut))
            try:
                Run.create(path, "seed = 4\n", LABELS, overwrite=overwrite).close()
                break
            except KeyboardInterrupt:
                pass
        if not overwrite:  # what a user does next, and no more
            if (path / "manifest.json").exists():
                Run.open(path).close()
            else:
                Run.create(path, "seed = 4\n", LABELS).close()
        try:  # the same command again, without --overwrite
            Run.create(path, "seed = 5\n", LABELS).close()
        except RunError as refused:
            assert "--overwrite" in str(refused)
            try:
                Run.open(path).close()
            except RunError as error:
                assert "--overwrite" in str(error)
        Run.create(path, "seed = 5\n", LABELS, overwrite=True).close()
        assert (path / "config.toml").read_text() == "seed = 5\n" and not Run.open(path).checkpoints()
    assert len(done) == cut - 1 > 3, "every one of them was tried"


def dying(call: Any, done: list[str], cut: int) -> Any:
    def called(*args: Any, **options: Any) -> Any:
        result = call(*args, **options)
        done.append(call.__name__)
        if len(done) == cut:
            raise KeyboardInterrupt
        return result

    return called


# One writer


def test_second_writer_in_this_process(run: Run) -> None:
    for attempt in (lambda: Run.open(run.path), lambda: Run.create(run.path, "", {}, overwrite=True)):
        with pytest.raises(RunError, match=f"process {os.getpid()} is writing this run"):
            attempt()
    run.close()
    Run.open(run.path).close()


def test_a_run_whose_process_is_gone_is_shown_as_killed(run: Run) -> None:
    """The lock tells, which the system takes back from a process however it ends."""
    assert read_run(run.path).status == "running" and is_written(run.path)
    run.close()
    assert read_manifest(run.path)["status"] == "running"
    assert read_run(run.path).status == "killed" and not read_run(run.path).finished
    (run.path / ".lock").unlink()  # a copy may come without it
    assert read_run(run.path).status == "killed"
    with Run.open(run.path) as again:
        assert read_run(run.path).status == "running"
        again.finish("interrupted")
    assert read_run(run.path).status == "interrupted"


def test_second_writer_in_another_process(run: Run) -> None:
    run.close()
    code = (
        "import sys, time; from kalman_rl.engine.runs.run import Run; run = Run.open(sys.argv[1]); "
        "print('open', flush=True); time.sleep(60)"
    )
    command = [sys.executable, "-c", code, str(run.path)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment) as other:
        try:
            assert other.stdout is not None and other.stdout.readline() == b"open\n"
            with pytest.raises(RunError, match=f"process {other.pid} is writing this run"):
                Run.open(run.path)
        finally:
            other.kill()
    (run.path / ".tmp-manifest.json").write_text("half")
    with Run.open(run.path):  # the lock died with its owner, and so did what it was writing
        assert not list(run.path.glob(".tmp-*"))


# Manifest and end of a run


def test_finish_adds_up_seconds(run: Run) -> None:
    run.log("train", 1)
    run.finish("interrupted", 10.0)
    assert read_manifest(run.path)["status"] == "interrupted"
    with pytest.raises(RunError, match="after the run was closed"):
        run.log("train", 2)
    row = {"kind": "train", "step": 5, "time": 100.0}
    (run.path / "metrics.jsonl").write_text(json.dumps(row) + "\n")
    with Run.open(run.path) as again:
        again.log("train", 6)
        assert 100.0 <= read_metrics(run.path)[-1]["time"] < 110.0
        again.finish("finished", 10.0)
    assert read_manifest(run.path)["seconds"] == 110.0


def test_finish_knows_three_ends(run: Run) -> None:
    with pytest.raises(RunError, match="got 'done', expected one of finished, interrupted, failed"):
        run.finish("done")


@pytest.mark.parametrize(("error", "status"), [(ValueError, "failed"), (KeyboardInterrupt, "interrupted")])
def test_an_exception_marks_the_run(tmp_path: Path, error: type[BaseException], status: str) -> None:
    with pytest.raises(error), Run.create(tmp_path / "run", "", {}):
        raise error
    assert read_manifest(tmp_path / "run")["status"] == status


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_what_ends_the_beginning_marks_the_run(
    tmp_path: Path, error: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    update, calls = Run.update_manifest, []

    def ended(run: Run, **changes: Any) -> None:
        update(run, **changes)
        calls.append(changes)
        if len(calls) == 1:
            raise error

    monkeypatch.setattr(Run, "update_manifest", ended)
    with pytest.raises(error):
        Run.create(tmp_path / "run", "", {})
    assert read_manifest(tmp_path / "run")["status"] == calls[1]["status"] != "running"
    assert not is_written(tmp_path / "run")


def test_a_finished_run_stays_finished(run: Run) -> None:
    with pytest.raises(ValueError), run:
        run.finish("finished")
        raise ValueError
    assert read_manifest(run.path)["status"] == "finished"
    with pytest.raises(ValueError), Run.open(run.path):
        raise ValueError
    assert read_manifest(run.path)["status"] == "finished"


def test_full_disk_keeps_the_old_manifest(run: Run) -> None:
    before = (run.path / "manifest.json").read_bytes()
    with (
        disk_of(100),
        pytest.raises(RunError, match=r"manifest.json: cannot write: .*needed [\d,]+ bytes, free"),
    ):
        run.update_manifest(note="x" * 1000)
    assert (run.path / "manifest.json").read_bytes() == before
    assert not list(run.path.glob(".tmp-*"))
    run.update_manifest(dtype="float32")
    assert read_manifest(run.path)["dtype"] == "float32"


def test_secrets_are_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_very-secret")
    monkeypatch.setenv("WANDB_API_KEY", "another-secret")
    config = 'model = "u:hf_very-secret@host"\nmax_completion_tokens = 5\napi_key = "third-secret"\n'
    labels = {"note": ["another-secret"], "some_token": "fourth-secret"}
    with Run.create(tmp_path / "run", config, labels) as run:
        run.update_manifest(environment={"URL": "x?hf_very-secret"})
    text = "".join(path.read_text() for path in (tmp_path / "run").rglob("*") if path.is_file())
    assert "secret" not in text.replace("[redacted]", "")
    assert "max_completion_tokens = 5" in text and 'api_key = "[redacted]"' in text


# Metrics


def test_rows_come_back(run: Run) -> None:
    run.log("train", 1, **{"ratio/noop": torch.tensor(0.5), "loss": 2, "kl": None, "text": "x"})
    run.log("eval", 2, a=float("nan"), b=float("inf"), c=-1e300, d=10**400, flag=True)
    first, second = read_metrics(run.path)
    assert first["kind"] == "train" and first["step"] == 1 and first["time"] >= 0
    assert (first["ratio/noop"], first["loss"], first["kl"], first["text"]) == (0.5, 2.0, None, None)
    assert [second[key] for key in ("a", "b", "c", "d", "flag")] == [None, None, -1e300, None, 1.0]


def test_each_row_is_on_disk_at_once(run: Run) -> None:
    for step in range(3):
        run.log("train", step)
        assert len((run.path / "metrics.jsonl").read_bytes().splitlines()) == step + 1


def test_torn_last_line_at_every_byte(run: Run, caplog: pytest.LogCaptureFixture) -> None:
    for step in range(3):
        run.log("train", step, loss=step / 2, hole=float("nan"))
    run.close()
    file = run.path / "metrics.jsonl"
    data, rows = file.read_bytes(), read_metrics(run.path)
    ends = [i for i, byte in enumerate(data) if byte == ord("\n")]
    for cut in range(len(data) + 1):
        file.write_bytes(data[:cut])
        caplog.clear()
        whole = sum(end <= cut for end in ends)  # the last newline itself may be missing
        assert read_metrics(run.path) == rows[:whole]
        torn = cut not in (0, *ends, *(end + 1 for end in ends))
        assert ("skipped 1 unreadable line" in caplog.text) == torn


def test_truncate_drops_later_and_broken_rows(run: Run, caplog: pytest.LogCaptureFixture) -> None:
    for step in range(1, 6):
        run.log("train", step)
    with open(run.path / "metrics.jsonl", "ab") as file:
        file.write(b'{"kind": "tr\xff')
    run.close()
    with Run.open(run.path) as again:
        assert again.truncate(3) == 2
        assert "dropped 1 unreadable line" in caplog.text
        again.log("train", 4, new=1)
    assert [row["step"] for row in read_metrics(run.path)] == [1, 2, 3, 4]
    assert read_metrics(run.path)[-1]["new"] == 1


def test_truncate_drops_what_is_written_again(run: Run) -> None:
    for step in range(4):  # rows of beliefs name the step before theirs
        run.append("beliefs.jsonl", {"step": step, "id": []})
        run.append("alarms.jsonl", {"step": step})
        run.write_traces(step, trace())
    with (run.path / "beliefs.jsonl").open("a") as file:
        file.write('{"step": 1')
    run.truncate(2)
    kept = {
        name: [json.loads(line)["step"] for line in (run.path / name).read_text().splitlines()]
        for name in ("beliefs.jsonl", "alarms.jsonl")
    }
    assert kept == {"beliefs.jsonl": [0, 1], "alarms.jsonl": [0, 1, 2]}
    assert [file.name for file in sorted((run.path / "traces").iterdir())] == [
        f"step-{step:06d}.parquet" for step in range(3)
    ]


ROW = b'{"kind": "train", "step": 1}'


@given(st.lists(st.binary(max_size=60) | st.just(ROW), max_size=8))
def test_any_bytes_are_read(tmp_path_factory: pytest.TempPathFactory, lines: list[bytes]) -> None:
    folder = tmp_path_factory.getbasetemp() / "any"
    folder.mkdir(exist_ok=True)
    (folder / "metrics.jsonl").write_bytes(b"\n".join(lines))
    assert read_metrics(folder).count(json.loads(ROW)) >= lines.count(ROW)


def test_disk_full_on_metrics(run: Run, caplog: pytest.LogCaptureFixture) -> None:
    run.log("train", 1)
    with disk_of((run.path / "metrics.jsonl").stat().st_size + 10):  # room for a part of the next row
        for step in (2, 3):
            run.log("train", step)
    run.log("train", 4)
    rows = read_metrics(run.path)
    assert [(row["kind"], row["step"]) for row in rows] == [("train", 1), ("gap", 4), ("train", 4)]
    assert rows[1]["rows_lost"] == 2
    assert len([r for r in caplog.records if "the run goes on" in r.message]) == 1
    assert "unreadable" not in caplog.text


def test_device_full_on_metrics(run: Run, caplog: pytest.LogCaptureFixture) -> None:
    run.close()
    run._metrics = os.open("/dev/full", os.O_WRONLY)
    run.log("train", 1)
    assert "No space left on device" in caplog.text


# Traces


def trace(rows: int = 2, **changes: Any) -> dict[str, list[Any]]:
    example = {"int64": 7, "string": "é\n", "float32": -0.5, "bool": True}
    return {name: [example[kind]] * rows for name, kind in TRACE_COLUMNS.items()} | changes


def test_traces_have_one_schema(run: Run) -> None:
    full = run.write_traces(12, trace())
    assert full == run.path / "traces" / "step-000012.parquet"
    short = {name: values for name, values in trace(0).items() if name not in NULLABLE | {"step"}}
    empty = run.write_traces(13, short)
    schemas = [pyarrow.parquet.read_schema(path) for path in (full, empty)]
    assert schemas[0] == schemas[1]
    assert {f.name: (str(f.type), f.nullable) for f in schemas[0]} == {
        name: ({"float32": "float"}.get(kind, kind), name in NULLABLE) for name, kind in TRACE_COLUMNS.items()
    }
    table = pyarrow.parquet.read_table(full).to_pydict()
    assert table == {name: list(values) for name, values in trace().items()}
    assert [path.name for path in (run.path / "traces").iterdir() if path.name.startswith(".")] == []


def test_missing_values_and_step_are_filled(run: Run) -> None:
    columns = {name: values for name, values in trace().items() if name not in NULLABLE | {"step"}}
    path = run.write_traces(5, {**columns, "token": ["\ud83d", "ok"]})
    table = pyarrow.parquet.read_table(path).to_pydict()
    assert table["step"] == [5, 5] and table["gain"] == [None, None] and table["token"] == ["?", "ok"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"extra": [1, 2]}, "missing or unknown extra"),
        ({"kept": [True]}, "kept: got 1 rows"),
        ({"logp": [0.0, None]}, "logp: got 2 rows, 1 of them missing"),
        ({"token_id": ["a", "b"]}, "token_id: expected int64"),
        ({"token_id": [2**70, 1]}, "token_id: expected int64"),
    ],
)
def test_wrong_trace_columns(run: Run, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ShapeError, match=message):
        run.write_traces(1, trace(**changes))
    with pytest.raises(ShapeError, match=r"missing or unknown logp,"):
        run.write_traces(1, {name: values for name, values in trace().items() if name != "logp"})


def test_disk_full_on_traces(run: Run, caplog: pytest.LogCaptureFixture) -> None:
    with disk_of(200):
        assert run.write_traces(1, trace()) is None
        assert run.write_traces(2, trace()) is None
    assert list((run.path / "traces").iterdir()) == []
    assert len(caplog.records) == 1 and "the run goes on" in caplog.text
    assert run.write_traces(3, trace()) is not None


# Checkpoints


def checkpoint(run: Run, step: int, seal: bool = True) -> Path:
    folder = run.path / "checkpoints" / f"checkpoint-{step}"
    (folder / "sub").mkdir(parents=True)
    (folder / "trainer_state.json").write_text(f'{{"global_step": {step}}}')
    (folder / "model.safetensors").write_bytes(
        safetensors.numpy.save({"head": np.arange(4, dtype="float32")})
    )
    (folder / "sub" / "empty").write_bytes(b"")
    if seal:
        run.seal_checkpoint(folder)
    return folder


def test_checkpoints_are_sorted_by_step(run: Run) -> None:
    folders = [checkpoint(run, step) for step in (2, 100, 10)]
    checkpoint(run, 200, seal=False)
    (run.path / "checkpoints" / "checkpoint-x").mkdir()
    assert run.checkpoints() == [folders[0], folders[2], folders[1]]


def test_an_unsealed_checkpoint_is_skipped_aloud(run: Run, caplog: pytest.LogCaptureFixture) -> None:
    old, new = checkpoint(run, 10), checkpoint(run, 20, seal=False)
    assert run.latest_checkpoint() == old
    assert f"{new}: has no {SEAL}" in caplog.text
    run.seal_checkpoint(new)
    assert run.latest_checkpoint() == new


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_neither_sealed_nor_resumed(
    run: Run, bad: float, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    old, new = checkpoint(run, 10), checkpoint(run, 20, seal=False)
    weights = {"whole": np.arange(3), "head": np.array([1.0, bad], dtype="float16")}
    safetensors.numpy.save_file(weights, new / "adapter_model.safetensors")
    with pytest.raises(
        RunError, match=r"checkpoint-20: got NaN or infinity in head, expected finite weights"
    ):
        run.seal_checkpoint(new)
    assert run.checkpoints() == [old]
    with monkeypatch.context() as patch:  # as a run before this check left it
        patch.setattr("kalman_rl.engine.runs.checkpoints._check_weights", lambda folder: None)
        run.seal_checkpoint(new)
    assert run.latest_checkpoint() == old
    assert "NaN or infinity in head" in caplog.text


def test_no_checkpoint(run: Run) -> None:
    with pytest.raises(RunError, match="got no intact checkpoint"):
        run.latest_checkpoint()
    checkpoint(run, 1, seal=False)
    with pytest.raises(RunError, match="got no intact checkpoint"):
        run.latest_checkpoint()


def test_flipped_bits_and_every_cut_are_found(run: Run, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.CRITICAL, "kalman_rl")
    folder = checkpoint(run, 10)
    damaged = 0
    for file in [path for path in folder.rglob("*") if path.is_file()]:
        data = file.read_bytes()
        flips = [
            data[:i] + bytes([data[i] ^ (1 << bit % 8)]) + data[i + 1 :]
            for i in range(len(data))
            for bit in (i, i + 3)
        ]
        for bad in [*flips, *(data[:cut] for cut in range(len(data))), data + b"\n", data + data]:
            if bad == data:
                continue
            file.write_bytes(bad)
            with pytest.raises(RunError):
                verify_checkpoint(folder)
            damaged += 1
        file.write_bytes(data)
    verify_checkpoint(folder)
    assert damaged > 1000


@pytest.mark.parametrize("name", ["trainer_state.json", "model.safetensors", "sub/empty", SEAL])
def test_a_deleted_file_is_found(run: Run, name: str, caplog: pytest.LogCaptureFixture) -> None:
    old, new = checkpoint(run, 10), checkpoint(run, 20)
    (new / name).unlink()
    assert run.latest_checkpoint() == old
    assert "skipped a checkpoint" in caplog.text and (name in caplog.text)


def test_added_linked_and_renamed_are_found(run: Run) -> None:
    folder = checkpoint(run, 10)
    (folder / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(RunError, match=r"changed since it was saved: pytorch_model\.bin"):
        verify_checkpoint(folder)
    (folder / "pytorch_model.bin").unlink()
    weights = folder / "model.safetensors"
    elsewhere = run.path / "same-bytes"
    weights.rename(elsewhere)
    weights.symlink_to(elsewhere)
    with pytest.raises(RunError, match="got a link or device"):
        verify_checkpoint(folder)
    weights.unlink()
    elsewhere.rename(weights)
    verify_checkpoint(folder)
    with pytest.raises(RunError, match=r"changed since it was saved: complete\.json"):
        verify_checkpoint(folder.rename(folder.with_name("checkpoint-11")))


def test_a_checkpoint_of_another_format_is_named(run: Run) -> None:
    folder = checkpoint(run, 10)
    seal = folder / SEAL
    seal.write_text(seal.read_text().replace('"format": 1', '"format": 2'))
    with pytest.raises(RunError, match="got a checkpoint of format 2, expected 1"):
        verify_checkpoint(folder)


def test_sealing_needs_a_checkpoint(run: Run) -> None:
    folder = checkpoint(run, 10, seal=False)
    (folder / "trainer_state.json").unlink()
    with pytest.raises(RunError, match=r"got no trainer_state\.json"):
        run.seal_checkpoint(folder)
    with pytest.raises(RunError, match="expected checkpoint-N"):
        run.seal_checkpoint(run.path)


def test_full_disk_leaves_a_checkpoint_unsealed(run: Run) -> None:
    folder = checkpoint(run, 10, seal=False)
    with disk_of(100), pytest.raises(RunError, match="cannot write"):
        run.seal_checkpoint(folder)
    assert not (folder / SEAL).exists() and not list(folder.glob(".tmp-*"))
