"""What a run saves: retention by step after the seal, and a disk without room."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("trl")

import transformers

from kalman_rl.cli.main import main
from kalman_rl.engine import saving
from kalman_rl.engine.runs.checkpoints import SEAL
from kalman_rl.engine.runs.reading import find_runs, read_manifest
from kalman_rl.engine.runs.run import Run
from kalman_rl.errors import NoSpaceError
from tests.engine.graded import GRADED
from tests.engine.test_runs import checkpoint
from tests.engine.test_stopping import SMALL, model, resumed, start, steps

PAST = 1_000_000_000  # a time long ago


def names(run: Run) -> list[str]:
    return sorted(path.name for path in (run.path / "checkpoints").iterdir())


# Retention


def test_the_newest_stay_whatever_the_clock_says(tmp_path: Path) -> None:
    with Run.create(tmp_path / "run", "", {}) as run:
        for age, step in enumerate((2, 4, 6, 8)):
            folder = checkpoint(run, step)
            os.utime(folder, (PAST - age, PAST - age))  # each older than the one before
            run.retain(3, folder)
        assert names(run) == ["checkpoint-4", "checkpoint-6", "checkpoint-8"]


def test_the_newest_that_verifies_is_never_deleted(tmp_path: Path) -> None:
    with Run.create(tmp_path / "run", "", {}) as run:
        folders = [checkpoint(run, step) for step in (2, 4, 6)]
    for folder in folders[1:]:
        (folder / "trainer_state.json").write_text("{}")
    with Run.open(run.path) as again:
        again.retain(1, folders[2])
        assert names(again) == ["checkpoint-2", "checkpoint-6"]
        assert again.latest_checkpoint() == folders[0]


def test_what_lies_ahead_stays_and_what_was_cut_short_goes(tmp_path: Path) -> None:
    """Resumed from step 4 because 8 was damaged: saving 6 must not take 4 and 6 for the oldest."""
    with Run.create(tmp_path / "run", "", {}) as run:
        for step in (4, 8, 10):
            checkpoint(run, step)
        checkpoint(run, 5, seal=False)
        (run.path / "checkpoints" / "checkpoint-8" / "trainer_state.json").write_text("{}")
        run.retain(2, checkpoint(run, 6))
        assert names(run) == ["checkpoint-10", "checkpoint-4", "checkpoint-6", "checkpoint-8"]


def test_half_a_deletion_never_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Run.create(tmp_path / "run", "", {}) as run:
        old, new = checkpoint(run, 2), checkpoint(run, 4)
        monkeypatch.setattr(shutil, "rmtree", lambda *args, **options: None)  # killed before the rest
        run.retain(1, new)
        assert old.is_dir() and not (old / SEAL).exists() and run.checkpoints() == [new]


def test_a_run_keeps_three_with_the_clock_set_back(
    model_path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each save leaves a folder older than all before, as on a machine whose clock was set back."""
    seal, seen = Run.seal_checkpoint, []

    def dated(self: Run, folder: Path) -> None:
        seal(self, folder)
        seen.append(folder)
        os.utime(folder, (PAST - len(seen), PAST - len(seen)))

    monkeypatch.setattr(Run, "seal_checkpoint", dated)
    assert start(model_path, tmp_path / "run", steps=8) == 0
    with Run.open(tmp_path / "run") as run:
        assert [folder.name for folder in run.checkpoints()] == [f"checkpoint-{n}" for n in (4, 6, 8)]
        assert run.latest_checkpoint().name == "checkpoint-8"


# A full disk


