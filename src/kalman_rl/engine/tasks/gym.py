"""Questions of the reasoning-gym library, asked as short few-shot text and scored by that library."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from kalman_rl.engine.tasks.task import Row, Task, first_line, held_out, make_prompt_id, take
from kalman_rl.errors import AdapterError

TEST_SHARE = 0.25
DEFAULT_TRAIN, DEFAULT_TEST = 512, 128
DRAWS_PER_ROW = 20

Entry = dict[str, Any]


def _itself(question: str) -> str:
    return question


def _numbers(question: str) -> str:
    return " ".join(sorted(re.findall(r"\d+", question)))


def _signed_terms(question: str) -> str:
    return " ".join(sorted(re.findall(r"[+-] \d+", f"+ {question}")))


def _items(question: str) -> str:
    return ", ".join(sorted(question.split(" of ", 1)[1].split(", ")))


def _words(question: str) -> str:
    return " ".join(sorted(question.split(": ", 1)[1].split()))


def _quarter(twin: str) -> bool:
    return held_out(twin, TEST_SHARE)


def _two_fifths_of_products(twin: str) -> bool:
    return twin in _PRODUCT_TEST


def _product_test_pairs() -> frozenset[str]:
    """Forty percent of the 55 unordered digit pairs, the same part of the easy ones and of the squares."""
    shots = {"5 9", "1 6"}
    pairs = [f"{a} {b}" for a in range(10) for b in range(a, 10)]
    easy = {pair for pair in pairs if pair[0] in "01"}
    square = {pair for pair in pairs if pair[0] == pair[2]}
    kept: list[str] = []
    for is_easy in (True, False):
        for is_square in (True, False):
            part = [p for p in pairs if (p in easy) is is_easy and (p in square) is is_square]
            ranked = sorted((p for p in part if p not in shots), key=lambda p: make_prompt_id("products", p))
            kept += ranked[: round(0.4 * len(part))]
    return frozenset(kept)


_PRODUCT_TEST = _product_test_pairs()


@dataclass(frozen=True)
class GymTask:
    """How one reasoning-gym dataset becomes a task.

    Args:
        dataset: name of the dataset in reasoning-gym.
        question: short question text from an entry; the prompt is ``"<shot>\\n<shot>\\n<question> ="``.
        shots: solved questions at the head of every prompt; they are neither trained on nor tested.
        max_completion_tokens: longest reply, the newline included.
        config: the dataset's own settings.
        twin: one spelling for all questions that give each other's answer away (5 * 9 and 9 * 5); twins stay
            on one side.
        is_test: whether a twin is kept aside.
        space: number of different questions, where they are few enough to enumerate them all.
    """

    dataset: str
    question: Callable[[Entry], str]
    shots: tuple[tuple[str, str], ...]
    max_completion_tokens: int
    config: dict[str, Any] = field(default_factory=dict)
    twin: Callable[[str], str] = _itself
    is_test: Callable[[str], bool] = _quarter
    space: int | None = None


def _expression(entry: Entry) -> str:
    return str(entry["metadata"]["expression"])


def _digits(terms: int, digits: int) -> dict[str, Any]:
    return {"min_terms": terms, "max_terms": terms, "min_digits": digits, "max_digits": digits}


GYM: dict[str, GymTask] = {
    "products": GymTask(
        "products",
        _expression,
        (("5 * 9", "45"), ("1 * 6", "6")),
        max_completion_tokens=4,
        config=_digits(2, 1),
        twin=_numbers,
        is_test=_two_fifths_of_products,
        space=100,
    ),
    "chain_sum": GymTask(
        "chain_sum",
        _expression,
        (("7 + 5", "12"), ("3 - 4", "-1")),
        max_completion_tokens=4,
        config=_digits(2, 1),
        twin=_signed_terms,
        space=200,
    ),
    "chain_sum_2x2": GymTask(
        "chain_sum",
        _expression,
        (("52 + 31", "83"), ("40 - 67", "-27")),
        max_completion_tokens=5,
        config=_digits(2, 2),
        twin=_signed_terms,
    ),
    "chain_sum_3": GymTask(
        "chain_sum",
        _expression,
        (("7 + 5 - 2", "10"), ("3 - 4 + 6", "5")),
        max_completion_tokens=4,
        config=_digits(3, 1),
        twin=_signed_terms,
    ),
    "gcd": GymTask(
        "gcd",
        lambda entry: "gcd({}, {})".format(*entry["metadata"]["numbers"]),
        (("gcd(12, 18)", "6"), ("gcd(25, 10)", "5"), ("gcd(7, 9)", "1")),
        max_completion_tokens=4,
        config={"min_value": 2, "max_value": 30},
        twin=_numbers,
    ),
    "letter_counting": GymTask(
        "letter_counting",
        lambda entry: "letter {target_letter} in {}".format(
            " ".join(entry["metadata"]["span"]), **entry["metadata"]
        ),
        (("letter e in three green trees", "6"), ("letter a in a map", "2"), ("letter o in the fog", "1")),
        max_completion_tokens=4,
        config={"min_words": 2, "max_words": 4},
    ),
    "leg_counting": GymTask(
        "leg_counting",
        lambda entry: "legs of " + entry["question"].split("if you have ")[1].rstrip("?\n"),
        (("legs of 2 dogs", "8"), ("legs of 1 spider, 3 birds", "14"), ("legs of 3 ants", "18")),
        max_completion_tokens=5,
        config={"min_animals": 1, "max_animals": 2, "max_instances": 4},
        twin=_items,
    ),
    "spell_backward": GymTask(
        "spell_backward",
        lambda entry: f"backward: {entry['metadata']['word']}",
        (("backward: sun", "nus"), ("backward: cake", "ekac"), ("backward: tip", "pit")),
        max_completion_tokens=7,
        config={"min_word_len": 3, "max_word_len": 4},
    ),
    "word_sorting": GymTask(
        "word_sorting",
        lambda entry: "{direction}: {}".format(
            " ".join(entry["metadata"]["transformed_words"]), **entry["metadata"]
        ),
        (("ascending: sun cat map", "cat, map, sun"), ("descending: dog ice tea", "tea, ice, dog")),
        max_completion_tokens=24,
        config={"min_words": 3, "max_words": 3, "max_word_length": 5},
        twin=_words,
    ),
}


def gym_task(
    name: str, *, seed: int = 0, train_size: int | None = None, test_size: int | None = None
) -> Task:
    """Task ``name`` of the table `GYM`.

    Args:
        name: key of `GYM`.
        seed: which questions are drawn and their order; the split does not depend on it.
        train_size: training rows; when None 512, or all there are where that is fewer.
        test_size: test rows; when None 128, or all there are where that is fewer.

    Raises:
        AdapterError: reasoning-gym is not installed.
        ConfigError: more rows are asked for than different questions exist.

    Source: Stojanovski et al. 2025, Reasoning Gym, https://github.com/open-thought/reasoning-gym (questions
    and scorers); the prompt form and the split are ours.
    """
    spec = GYM[name]
    wanted = (train_size or DEFAULT_TRAIN) + (test_size or DEFAULT_TEST)
    draws = 40 * spec.space if spec.space else DRAWS_PER_ROW * wanted + 2000
    # A small space is enumerated from one fixed stream, so that every seed has the same questions to choose
    # from.
    dataset = _dataset(spec, seed=0 if spec.space else seed * 1_000_003, size=draws)
    used = {spec.twin(question) for question, _ in spec.shots}
    sides: dict[bool, dict[str, Entry]] = {False: {}, True: {}}
    for index in range(draws):
        entry = dataset[index]
        question = spec.question(entry)
        twin = spec.twin(question)
        if twin not in used:
            sides[spec.is_test(twin)].setdefault(question, entry)
        if not spec.space and _enough(sides, train_size or DEFAULT_TRAIN, test_size or DEFAULT_TEST):
            break

    def rows(test: bool) -> list[Row]:
        made = [_row(name, spec, question, entry) for question, entry in sides[test].items()]
        random.Random(f"{name} {seed}").shuffle(made)
        return made

    def reward(completions: list[str], entry: list[str], **columns: Any) -> list[float | None]:
        return [
            float(dataset.score_answer(first_line(reply), json.loads(text)))
            for reply, text in zip(completions, entry, strict=True)
        ]

    reward.__name__ = name
    return Task(
        name=name,
        train=take(rows(False), train_size, DEFAULT_TRAIN, "train_size", name),
        test=take(rows(True), test_size, DEFAULT_TEST, "test_size", name),
        reward=reward,
        max_completion_tokens=spec.max_completion_tokens,
        stop=("\n",),
        lead=" ",
    )


def _enough(sides: dict[bool, dict[str, Entry]], train: int, test: int) -> bool:
    return len(sides[False]) >= train and len(sides[True]) >= test


def _row(name: str, spec: GymTask, question: str, entry: Entry) -> Row:
    shots = "".join(f"{shot} = {answer}\n" for shot, answer in spec.shots)
    return {
        "prompt": f"{shots}{question} =",
        "prompt_id": make_prompt_id(name, question),
        "answer": str(entry["answer"]),
        "entry": json.dumps(entry),
    }


def _dataset(spec: GymTask, *, seed: int, size: int) -> Any:
    try:
        import reasoning_gym
    except ImportError as error:
        raise AdapterError(
            f"reasoning-gym: got {error}, expected it to be installed; the questions and scorers come from "
            "it; pip install reasoning-gym"
        ) from error
    return reasoning_gym.create_dataset(spec.dataset, seed=seed, size=size, **spec.config)
