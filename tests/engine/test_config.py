"""Configuration: what is written reads back, and whatever else comes in is a ConfigError that says where."""

from __future__ import annotations

import math
import tomllib
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

import pytest
from annotated_types import Interval
from hypothesis import given, settings
from hypothesis import strategies as st

from kalman_rl.engine.config import (
    MAX_TOML_BYTES,
    DemoConfig,
    StressConfig,
    TrainConfig,
    build,
    labels,
    load_toml,
    notes,
    to_toml,
    validate,
)
from kalman_rl.engine.settings import REPORTERS
from kalman_rl.errors import ConfigError
from kalman_rl.sampling.budget import Budget

KINDS = (TrainConfig, StressConfig, DemoConfig)


def toml(tmp_path: Path, text: str | bytes) -> Path:
    path = tmp_path / "a.toml"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


# Defaults, documentation, round trip


@pytest.mark.parametrize("kind", KINDS)
def test_defaults_are_valid_and_quiet(kind: type) -> None:
    validate(kind())
    assert notes(TrainConfig()) == []


def limits(kind: type, name: str) -> dict[str, float]:
    """The range that stands beside a field's type."""
    hint = get_type_hints(kind, include_extras=True)[name]
    rules = [rule for rule in getattr(hint, "__metadata__", ()) if isinstance(rule, Interval)]
    return {side: getattr(rule, side) for rule in rules for side in ("ge", "le")}


@pytest.mark.parametrize("kind", KINDS)
def test_every_number_has_a_range_that_holds_its_default(kind: type) -> None:
    budget = {spec.name for spec in fields(Budget)}  # which checks itself, see test_bad_input
    for spec in fields(kind):
        hint = get_type_hints(kind)[spec.name]
        number = {int, float} & {hint, *get_args(hint)} and get_origin(hint) not in (dict, tuple)
        if number and spec.name not in budget:
            low, high = (limits(kind, spec.name)[side] for side in ("ge", "le"))
            assert spec.default is None or low <= spec.default <= high


@st.composite
def train_configs(draw: st.DrawFn) -> TrainConfig:
    values: dict[str, Any] = {}
    hints = get_type_hints(TrainConfig)
    for spec in fields(TrainConfig):
        hint = hints[spec.name]
        if limits(TrainConfig, spec.name):
            low, high = (limits(TrainConfig, spec.name)[side] for side in ("ge", "le"))
            real = float in (hint, *get_args(hint))
            number = st.floats(low, high) if real else st.integers(int(low), int(min(high, 10_000)))
            values[spec.name] = draw(number if spec.default is not None else st.none() | number)
    values["method"] = draw(st.sampled_from(["kpo", "grpo", "cispo"]))
    values["method_options"] = draw(st.dictionaries(st.just("low"), st.floats(0, 0.5)))
    values["report_to"] = draw(st.sampled_from(REPORTERS))
    name = st.text(st.sampled_from("aZ0_-."), min_size=1, max_size=20).map(lambda text: "r" + text)
    values["run"] = draw(st.none() | name.map(Path))
    values["quiet"] = draw(st.booleans())
    values["task"] = draw(
        st.text(st.characters(exclude_categories=("Cs",)), min_size=1).map(lambda t: "t" + t)
    )
    bounds = sorted(draw(st.tuples(st.integers(0, 4_096), st.integers(1, 4_096))))
    values |= {"completions_min": bounds[0], "completions_max": bounds[1], "budget": None}
    values |= {name: draw(st.integers(1, 10_000)) for name in ("max_rounds", "coverage_steps")}
    values["reward_noise_variance"] = draw(st.floats(0, 1e12))
    if draw(st.booleans()):
        values |= {"advantage": "tracked", "allocation": "rounds", "rounds": (1, 3)}
        values["budget"] = draw(st.none() | st.floats(max(bounds[0], 0.01), bounds[1]))
    else:  # these methods compare completions of one prompt, and no belief begins with anything
        values["measure_prior"] = 0
        values["completions_per_prompt"] = max(values["completions_per_prompt"] or 8, 2)
    values["sampler_bits"] = draw(st.just(0) | st.integers(2, 16))
    values["sampler_lag"] *= values["save_every"] == 0
    updates, micro = values["updates_per_generation"], values["gradient_accumulation"]
    values |= {"updates_per_generation": updates % 4 + 1, "gradient_accumulation": micro % 4 + 1}
    values["prompts_per_generation"] = values["updates_per_generation"] * values["gradient_accumulation"]
    return TrainConfig(**{key: v.replace("\0", "") if isinstance(v, str) else v for key, v in values.items()})