def no_space(*args: Any, **options: Any) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("where", ["_save_optimizer_and_scheduler", "seal", "model"])
def test_a_full_disk_ends_the_run_which_resumes_bitwise(
    model_path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    whole, path = tmp_path / "whole", tmp_path / "run"
    assert start(model_path, whole, **GRADED) == 0
    with monkeypatch.context() as patch:
        save = transformers.Trainer._save_optimizer_and_scheduler

        def full(self: Any, folder: str) -> None:
            no_space() if self.state.global_step == 4 else save(self, folder)

        if where == "seal":
            patch.setattr("kalman_rl.engine.runs.checkpoints.write_file", no_space)
        elif where == "model":
            patch.setattr(transformers.PreTrainedTokenizerBase, "save_pretrained", lambda *a, **o: None)
            patch.setattr(saving.RunTrainer, "save_model", model_only_in_checkpoints)
        else:
            patch.setattr(transformers.Trainer, where, full)
        with pytest.raises(NoSpaceError) as stopped:
            start(model_path, path, **GRADED)
    text = str(stopped.value)
    named = {"seal": "checkpoint-2: cannot write", "model": "model: cannot write"}
    assert named.get(where, "checkpoint-4: cannot write") in text
    assert text.startswith("stopped: disk, at step ") and f"kalman-rl resume {path}" in text
    assert "bytes, free " in text
    assert read_manifest(path)["status"] == "stopped: disk" and not find_runs([path])[0].finished
    left = sorted(each.name for each in (path / "checkpoints").glob("checkpoint-*"))
    assert left == {"seal": [], "model": ["checkpoint-2", "checkpoint-4"]}.get(where, ["checkpoint-2"])
    assert not (path / "model").exists() and not list(path.glob(".tmp-*"))
    assert resumed(path) == 0
    assert model(path) == model(whole) and steps(path, "train") == [1, 2, 3, 4]
    assert read_manifest(path)["status"] == "finished"


def model_only_in_checkpoints(self: Any, folder: str, _internal_call: bool = False) -> None:
    if not _internal_call:
        no_space()
    transformers.Trainer.save_model(self, folder, _internal_call)


def test_torchs_broken_writer_counts_where_there_is_no_room(tmp_path: Path) -> None:
    """torch.save hides the system's reason; the room that is left tells a full disk from another fault."""
    broken = RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 576 vs 534")
    assert saving.is_full(broken, tmp_path, lambda: 10**18)
    assert not saving.is_full(broken, tmp_path, lambda: 1)
    assert not saving.is_full(ValueError("no"), tmp_path, lambda: 10**18)


def test_room_is_looked_for_before_the_first_step(
    model_path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path, usage = tmp_path / "run", shutil.disk_usage(tmp_path)
    flags = {k: v for k, v in SMALL.items() if k != "quiet"} | {"model": model_path, "run": path}
    words = [word for k, v in flags.items() for word in (f"--{k.replace('_', '-')}", str(v))]
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda place: usage._replace(free=1000))
        assert main(["train", *words]) == 1
    error = capsys.readouterr().err
    assert "got 1,000 bytes free, expected at least " in error and "for a checkpoint and the trained" in error
    assert read_manifest(path)["status"] == "stopped: disk" and steps(path, "train") == []
    assert resumed(path) == 0
    saved = path / "checkpoints" / "checkpoint-4"
    needed = int(error.partition("expected at least ")[2].partition(" ")[0].replace(",", ""))
    written = sum(f.stat().st_size for place in (saved, path / "model") for f in place.rglob("*"))
    assert 0.8 * written < needed < 1.5 * written + 3 * saving.SMALL_FILES


TMPFS = """
import json, shutil, sys
from pathlib import Path
from kalman_rl.engine.runs.reading import read_manifest
from kalman_rl.engine.runs.run import Run
from kalman_rl.errors import NoSpaceError
from tests.engine.graded import GRADED
from tests.engine.test_stopping import model, resumed, start, steps

disk, found, retain = Path(sys.argv[2]), {}, Run.retain
path, filler = disk / "run", disk / "filler"

def filled(self, keep, newest):
    retain(self, keep, newest)
    if not filler.exists():  # somebody else fills the disk after the first checkpoint
        filler.write_bytes(bytes(shutil.disk_usage(disk).free - 20_000))

Run.retain = filled
try:
    start(sys.argv[1], path, **GRADED)
except NoSpaceError as error:
    found["error"] = str(error)
found |= {"status": read_manifest(path)["status"], "left": [p.name for p in path.glob("checkpoints/checkpoint-*")]}
filler.write_bytes(b"")
found |= {"code": resumed(path), "steps": steps(path, "train"), "model": model(path).hex()}
print(json.dumps(found))
"""


def test_a_small_disk(model_path: str, tmp_path: Path) -> None:
    whole, disk = tmp_path / "whole", tmp_path / "disk"
    disk.mkdir()
    assert start(model_path, whole, **GRADED) == 0
    mount = f"mount -t tmpfs -o size=4m tmpfs {disk}"
    if subprocess.run(["unshare", "-rm", "sh", "-c", mount], capture_output=True).returncode:
        pytest.skip("no tmpfs may be mounted here (unshare -rm)")
    command = f'{mount} && exec "$@"'
    done = subprocess.run(
        ["unshare", "-rm", "sh", "-c", command, "sh", sys.executable, "-c", TMPFS, model_path, str(disk)],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert "checkpoint-4: cannot write" in found["error"] and "free " in found["error"]
    assert found["status"] == "stopped: disk" and found["left"] == ["checkpoint-2"]
    assert found["code"] == 0 and found["steps"] == [1, 2, 3, 4]
    assert bytes.fromhex(found["model"]) == model(whole)
