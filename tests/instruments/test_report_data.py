"""What the page is made of, against other libraries and by hand: pooled seeds, beliefs, savings, tokens."""

from __future__ import annotations

import json
import math
import re
import sys
from pathlib import Path

import pytest
import torch

from kalman_rl.beliefs import make_belief
from kalman_rl.engine.collapse.rule import Alarm, Token, append_alarm
from kalman_rl.engine.runs.beliefs import Beliefs, read_beliefs
from kalman_rl.engine.runs.reading import read_run
from kalman_rl.engine.runs.run import Run
from kalman_rl.errors import RunError
from kalman_rl.instruments import report
from kalman_rl.instruments.replay import replay
from kalman_rl.instruments.report.page import as_json, page
from kalman_rl.instruments.report.sections.collapse import MAX_ALARMS
from kalman_rl.instruments.report.sections.positions import position_figure
from kalman_rl.instruments.report.sections.tokens import MAX_OF_COMPLETION, inspected, spread_out
from kalman_rl.instruments.report.sections.versus import seed_by_seed
from kalman_rl.instruments.report.stats.pool import pooled
from kalman_rl.instruments.report.stats.savings import mixed_share, savings
from kalman_rl.instruments.report.stats.series import with_interval
from kalman_rl.methods import make_method
from kalman_rl.numerics.curve import smooth_curve
from kalman_rl.numerics.kalman import causal_filter
from kalman_rl.objectives.loss import policy_loss
from kalman_rl.objectives.rollouts import Rollouts
from kalman_rl.sampling.budget import Budget
from kalman_rl.sampling.records import LEVELS, MAX_PROMPTS, belief_record
from kalman_rl.sampling.tracking import Tracking
from tests.instruments.report_runs import charts_of, write_beliefs, write_run, write_trace

# ---------------------------------------------------------------- seeds


def test_runs_that_differ_only_by_seed_are_one(tmp_path: Path) -> None:
    def run(name: str, method: str, seed: int, rate: float = 1e-3) -> None:
        config = f'method = "{method}"\nlearning_rate = {rate}\nseed = {seed}\nrun = "{name}"\n'
        write_run(tmp_path / name, {"method": method, "seed": seed}, seed=seed, config=config, updates=6)

    for seed in range(3):
        run(f"a{seed}", "kpo", seed)
    run("again", "kpo", 1)  # the same seed twice is not another seed
    run("b", "grpo", 0)
    run("c", "kpo", 0, rate=1e-2)
    runs = [read_run(tmp_path / name) for name in ("a0", "a1", "a2", "again", "b", "c")]
    groups = pooled(runs)
    assert [[member.name for member in group.runs] for group in groups] == [
        ["a0", "a1", "a2"],
        ["again"],
        ["b"],
        ["c"],
    ]
    assert [group.name for group in pooled([*runs[:3], runs[4]])] == ["kpo", "grpo"]
    assert [group.name for group in pooled([*runs[:3], runs[5]])] == [
        "kpo, learning_rate 0.001",
        "kpo, learning_rate 0.01",
    ]
    text = page([tmp_path / name for name in ("a0", "a1", "a2", "b")])
    assert "kpo (three seeds)" in text and "95% interval of the mean" in text
    lines = [line for chart in charts_of(text) for line in chart.get("lines", [])]
    pooled_lines = [line for line in lines if "band" in line]
    assert len(pooled_lines) >= 4 and all(len(line["behind"]) == 3 for line in pooled_lines)
    assert "4 runs compared" in text