def written_out(config: TrainConfig) -> TrainConfig:
    """With the size of the batch, which a file states."""
    return replace(config, prompts_per_generation=config.prompts, completions_per_prompt=config.group_size)


@settings(max_examples=50)
@given(train_configs())
def test_what_is_written_reads_back(tmp_path_factory: pytest.TempPathFactory, config: TrainConfig) -> None:
    validate(
        replace(config, task="products")
    )  # any text is written and read, only tasks that exist are valid
    path = toml(tmp_path_factory.getbasetemp(), to_toml(config))
    assert build(TrainConfig, load_toml(path)) == written_out(config)


@pytest.mark.parametrize(
    "config",
    [
        StressConfig(conditions=("B",), methods=("kpo", "grpo"), seeds=3, quiet=True),
        DemoConfig(run=Path("a/b"), overwrite=False),
        TrainConfig(
            data=Path("rows.jsonl"),
            method_options={"high": math.inf},
            reward=("a.b:c",),
            reward_weights=(0.5,),
        ),
    ],
)
def test_every_kind_reads_back(tmp_path: Path, config: Any) -> None:
    text = to_toml(config)
    written = written_out(config) if isinstance(config, TrainConfig) else config
    assert build(type(config), load_toml(toml(tmp_path, text), type(config))) == written
    unset = {spec.name for spec in fields(written) if getattr(written, spec.name) is None}
    assert tomllib.loads(text).keys() == {spec.name for spec in fields(config)} - unset


# Layers


def test_an_unknown_name_in_a_layer() -> None:
    with pytest.raises(ConfigError, match="^key: got 'stepz', .*did you mean 'steps'"):
        build(TrainConfig, {"stepz": 1})


def test_later_layers_win() -> None:
    config = build(TrainConfig, {"steps": 5, "seed": 1}, {}, {"steps": 7})
    assert (config.steps, config.seed, config.iterations) == (7, 1, 1)


KPO = {"method": "kpo", "method_options": {"low": 0.1}}


@pytest.mark.parametrize(
    ("layers", "method", "options"),
    [
        ([KPO], "kpo", {"low": 0.1}),
        ([KPO, {"method_options": {"high": 0.2}}], "kpo", {"low": 0.1, "high": 0.2}),
        ([KPO, {"method": "kpo", "method_options": {"low": 0.3}}], "kpo", {"low": 0.3}),
        ([KPO, {"method": "grpo"}], "grpo", {}),
        ([KPO, {"method": "grpo", "method_options": {"high": 0.2}}], "grpo", {"high": 0.2}),
        ([KPO, {"method": "grpo"}, {"steps": 3}], "grpo", {}),
        ([{"method_options": {"low": 0.1}}, {"method": "kpo_diffuse"}], "kpo_diffuse", {"low": 0.1}),
        (
            [{"method_options": {"low": 0.1}}, {"method_options": {"high": 0.2}}],
            "kpo_diffuse",
            {"low": 0.1, "high": 0.2},
        ),
    ],
)
def test_options_belong_to_their_method(layers: list[dict[str, Any]], method: str, options: dict) -> None:
    config = build(TrainConfig, *layers)
    assert (config.method, config.method_options) == (method, options)
    assert KPO == {"method": "kpo", "method_options": {"low": 0.1}}


def test_options_belong_to_their_belief() -> None:
    spo: dict[str, Any] = {"belief": "spo", "belief_options": {"rho": 0.9}}
    assert build(TrainConfig, spo, {"belief_options": {"scale": False}}).belief_options == {
        **{"rho": 0.9, "scale": False}
    }
    assert build(TrainConfig, spo, {"belief": "beta"}).belief_options == {}
    assert build(TrainConfig, spo, {"method": "grpo"}).belief_options == {"rho": 0.9}


