"""Replay: a run's own method gives its stored columns again; damage is refused; nothing is written."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from kalman_rl.cli.main import main
from kalman_rl.cli.replay import as_text, step_range
from kalman_rl.engine.config import TrainConfig, labels, to_toml
from kalman_rl.engine.runs.run import Run
from kalman_rl.errors import ConfigError, RunError
from kalman_rl.instruments.replay import replay
from kalman_rl.methods import METHODS, make_method
from kalman_rl.objectives.diagnostics import effective_sample_size, sums_of
from kalman_rl.objectives.loss import policy_loss
from kalman_rl.objectives.rollouts import Rollouts

pytest.importorskip("pyarrow")

OPTIONS = {"process_noise": 0.01, "low": 0.05, "high": 0.06}
TOKENS = ("a", " b", "\x1b[31m", "\u202e", "\n", "'c")
WORKING = [
    name for name in METHODS if not {"top_logp", "step", "score_norm_squared", "lag"} & set(make_method(name).inputs)
]  # fmt: skip


def columns(step: int, method: Any, rows: int = 3, length: int = 12) -> dict[str, list[Any]]:
    """What training stores: rows with holes and padding on both sides, in float32."""
    g = torch.Generator().manual_seed(step)
    mask = torch.rand(rows, length, generator=g) < 0.8
    mask[:, 0] = mask[0, :3] = False
    mask[:, 4] = True
    old = -torch.rand(rows, length, generator=g) - 0.1
    logp = old + 0.2 * torch.randn(rows, length, generator=g)
    advantage = torch.randn(rows, generator=g)
    rollouts = Rollouts(old, mask, logp_behaviour=old)
    tokens = policy_loss(method, rollouts, logp, advantage=advantage).tokens
    out: dict[str, list[Any]] = {}
    for i in range(rows):
        places = mask[i].nonzero().flatten().tolist()
        n = len(places)
        row = {
            "sequence": [i] * n, "position": places, "token_id": places, "prompt_id": ["p"] * n,
            "prompt": ["1 + 1"] * n, "completion": ["2"] * n, "token": [TOKENS[t % 6] for t in places],
            "logp_old": old[i, places].tolist(), "logp": logp[i, places].tolist(),
            "log_ratio": tokens.log_ratio[i, places].tolist(),
            "filtered_log_ratio": tokens.log_weight[i, places].tolist(),
            "coefficient": tokens.coefficient[i, places].tolist(),
            "kept": tokens.kept[i, places].tolist(), "advantage": [advantage[i].item()] * n,
        }  # fmt: skip
        for name, values in row.items():
            out.setdefault(name, []).extend(values)
    return out


def make_run(folder: Path, name: str, options: dict[str, float], steps: tuple[int, ...] = (1, 4, 6)) -> Path:
    config = TrainConfig(method=name, method_options=options)
    with Run.create(folder, to_toml(config), labels(config)) as run:
        for step in steps:
            assert run.write_traces(step, columns(step, make_method(name, **options)))
        run.finish("finished")
    return folder


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return make_run(tmp_path / "run", "kpo_diffuse", OPTIONS)


@pytest.mark.parametrize("name", WORKING)
def test_own_method_gives_the_stored_columns(name: str, tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", name, {})
    result = replay(folder, name)
    if make_method(name).learns:
        # The bounds are those of a batch, the noises those of past steps; neither is stored.
        assert result.self_check is None and f"no self-check: {name}" in " ".join(result.notes)
    else:
        assert result.own == name and result.self_check is not None
        assert result.self_check <= 1e-6 and result.flipped == 0
    ours, stored = result.overall.method, result.overall.against
    if name == "vespo":  # its sum over a sequence is rounded otherwise in another width of padding
        assert ours.kept == stored.kept and ours.quantiles == pytest.approx(stored.quantiles, rel=1e-6)
        assert ours.effective_sample_size == pytest.approx(stored.effective_sample_size, rel=1e-6)
    else:
        assert ours == stored and not result.disagreements
    assert result.overall.cosine == pytest.approx(1)


def test_numbers_against_a_direct_computation(run: Path) -> None:
    result = replay(run, "grpo", {"low": 0.1}, against="kpo_diffuse", top=5)
    stored = [columns(step, make_method("grpo", low=0.1)) for step in (1, 4, 6)]
    other = [columns(step, make_method("kpo_diffuse")) for step in (1, 4, 6)]
    a, b = ([c for part in parts for c in part["coefficient"]] for parts in (stored, other))
    x, y = (torch.tensor(values, dtype=torch.float64) for values in (a, b))
    assert result.overall.cosine == pytest.approx((x @ y / x.norm() / y.norm()).item(), rel=1e-6)
    kept = [k for part in stored for k in part["kept"]]
    assert 0 < result.overall.method.kept == sum(kept) / len(kept) < 1
    size = effective_sample_size(sums_of(x, torch.ones_like(x, dtype=torch.bool))).item()
    assert result.overall.method.effective_sample_size == pytest.approx(size, rel=1e-6)
    assert result.overall.method.quantiles["1"] == pytest.approx(max(a))
    assert result.overall.method.quantiles["0.5"] == pytest.approx(sorted(a)[round(0.5 * (len(a) - 1))])
    assert [step.step for step in result.steps] == [1, 4, 6]
    assert sum(step.tokens for step in result.steps) == len(a) == result.overall.tokens
    gaps = sorted((abs(p - q) for p, q in zip(a, b)), reverse=True)[:5]
    found = [abs(entry.coefficient[0] - entry.coefficient[1]) for entry in result.disagreements]
    assert found == pytest.approx(gaps, rel=1e-6)
    first = result.disagreements[0]
    at = stored[[1, 4, 6].index(first.step)]
    row = [*zip(at["sequence"], at["position"])].index((first.sequence, first.position))
    assert first.log_ratio == at["log_ratio"][row] and first.token == at["token"][row]


def test_against_what_was_recorded(run: Path) -> None:
    result = replay(run, "kpo_diffuse", OPTIONS)
    assert result.against == "as recorded" and result.overall.cosine == pytest.approx(1)
    assert replay(run, "ratio_one").overall.method.kept == 1


@pytest.mark.parametrize("steps, found", [((1, 1), [1]), ((2, 6), [4, 6]), (None, [1, 4, 6])])
def test_steps(run: Path, steps: tuple[int, int] | None, found: list[int]) -> None:
    assert [step.step for step in replay(run, "grpo", steps=steps).steps] == found


def test_a_wrong_self_check_is_said(run: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    config = TrainConfig(method="kpo_diffuse", method_options={**OPTIONS, "low": 0.01})
    (run / "config.toml").write_text(to_toml(config))
    result = replay(run, "grpo")
    assert result.flipped > 0
    assert main(["replay", str(run), "--method", "grpo"]) == 1
    assert "self-check: FAIL" in capsys.readouterr().out
    (run / "config.toml").unlink()
    assert replay(run, "grpo").self_check is None
    assert main(["replay", str(run), "--method", "grpo"]) == 0
    assert "self-check: not possible" in capsys.readouterr().out


@pytest.mark.parametrize(
    "name, need", [("dppo_topk_tv", "top_behaviour"), ("capo", "step"), ("otb", "score_norm_squared")]
)
def test_methods_that_need_more_are_refused(run: Path, name: str, need: str) -> None:
    with pytest.raises(
        ConfigError, match=rf"^method: got '{name}' for a replay, .* without .*{need} \(.* because"
    ):
        replay(run, name)
    with pytest.raises(ConfigError, match=rf"got '{name}' .* without .*{need} \("):
        replay(run, "grpo", against=name)


def test_notes(run: Path) -> None:
    text = as_text(replay(run, "bapo", against="dppo_tv"))
    assert "not whole groups" in text
    assert "bapo: clip bounds are chosen on the traced rows only" in text
    assert "the old policy's stand in" in text
    assert "traced rows only" not in as_text(replay(run, "grpo"))


def test_command(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    arguments = ["replay", str(run), "--method", "grpo", "--options", "low=0.1", "--against", "kpo"]
    assert main([*arguments, "--top", "30"]) == 0
    text = capsys.readouterr().out
    assert text.startswith("self-check: pass: kpo_diffuse again")
    assert "\x1b" not in text and "\u202e" not in text and "\\u{1b}[31m" in text and "\\u{a}" in text
    assert main([*arguments, "--json", "--steps", "4-6"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["self_check"]["passed"] is True and [s["step"] for s in shown["steps"]] == [4, 6]
    assert len(shown["disagreements"]) == 20 and shown["overall"]["step"] is None
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before


@pytest.mark.parametrize("text", ["x", "5-3", "-1", "1-2-3", "1-"])
def test_bad_step_ranges(text: str) -> None:
    if text == "1-":
        assert step_range(text) == (1, 1)
    else:
        with pytest.raises(ConfigError, match="^steps: got"):
            step_range(text)


def test_nothing_to_read(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(RunError, match="no such run directory"):
        replay(tmp_path / "nothing", "grpo")
    with pytest.raises(RunError, match="got no manifest.json, expected a run; give the directory"):
        replay(tmp_path, "grpo")
    with pytest.raises(
        ConfigError, match=r"steps: got 2-3, expected some of the 3 in .*, which lie between 1 and 6"
    ):
        replay(run, "grpo", steps=(2, 3))
    shutil.rmtree(run / "traces")
    with pytest.raises(RunError, match="got no traces, expected some; train with"):
        replay(run, "grpo")
    assert main(["replay", str(run), "--method", "kop"]) == 2


def rewrite(run: Path, change: Any) -> None:
    import pyarrow.parquet

    path = run / "traces" / "step-000004.parquet"
    table = pyarrow.parquet.read_table(path)
    pyarrow.parquet.write_table(change(table), path)


def with_value(name: str, value: Any) -> Any:
    def change(table: Any) -> Any:
        import pyarrow

        values = table[name].to_pylist()
        values[3] = value
        index = table.schema.get_field_index(name)
        return table.set_column(index, name, pyarrow.array(values, table.schema.field(name).type))

    return change


@pytest.mark.parametrize(
    "change, message",
    [
        (with_value("logp", math.nan), "logp: got nan"),
        (with_value("logp_old", math.inf), "logp_old: got inf"),
        (with_value("advantage", math.nan), "advantage: got nan"),
        (with_value("coefficient", math.nan), "not finite"),
        (with_value("position", 2**40), "over 10995116277"),
        (with_value("position", None), ""),
        (with_value("kept", None), ""),
        (lambda table: table.drop_columns(["logp"]), "logp"),
        (lambda table: table.slice(0, 0), "got no rows"),
        (lambda table: table.rename_columns([f"{c}x" for c in table.column_names]), "sequence"),
    ],
)
def test_damaged_numbers(run: Path, change: Any, message: str) -> None:
    rewrite(run, change)
    with pytest.raises(RunError, match=f"step-000004.parquet: .*{message}"):
        replay(run, "grpo")


def test_damaged_files(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = run / "traces" / "step-000004.parquet"
    whole = path.read_bytes()
    for part in (b"", b"PAR1", whole[: len(whole) // 2], b"x" * len(whole)):
        path.write_bytes(part)
        assert main(["replay", str(run), "--method", "grpo"]) == 1
        error = capsys.readouterr().err
        assert error.startswith(f"kalman-rl: {path}: damaged trace") and error.count("\n") == 1
    path.unlink()
    path.symlink_to(run / "traces" / "step-000001.parquet")
    with pytest.raises(RunError, match="got a link, expected a regular file"):
        replay(run, "grpo")


def test_a_position_twice(run: Path) -> None:
    import pyarrow

    rewrite(run, lambda table: pyarrow.concat_tables([table, table.slice(0, 1)]))
    with pytest.raises(RunError, match="a position of a completion twice"):
        replay(run, "grpo")


def test_top_is_a_count(run: Path) -> None:
    assert replay(run, "grpo", top=0).disagreements == []
    with pytest.raises(ConfigError, match="^top: got -1"):
        replay(run, "grpo", top=-1)