def test_a_single_run_has_the_line_behind_its_rewards(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", {}, updates=60)
    rows = [row for row in read_run(run).train if "reward" in row]
    curve = smooth_curve([row["step"] for row in rows], [row["reward"] for row in rows])
    (reward,) = [chart for chart in charts_of(page([run])) if chart["y"] == "reward"]
    (line,) = reward["lines"]
    assert line["points"][1] == pytest.approx(curve.mean, rel=1e-4)
    assert line["band"][1:] == [pytest.approx(curve.low, rel=1e-4), pytest.approx(curve.high, rel=1e-4)]
    assert line["behind"][0][1] == pytest.approx([row["reward"] for row in rows], rel=1e-4)
    assert f"moves by {100 * curve.slope[-1]:+.2g} in 100 steps".replace("-", "−") in page([run])


@pytest.mark.parametrize("values", [[math.nan] * 37 + [0.5] * 3, [1e300, -1e308, 1.7e308, 0.0] * 10])
def test_rewards_that_no_line_is_drawn_through(tmp_path: Path, values: list[float]) -> None:
    """Too few numbers for a line, or numbers at the end of what there is, still give a page."""
    run = write_run(tmp_path / "run", {}, updates=40)
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for row, value in zip((row for row in rows if row["kind"] == "train"), values):
        row["reward"] = value
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (reward,) = [chart for chart in charts_of(page([run])) if chart["y"] == "reward"]
    assert any(value is not None for value in reward["lines"][0]["points"][1])


def test_groups_are_compared_seed_by_seed(tmp_path: Path) -> None:
    stats = pytest.importorskip("scipy.stats")
    ends = {"kpo": [0.3, 0.4, 0.6], "grpo": [0.5, 0.45, 0.75], "alone": [0.2]}
    for method, values in ends.items():
        for seed, end in enumerate(values):
            config = f'method = "{method}"\nseed = {seed}\n'
            labels = {"method": method, "seed": seed}
            write_run(
                tmp_path / f"{method}{seed}", labels, end=(end, end), updates=4, seed=seed, config=config
            )
    runs = [
        read_run(folder) for folder in sorted(tmp_path.iterdir(), key=lambda f: (f.name[0] != "k", f.name))
    ]
    compared = seed_by_seed(pooled(runs))
    assert compared and (compared.what, compared.first) == ("final sampled accuracy", "kpo")
    (row,) = compared.rows  # one seed alone has no difference with an interval
    interval = stats.ttest_rel(ends["grpo"], ends["kpo"]).confidence_interval(0.95)
    assert (row.name, row.seeds, row.difference, row.higher) == ("grpo", 3, "+0.13", "3 of 3")
    assert row.interval == f"{interval.low:.2f} to +{interval.high:.2f}".replace("-", "−")
    assert "Seed by seed" in page(sorted(tmp_path.iterdir()))
    assert seed_by_seed(pooled(runs[:3])) is None


def test_bands_over_seeds_are_students_intervals() -> None:
    stats = pytest.importorskip("scipy.stats")
    many = [[(0.0, 0.1), (1.0, 0.5)], [(0.0, 0.3), (1.0, 0.7)], [(0.0, 0.2), (1.0, 0.9), (2.0, 1.0)]]
    line, band = with_interval(many)
    assert [step for step, _ in line] == [0.0, 1.0]
    for (step, low, high), values in zip(band, ([0.1, 0.3, 0.2], [0.5, 0.7, 0.9])):
        expected = stats.t.interval(0.95, 2, loc=stats.tmean(values), scale=stats.sem(values))
        assert (low, high) == pytest.approx(expected), step
    assert with_interval(many[:2])[1] == [(0.0, 0.1, 0.3), (1.0, 0.5, 0.7)]
    logs, _ = with_interval([[(0.0, 1e-4)], [(0.0, 1e-2)]], log=True)
    assert logs == [(0.0, pytest.approx(1e-3))]


def test_the_band_of_a_diverging_metric_ends_at_the_largest_number() -> None:
    """Three seeds between 1e-300 and 1e300 have an interval of logarithms that no number is large enough for."""
    line, ((step, low, high),) = with_interval([[(0.0, v)] for v in (1e-300, 1.0, 1e300)], log=True)
    assert line == [(0.0, pytest.approx(1.0))]
    assert (step, low) == (0.0, 0.0) and high == pytest.approx(sys.float_info.max)


# ---------------------------------------------------------------- beliefs


def sampled_batch(
    tracking: Tracking, names: list[str], rates: dict[str, float], step: int
) -> dict[str, object]:
    """One generation batch as the trainer makes it; returns its record."""
    predicted = tracking.before(names, step)
    plan = tracking.plan(names, step=step, total=8 * len(names))
    told = []
    while (request := plan.next_round()) is not None:
        ids = [name for name, count in request for _ in range(count)]
        reward = torch.bernoulli(torch.tensor([rates[name] for name in ids], dtype=torch.float64))
        told.append((ids, reward))
        plan.tell(ids, reward)
    texts = {name: f"text of {name}" for name in names}
    return belief_record(tracking, plan.result(), told[0], predicted, texts, step=step, rows=8 * len(names))


def test_a_record_holds_what_happened(tmp_path: Path) -> None:
    torch.manual_seed(3)
    tracking = Tracking(make_belief("auto"), Budget("rounds", rounds=(2, 4), max_rounds=2))
    names = [f"q{i}" for i in range(MAX_PROMPTS + 16)]
    rates = {name: (i % 10) / 10 for i, name in enumerate(names)}
    records = [sampled_batch(tracking, names, rates, step) for step in (0, 4)]
    before = repr(tracking.state_dict())
    first, last = json.loads(json.dumps(records))
    assert (
        len(first["id"]) == MAX_PROMPTS
        and first["id"] == last["id"]
        and set(first["texts"]) == set(first["id"])
    )
    assert "texts" not in last and first["used"] == 8 * len(names) == first["rows"]
    assert first["judged"] == len(names) and first["inside"] == sorted(first["inside"])
    value = tracking.belief.predict(last["id"], step=4)
    assert last["after"] == pytest.approx(value.mean.tolist(), rel=1e-3, abs=1e-6)
    assert last["after_sd"] == pytest.approx(value.variance.sqrt().tolist(), rel=1e-3)
    assert all(0 < reward < 1 for reward, mixed in zip(last["reward"], last["mixed"]) if mixed == "1")
    assert all(reward in (0, 1, None) for reward, mixed in zip(last["reward"], last["mixed"]) if mixed == "0")
    following = tracking.expected_counts(names, step=5, total=8 * len(names))
    assert sum(following.values()) == 8 * len(names) and repr(tracking.state_dict()) == before
    assert [following[name] for name in last["id"]] == last["next"]

    with Run.create(tmp_path / "run", "", {}) as run:
        for record in records:
            run.append("beliefs.jsonl", record)
    read = read_beliefs(tmp_path / "run", [])
    assert read and [batch.step for batch in read.batches] == [0.0, 4.0] and len(read.prompts) == MAX_PROMPTS
    assert read.batches[0].inside == dict(zip(LEVELS, map(float, first["inside"])))
    assert read.texts[last["id"][0]] == f"text of {last['id'][0]}"
    fixed = Tracking(make_belief("auto"), Budget())
    assert fixed.observers == [] and fixed.budget.allocation == "fixed"


def test_damaged_and_repeated_rows_of_beliefs(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", {}, updates=4)
    write_beliefs(run, batches=10)
    lines = (run / "beliefs.jsonl").read_text().splitlines()
    resumed = json.loads(lines[6]) | {"used": 1}
    bad = [
        "{", "[]", "7", '{"step": 3}', '{"step": 3, "id": ["a"]}', '{"step": null, "id": []}', "[" * 50_000, "",
        json.dumps(json.loads(lines[0]) | {"n": [1]}), json.dumps(json.loads(lines[0]) | {"mean": 3}),
    ]  # fmt: skip
    (run / "beliefs.jsonl").write_text("\n".join([*lines, *bad, json.dumps(resumed), lines[7][:50]]))
    notes: list[str] = []
    beliefs = read_beliefs(run, notes)
    assert beliefs and [batch.step for batch in beliefs.batches] == [0, 2, 4, 6, 8, 10, 12]
    assert beliefs.batches[-1].used == 1 and "10 rows of beliefs.jsonl could not be read" in notes[0]
    assert "Beliefs and budget" in page([run])
    (run / "beliefs.jsonl").write_text("\n".join(bad))
    assert read_beliefs(run, []) is None and "No run tracked beliefs" in page([run])


def test_real_rewards_have_no_bands(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", {}, updates=4)
    write_beliefs(run, batches=6)
    text = (run / "beliefs.jsonl").read_text().replace('"rewards": "unit"', '"rewards": "real"')
    (run / "beliefs.jsonl").write_text(text)
    html = page([run])
    assert "so prompts are not called learned or hopeless" in html and "Against a fixed number" not in html


@pytest.mark.parametrize("n", [1, 2])
def test_groups_of_one_have_no_share_that_is_mixed(n: int, tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", {}, updates=4)
    write_beliefs(run, batches=6)
    rows = [json.loads(line) for line in (run / "beliefs.jsonl").read_text().splitlines()]
    for row in rows:
        row |= {"n": [n] * len(row["n"]), "rows": n * row["prompts"], "used": n * row["prompts"]}
    (run / "beliefs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert ("Informative groups" in page([run])) == (n > 1)


@pytest.mark.parametrize(
    ("factors", "binary", "said"),
    [
        (
            [9.0, *[4.0, 5.2] * 4],
            True,
            ["F = 4.6: single completions pay here", "Informative completions: 30%"],
        ),
        ([1.2] * 9, True, ["F = 1.2: use a batch mean"]),
        ([4.6] * 9, False, ["F = 4.6", "Rewards are not 0/1, so F = 1 + variance of the prompts"]),
        ([], True, []),
    ],
)
def test_advice_from_the_beliefs_own_numbers(
    factors: list[float], binary: bool, said: list[str], tmp_path: Path
) -> None:
    """Of the last eight batches."""
    run = write_run(tmp_path / "run", {}, updates=10)
    write_beliefs(run, batches=6)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    train = [row for row in lines if row["kind"] == "train"]
    for row, factor in zip(train[-len(factors) :], factors):
        row |= {"belief/noise_factor": factor} | ({"belief/informative": 0.3} if binary else {})
    (run / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    text = page([run])
    assert all(words in text for words in said)
    beliefs = read_beliefs(run, [])
    assert beliefs
    visits = [visit for batch in beliefs.batches for visit in batch.visits.values()]
    often = sum(visit.n for visit in visits) / len(beliefs.prompts)
    assert (f"A prompt was sampled {often:.1f} times so far" in text) == (bool(said) and often < 8)
    assert ("F = " in text) == bool(said)


def test_savings_against_brute_force(tmp_path: Path) -> None:
    special = pytest.importorskip("scipy.special")
    integrate = pytest.importorskip("scipy.integrate")
    a, b, size = 1.7, 0.6, 5
    density = lambda p: p ** (a - 1) * (1 - p) ** (b - 1) / special.beta(a, b)  # noqa: E731
    whole = integrate.quad(lambda p: density(p) * (1 - p**size - (1 - p) ** size), 0, 1)[0]
    assert mixed_share(size, (a, b)) == pytest.approx(whole, rel=1e-6)
    run = write_run(tmp_path / "run", {}, updates=4)
    write_beliefs(run, batches=30)
    beliefs = read_beliefs(run, [])
    assert beliefs
    gradient, groups = savings(beliefs)
    visits = [visit for batch in beliefs.batches for visit in batch.visits.values()]
    signal = [visit.after * (1 - visit.after) - visit.after_sd**2 for visit in visits]  # E[p] - E[p^2]
    error = sum(s / visit.n for s, visit in zip(signal, visits))
    assert sum(s / gradient.fixed for s in signal) == pytest.approx(error, rel=0.02)
    assert gradient.used == pytest.approx(sum(visit.n for visit in visits) / len(visits))
    evidence = [visit.after * (1 - visit.after) / visit.after_sd**2 - 1 for visit in visits]
    shapes = [(visit.after * e, (1 - visit.after) * e) for visit, e in zip(visits, evidence)]
    expected = sum(mixed_share(groups.fixed, shape) for shape in shapes)
    assert expected == pytest.approx(sum(visit.mixed for visit in visits), rel=0.02)
    assert savings(Beliefs()) == []


# ---------------------------------------------------------------- tokens


@pytest.fixture
def traced(tmp_path: Path) -> Path:
    """A run whose stored columns are those of its own method."""
    method = make_method("kpo_diffuse")
    run = write_run(tmp_path / "run", {"method": "kpo_diffuse"}, updates=4, config='method = "kpo_diffuse"\n')
    generator = torch.Generator().manual_seed(5)
    old = -torch.rand(4, 12, generator=generator)
    logp = old + 0.1 * torch.randn(4, 12, generator=generator)
    advantage = torch.tensor([1.0, -1.0, 0.5, 0.0])
    rollouts = Rollouts(old, torch.ones(4, 12, dtype=torch.bool))
    tokens = policy_loss(method, rollouts, logp, advantage=advantage).tokens
    columns: dict[str, list[object]] = {}
    for row in range(4):
        part = {
            "sequence": [row] * 12, "prompt_id": ["p"] * 12, "prompt": ["q"] * 12, "completion": ["c"] * 12,
            "position": list(range(12)), "token_id": list(range(100_000_001, 100_000_013)), "token": ["x"] * 12,
            "logp_old": old[row].tolist(), "logp": logp[row].tolist(), "log_ratio": tokens.log_ratio[row].tolist(),
            "filtered_log_ratio": tokens.log_weight[row].tolist(), "gain": tokens.gain[row].tolist(),
            "coefficient": tokens.coefficient[row].tolist(), "kept": tokens.kept[row].tolist(),
            "advantage": [advantage[row].item()] * 12, "reward": [1.0] * 12,
        }  # fmt: skip
        for name, values in part.items():
            columns.setdefault(name, []).extend(values)
    with Run.open(run) as writer:
        writer.write_traces(3, columns)
    return run


def test_other_methods_are_those_of_replay(traced: Path) -> None:
    shown = inspected([read_run(traced)])
    methods = shown.data["runs"][0]["methods"]
    assert [method["name"] for method in methods] == ["kpo_diffuse", "grpo", "gspo", "kpo", "dppo_tv"]
    assert sorted(completion["sequence"] for completion in shown.completions) == ["0", "1", "2", "3"]
    for place, method in enumerate(methods):
        again = replay(traced, method["name"]).overall.method
        coefficients = [value for completion in shown.completions for value in completion["by"][place][1]]
        marks = "".join(completion["by"][place][2] for completion in shown.completions)
        assert marks.count("1") / len(marks) == pytest.approx(again.kept)
        assert max(coefficients) == pytest.approx(again.quantiles["1"], rel=1e-3)
        assert min(coefficients) == pytest.approx(again.quantiles["0"], rel=1e-3)
    one = shown.completions[0]
    assert one["id"][0] == 100_000_001.0
    filtered = causal_filter(
        torch.tensor([one["raw"]]), torch.ones(1, 12, dtype=torch.bool),
        process_noise=1e-6, observation_noise=1.0, initial_variance=math.inf,
    )  # fmt: skip
    assert one["deviation"] == pytest.approx(filtered.state.variance.sqrt()[0].tolist(), rel=1e-3)
    assert one["innovation"] == pytest.approx(filtered.info.innovation[0].tolist(), rel=1e-2, abs=1e-4)
    assert one["gain"] == pytest.approx(filtered.info.gain[0].tolist(), rel=1e-3)
    assert page([traced]) == page([traced]) and " at 0x" not in page([traced])


def test_traces_that_lack_columns_show_what_they_have(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    run = write_run(tmp_path / "run", {}, updates=4)
    (run / "traces").mkdir()
    table = {"sequence": [0, 0], "token": ["a", "b"], "log_ratio": [0.1, None]}
    parquet.write_table(pyarrow.table(table), run / "traces" / "step-000001.parquet")
    shown = inspected([read_run(run)])
    assert shown.completions[0]["raw"] == [0.1, None] and shown.completions[0]["by"] == [
        [[None, None], [None, None], "11"]
    ]
    assert any("Other methods are not shown" in said for said in shown.said)
    assert "inspector-data" in page([run])


def test_long_and_many_completions_are_sampled(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", {}, updates=4)
    for step in range(1, 31):
        write_trace(run, ["ab"] * (MAX_OF_COMPLETION + 40 if step == 30 else 20), step=step, sequences=9)
    shown = inspected([read_run(run)])
    assert sorted({completion["step"] for completion in shown.completions}) == spread_out(
        list(range(1, 31)), 8
    )
    long = [completion for completion in shown.completions if completion["step"] == 30]
    assert long and all(c["cut"] == 40 and len(c["token"]) == MAX_OF_COMPLETION for c in long)
    assert sum(len(completion["token"]) for completion in shown.completions) <= 12_000
    assert "out of 30 traced steps" in shown.said[-1] and "cut at 1200 tokens" in shown.said[-1]


def test_no_completion_is_shown_twice(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", {}, updates=4)
    for step in range(1, 6):
        write_trace(run, ["a", "b"], step=step, scale=0.0 if step in (1, 5) else 0.2)
    shown = inspected([read_run(run)])
    assert sorted((c["step"], c["sequence"]) for c in shown.completions) == [
        (step, sequence) for step in (2, 3, 4) for sequence in "01"
    ]
    for step in (2, 3, 4):
        write_trace(run, ["a", "b"], step=step, scale=0.0)
    assert len(inspected([read_run(run)]).completions) == 10  # nothing moved: better than nothing


def test_gradient_by_position(traced: Path) -> None:
    groups = pooled([read_run(traced)])
    figure = position_figure(groups, {groups[0].name: 0})
    assert (
        figure and figure.title == "Gradient by position" and figure.chart["lines"][0]["name"] == "as trained"
    )
    assert position_figure(pooled([read_run(write_run(traced.parent / "bare", {}))]), {}) is None


def test_json_in_a_script_element_cannot_end_it() -> None:
    text = "</script><!--&\u2028\ud800"
    shown = as_json({"a": [text, 1.5, None]})
    assert not set("<>&\u2028") & set(shown) and json.loads(shown) == {"a": [text, 1.5, None]}
    with pytest.raises(ValueError, match="Out of range"):
        as_json(math.nan)


def test_a_run_that_is_still_going_on(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", {"method": "kpo"}, updates=8, status="running")
    first = page([run])
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "train", "step": 9, "rew')
    second = page([run])
    assert "connect-src" not in first and "could not be read" not in first
    assert "could not be read" in second
    with pytest.raises(RunError):
        page([tmp_path / "none"])


# ---------------------------------------------------------------- colours


def luminance(colour: str) -> float:
    """Relative luminance of ``#rrggbb`` (WCAG 2.2)."""
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("sheet", ["page.css", "dark.css"])
def test_text_can_be_read_on_every_colour(sheet: str) -> None:
    text = (Path(report.__file__).parent / "templates" / sheet).read_text()
    colours = dict(re.findall(r"--(\w+): (#[0-9a-f]{6})", text))
    pairs = [(fore, back) for fore in ("ink", "muted", "warn", "good") for back in ("paper", "panel")]
    pairs += [("ink", f"{side}{level}") for side in "np" for level in (1, 2)]
    pairs += [("strong", f"{side}{level}") for side in "np" for level in (3, 4, 5)]
    for fore, back in pairs:
        light, dark = sorted((luminance(colours[fore]), luminance(colours[back])), reverse=True)
        assert (light + 0.05) / (dark + 0.05) >= 4.5, (fore, back)
    for level in range(1, 6):  # blue and orange alone: apart for every kind of colour vision
        blue, orange = colours[f"n{level}"], colours[f"p{level}"]
        assert int(blue[5:], 16) > int(blue[1:3], 16) and int(orange[5:], 16) < int(orange[1:3], 16)


# ---------------------------------------------------------------- alarms


def test_alarms_are_listed_as_text_and_only_where_there_are_some(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", {"method": "kpo"}, updates=6)
    assert 'id="alarms"' not in page([folder])
    hostile = "<script>alert(1)</script>"
    for step in range(1, MAX_ALARMS + 3):
        alarm = Alarm(step=step, level=0.1, best=0.5, z=-6.0, tokens=(Token(hostile, 2.5, "p", 3),))
        append_alarm(folder, alarm, "warn")
    text = page([folder])
    assert 'href="#alarms"' in text and text.count("the newest checkpoint from before the fall") == MAX_ALARMS
    assert f"The first {MAX_ALARMS} of {MAX_ALARMS + 2} alarms" in text
    assert hostile not in text and "&lt;script&gt;alert(1)" in text
    assert "the reward has fallen to 0.1, below half of its best 0.5 (-6.0 deviations)" in text


# ---------------------------------------------------------------- rewards


def test_held_out_rewards_and_each_function_are_drawn_and_a_fall_is_said(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", {"method": "kpo", "seed": 0}, updates=40)
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for row in rows:
        if row["kind"] == "train":
            row["reward"] = 0.8 if row["step"] <= 20 else 0.3
            row |= {"rewards/exact/mean": row["reward"], "rewards/brief/mean": 0.5}
        else:
            row["eval/sampled_reward"] = row["step"] / 80
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    text = page([run])
    said = "The training reward fell: mean 0.300 over the last 10 batches, 0.800 at its best (steps 1 to 10)."
    assert said in text
    drawn = [chart["lines"] for chart in charts_of(text) if chart.get("lines")]
    (held_out,) = [lines for lines in drawn if lines[0]["points"][1] == [0, 0.1, 0.2, 0.3, 0.4, 0.5]]
    assert [line["name"] for line in held_out] == ["sampled", "greedy"]
    assert ["exact", "brief"] in [[line["name"] for line in lines] for lines in drawn]