def test_options_of_a_belief_read_back(tmp_path: Path) -> None:
    options = {"forgetting": (0.9, 0.99), "scale": False}
    config = TrainConfig(advantage="tracked", belief="beta", belief_options=options)
    validate(config)
    again = build(TrainConfig, load_toml(toml(tmp_path, to_toml(config))))
    validate(again)
    assert again.belief_options == {"forgetting": [0.9, 0.99], "scale": False}
    short = load_toml(toml(tmp_path, "[belief]\nname = 'beta'\nforgetting = [0.9, 0.99]\nscale = false\n"))
    assert short == {"belief": "beta", "belief_options": again.belief_options}


def test_method_as_a_table(tmp_path: Path) -> None:
    long = load_toml(toml(tmp_path, 'method = "kpo"\n[method_options]\nprocess_noise = 1e-4\nlow = 1\n'))
    short = load_toml(toml(tmp_path, 'steps = 3\n[method]\nname = "kpo"\nprocess_noise = 1e-4\nlow = 1\n'))
    assert short == {"steps": 3, **long} and isinstance(short["method_options"]["low"], float)
    assert load_toml(toml(tmp_path, "[method]\nlow = 0.5\n")) == {"method_options": {"low": 0.5}}


# What is wrong in a file


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("learnig_rate = 1e-4", "a.toml: key: got 'learnig_rate', expected one of "),
        ("learnig_rate = 1e-4", "; did you mean 'learning_rate'?"),
        ("# note\n\nstep = 1", "a.toml: key: got 'step', expected one of "),
        ("[lora]\nrank = 1", "a.toml: key: got 'lora'"),
        ("lora.rank = 1", "a.toml: key: got 'lora'"),
        ("seed = 1\n'strange key' = 1", "a.toml: key: got 'strange key'"),
        ("seed = 0\nsteps = '20'", "a.toml: steps: got '20', expected a whole number"),
        ("steps = 20.0", "a.toml: steps: got 20.0, expected a whole number"),
        ("steps = true", "a.toml: steps: got True, expected a whole number"),
        ("steps = {a = 1}", "a.toml: steps: got {'a': 1}, expected a whole number"),
        ("[steps]\na = 1", "a.toml: steps: got {'a': 1}, expected a whole number"),
        ("quiet = 1", "a.toml: quiet: got 1, expected true or false"),
        ("learning_rate = nan", "a.toml: learning_rate: got nan, expected a finite number"),
        ("learning_rate = 1979-05-27", "learning_rate: got datetime.date(1979, 5, 27), expected a number"),
        (f"learning_rate = 1{'0' * 400}", "expected a number"),
        ("run = 5", "a.toml: run: got 5, expected a path"),
        ('run = "a\\u0000b"', "expected text in UTF-8 without NUL"),
        ("task = ['a']", "a.toml: task: got ['a'], expected text"),
        ("dtype = 'float23'", "a.toml: dtype: got 'float23', expected one of auto, bfloat16, float32; did"),
        ("schedule = 1", "a.toml: schedule: got 1, expected one of"),
        ("belief_options = 3", "a.toml: belief_options: got 3, expected options by name, as KEY=VALUE"),
        ("[belief_options]\nrho = {a = 1}", "belief_options.rho: got {'a': 1}, expected a number, true or"),
        ("[belief_options]\nrho = [1, nan]", "belief_options.rho: got [1, nan], expected a number, true or"),
        ("[belief]\nrho = 1\n[belief_options]\nrho = 1", "got both [belief] and belief_options"),
        ("reward_noise = inf", "a.toml: reward_noise: got inf, expected a finite number"),
        ("method_options = 3", "a.toml: method_options: got 3, expected options by name, as KEY=VALUE"),
        ("[method_options]\nlow = 'x'", "a.toml: method_options.low: got 'x', expected a number"),
        (
            "seed = 1\n[method]\nname = 'kpo'\nlow = 'x'",
            "a.toml: method_options.low: got 'x', expected a number",
        ),
        ("seed = 1\n[method]\nname = 3", "a.toml: method: got 3, expected text"),
        ("method_options = {low = 1}\n[method]\nname = 'kpo'", "got both [method] and method_options"),
        (
            "steps = 1\nsteps = 2",
            "a.toml: not valid TOML in UTF-8: Cannot overwrite a value (at end of document)",
        ),
        ("steps =", "a.toml: not valid TOML in UTF-8: Invalid value (at "),
        ("steps: 3", "a.toml: not valid TOML"),
        (
            b"task = 'ok'\nmodel = '\xff'",
            "a.toml: not valid TOML in UTF-8: 'utf-8' codec can't decode byte 0xff",
        ),
        (b"\0", "not valid TOML"),
        ("steps = " + "[" * 100_000, "not valid TOML in UTF-8: got more than 32 levels"),
        (f"steps = {'9' * 5000}", "not valid TOML"),
        ("a" * 200 + " = 1", "key: got 'aaa"),
        (b"#" * (MAX_TOML_BYTES + 1), "got more than 10,000,000 bytes"),
    ],
)
def test_files_with_mistakes(tmp_path: Path, text: str | bytes, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_toml(toml(tmp_path, text))
    assert message in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1 and len(str(caught.value)) < 1500


@pytest.mark.parametrize("where", ["nothing.toml", "", "a\0b", "x" * 5000])
def test_unreadable_files(tmp_path: Path, where: str) -> None:
    with pytest.raises(ConfigError, match="config: cannot read"):
        load_toml(tmp_path / where)


def test_wrong_items_of_lists(tmp_path: Path) -> None:
    for text, message in (
        ("conditions = ['D']", "got 'D', expected one of A, B, C"),
        ("conditions = 'A'", "a list"),
    ):
        with pytest.raises(ConfigError, match=message):
            load_toml(toml(tmp_path, text), StressConfig)


# What is wrong with a configuration


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 0}, "steps: got 0, expected at least 1"),
        ({"learning_rate": -1e-4}, r"learning_rate: got -0\.0001, expected at least 0"),
        ({"temperature": 0.0}, r"temperature: got 0\.0, expected at least 0\.01"),
        ({"threads": 0}, "threads: got 0"),
        ({"seed": 2**32}, "seed: got 4294967296"),
        ({"steps": "20"}, "steps: got '20', expected a whole number"),
        ({"steps": None}, "steps: got None, expected a whole number"),
        ({"learning_rate": math.nan}, "learning_rate: got nan, expected a finite number"),
        ({"method": "kpoo"}, r"method: got 'kpoo', expected one of .*; did you mean 'kpo'\?"),
        ({"method_options": {"lo": 1.0}}, r"method option: got 'lo' .*did you mean 'low'\?"),
        ({"method_options": {"low": -1.0}}, "method_options of kpo_diffuse: low: got -1"),
        ({"method_options": {"process_noise": -1.0}}, "method_options of kpo_diffuse: "),
        ({"method_options": {"low": math.nan}}, r"method_options\.low: got nan, expected a number"),
        ({"method_options": {"name": 1.0}}, "method_options of kpo_diffuse: "),
        (
            {"model": "smolm2"},
            r"model: got 'smolm2', .*did you mean 'smollm2'\?; or a directory, or a hub",
        ),
        ({"model": "./nothing"}, "model: got './nothing', expected a directory that exists"),
        ({"model": "a/b/c"}, "hub id OWNER/NAME"),
        ({"model": ""}, "hub id OWNER/NAME"),
        ({"schedule": "linar"}, r"schedule: got 'linar', .*did you mean 'linear'\?"),
        ({"report_to": "wandbb"}, r"report_to: got 'wandbb', .*did you mean 'wandb'\?"),
        ({"task": " "}, "task: got ' ', expected one of"),
        ({"task": "product"}, r"task: got 'product', .*did you mean 'products'\?"),
        ({"task": "\ud800"}, "task: got .*expected text"),
        ({"data": Path("nothing.jsonl")}, "data: got 'nothing.jsonl', expected a JSONL, Parquet or CSV file"),
        ({"reward": ("module.function",)}, "reward: got 'module.function', expected MODULE:FUNCTION"),
        ({"run": Path("runs/..")}, r"run: got '\.\.' as a run's name"),
        ({"run": Path("/")}, "run: got '' as a run's name"),
        ({"updates_per_generation": 3}, "updates_per_generation: got 3, expected a divisor of 8 prompts"),
        ({"gradient_accumulation": 5}, "gradient_accumulation: got 5, expected a divisor of 32"),
        ({"updates_per_generation": 128}, "updates_per_generation: got 128"),
    ],
)
def test_wrong_settings(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        validate(replace(TrainConfig(), **changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"methods": ()}, r"methods: got \[\], expected one or more"),
        ({"methods": ("kpo", "kpo")}, "methods: got .*each once"),
        ({"methods": ("kpoo",)}, "did you mean 'kpo'"),
        ({"conditions": ("D",)}, "conditions: got 'D'"),
        ({"rollouts": 60, "minibatch": 60}, "rollouts: got 60, expected a multiple of 8"),
        ({"minibatch": 100}, "minibatch: got 100, expected a divisor of rollouts = 512"),
        ({"run": Path("..")}, "run: got"),
    ],
)
def test_wrong_stress_settings(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        validate(replace(StressConfig(), **changes))


@pytest.mark.parametrize(
    "model", ["tiny", "smollm2", "HuggingFaceTB/SmolLM2-135M", "openai-community/gpt2", ".", "/"]
)
def test_models_that_are_allowed(model: str) -> None:
    validate(TrainConfig(model=model))


@pytest.mark.parametrize(
    ("changes", "note"),
    [
        ({"updates_per_generation": 1}, "every update is on-policy"),
        ({"steps": 21}, "steps = 21 is no multiple of 2"),
        ({"steps": 4}, "warmup_steps = 4 is not below steps = 4"),
        ({"belief": "beta"}, "belief = 'beta' is not read: advantage is 'method'"),
    ],
)
def test_notes(changes: dict[str, Any], note: str) -> None:
    config = replace(TrainConfig(), **changes)
    validate(config)
    (text,) = notes(config)
    assert text.startswith(note) or note in text
    assert notes(TrainConfig(method="reinforce")) == []


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_no_number_may_be_nan_or_infinite(kind: type, value: float) -> None:
    for name in (spec.name for spec in fields(kind) if limits(kind, spec.name)):
        real = float in (hint := get_type_hints(kind)[name], *get_args(hint))
        expected = "a finite number" if real else "a whole number"
        with pytest.raises(ConfigError, match=f"^{name}: got {value}, expected {expected}$"):
            validate(replace(kind(), **{name: value}))
    with pytest.raises(ConfigError, match="^(budget|reward_noise_variance): got .*expected a"):
        Budget(**{"budget" if kind is TrainConfig else "reward_noise_variance": value})


@pytest.mark.parametrize(
    ("method", "advantage"),
    [
        ("grpo", "tracked"),
        ("grpo", "batch_mean"),
        ("kpo", "james_stein"),
        ("reinforce", "method"),
        ("spo", "method"),
    ],
)
def test_single_completions(method: str, advantage: Any) -> None:
    validate(TrainConfig(method=method, advantage=advantage, completions_per_prompt=1))


@pytest.mark.parametrize(
    ("given", "prompts", "size"),
    [
        ({}, 8, 8),
        ({"advantage": "batch_mean"}, 8, 8),
        ({"advantage": "batch_mean", "completions_per_prompt": 1}, 64, 1),
        ({"advantage": "tracked"}, 64, 1),
        ({"advantage": "tracked", "prompts_per_generation": 16}, 16, 1),
        ({"advantage": "tracked", "completions_per_prompt": 8}, 8, 8),
    ],
)
def test_a_tracked_run_samples_single_completions(given: dict[str, Any], prompts: int, size: int) -> None:
    """Unless it is told otherwise; with as many completions as a run in groups."""
    config = build(TrainConfig, given)
    assert (config.prompts, config.group_size) == (prompts, size)
    assert f"prompts_per_generation = {prompts}\ncompletions_per_prompt = {size}\n" in to_toml(config)


@pytest.mark.parametrize(
    ("method", "advantage"), [("grpo", "method"), ("reinforce", "leave_one_out"), ("otb", "method")]
)
def test_single_completions_need_a_baseline_from_elsewhere(method: str, advantage: Any) -> None:
    with pytest.raises(
        ConfigError, match=rf"^completions_per_prompt: got 1 for method '{method}', .*advantage = 'tracked'"
    ):
        validate(TrainConfig(method=method, advantage=advantage, completions_per_prompt=1))
    with pytest.raises(ConfigError, match="^completions_per_prompt: got 0, expected at least 1"):
        validate(TrainConfig(completions_per_prompt=0))


# Anything at all


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20) | st.binary(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8) | st.integers(), inner),
    max_leaves=5,
)


@settings(max_examples=300)
@given(st.data())
def test_any_values_are_valid_or_a_config_error(data: st.DataObject) -> None:
    kind = data.draw(st.sampled_from(KINDS))
    names = data.draw(st.sets(st.sampled_from([spec.name for spec in fields(kind)]), max_size=4))
    values = ANYTHING | st.sampled_from(
        ["kpo", "grpo", Path("a/b"), Path("\0"), 1, 0.5, {"low": 1e-3}, ("A",)]
    )
    config = kind(**{name: data.draw(values) for name in sorted(names)})
    try:
        validate(config)
    except ConfigError as error:
        assert ": got " in str(error) or "method" in str(error)
    else:
        to_toml(config).encode()


KEYS = [spec.name for spec in fields(TrainConfig)]
FRAGMENTS = st.sampled_from(
    [*KEYS, "=", "=", "\n", "\n", "[method]", "name", '"kpo"', "1", "0.5", "true", "[", "]"]
)


@settings(max_examples=300)
@given(st.text(max_size=50) | st.lists(FRAGMENTS, max_size=25).map(" ".join))
def test_any_text_is_toml_or_a_config_error(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    path = toml(tmp_path_factory.getbasetemp(), text.encode("utf-8", "surrogatepass"))
    try:
        layer = load_toml(path)
    except ConfigError as error:
        assert str(error).startswith(str(path))
    else:
        build(TrainConfig, layer)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"allocation": "rounds"}, "allocation: got 'rounds' with advantage='method', expected fixed"),
        ({"budget": 4.0}, "budget: got 4.0 with allocation='fixed'"),
        ({"budget": 0.0}, "budget: got 0.0, expected a mean number of completions > 0"),
        (
            {"advantage": "tracked", "allocation": "rounds", "rounds": ()},
            r"rounds: got \[\], expected a list of one or more integers >= 1",
        ),
        (
            {"advantage": "tracked", "allocation": "rounds", "rounds": (2, 0)},
            r"rounds: got \[2, 0\], expected",
        ),
        (
            {"advantage": "tracked", "allocation": "predictive", "completions_min": 9, "completions_max": 8},
            "completions_min, completions_max: got 9, 8, expected whole numbers",
        ),
        (
            {"advantage": "tracked", "allocation": "predictive", "budget": 40.0},
            "budget: got 40.0, expected 0 to 32, the bounds of one prompt's completions",
        ),
        (
            {"belief": "spo", "belief_options": {"rho": 0.9}},
            "belief_options: got {'rho': 0.9} with advantage='method', expected none because no belief is read",
        ),
        (
            {"advantage": "tracked", "belief": "spo", "belief_options": {"roh": 0.9}},
            "belief option: got 'roh' for spo, expected one of rho, half, .*; did you mean 'rho'",
        ),
        (
            {"advantage": "tracked", "belief": "spo", "belief_options": {"rho": 2}},
            "rho, half, low, high: got 2, .* expected 0 < low",
        ),
        ({"source_column": "topic"}, "source_column: got 'topic' with advantage='method', expected it unset"),
        ({"aim": "mixed_groups", "reward_noise": 0.5}, "aim: got 'mixed_groups' with reward_noise = 0.5"),
    ],
)
def test_allocations_that_cannot_work_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        validate(build(TrainConfig, settings))


def test_a_tracked_run_is_labelled_as_such() -> None:
    plain = build(TrainConfig, {"method": "grpo"})
    assert labels(plain)["method"] == "grpo"
    tracked = replace(plain, advantage="tracked")
    assert labels(tracked)["method"] == "grpo+auto"
    assert labels(replace(tracked, allocation="rounds"))["method"] == "grpo+auto+rounds"
    assert labels(replace(plain, data=Path("own_rows.jsonl")))["task"] == "own_rows"
