"""Summary: sentences computed from the numbers. Nothing here knows how a run or a study came out."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from kalman_rl.engine.runs.reading import RunRecord
from kalman_rl.engine.runs.received import parse_toml
from kalman_rl.engine.trend import fall
from kalman_rl.errors import KalmanRLError
from kalman_rl.instruments.report.stats.intervals import t_quantile
from kalman_rl.instruments.report.stats.series import finite, series, typical
from kalman_rl.instruments.report.stats.study import (
    GREEDY,
    POOL_SAMPLED,
    Measured,
    Study,
    StudyArm,
    measure,
    names_of,
    noop_share,
    subject_of,
    ties,
    trend,
)
from kalman_rl.instruments.report.words import counted, decimal, listing, signed
from kalman_rl.methods import make_method
from kalman_rl.objectives.trust.few import few_kept

PUBLISHED, DIFFUSE, CONTROL = "kpo", "kpo_diffuse", "ratio_one"
FILTERED = "ratio/filtered_log_variance"
SHARPENING = 0.1
"""A sampled gain that exceeds the greedy one by this much is called sharpening in part."""
MAX_SENTENCES = 4
"""More main runs than this are summed up by their verdicts."""
VERDICTS = {
    "learned": "learned",
    "collapsed": "collapsed",
    "worse": "lost accuracy",
    "unclear": "did not change measurably",
    "unknown": "cannot be judged",
}


@dataclass
class Summary:
    """``lead``: the one paragraph at the top. ``findings``: a few words each, in the stress section."""

    lead: list[str] = field(default_factory=list)
    findings: list[str] = field(default_factory=list)


def summarise(
    main: Sequence[RunRecord], main_arms: Sequence[StudyArm], study: Study | None, names: Sequence[str] = ()
) -> Summary:
    """Plain words about the main runs (or the first of each group of seeds) and the stress study."""
    summary = Summary()
    names = names or names_of(main)
    if len(main) > MAX_SENTENCES:
        summary.lead.append(_many(names, main_arms))
    else:
        subjects = [subject_of(run) for run in main]
        for run, arm, name, subject in zip(main, main_arms, names, subjects):
            summary.lead += _main_sentences(run, arm, name, alone=subjects.count(subject) == 1)
    summary.lead += _rankings(main, main_arms)
    if study:
        judged = [arm for arm in study.arms if arm.main]
        if not judged:
            summary.findings.append(
                "The stress study has no held-out evaluation, so no method of it can be judged; "
                "its training curves are shown below."
            )
        else:
            summary.findings += _overall(judged)
            for condition in study.conditions:
                here = [arm for arm in judged if arm.condition == condition]
                if here:
                    summary.findings.append(_condition(condition, here))
            summary.findings += _published(study)
            summary.findings += _caution(study)
        summary.lead += _stress_lead(study, judged)
    return summary


def _many(names: Sequence[str], arms: Sequence[StudyArm]) -> str:
    groups: dict[str, list[str]] = {}
    for name, arm in zip(names, arms):
        groups.setdefault(arm.main.verdict if arm.main else "unknown", []).append(name)
    told = [f"{listing(groups[verdict])} {words}" for verdict, words in VERDICTS.items() if verdict in groups]
    runs = sum(len(arm.runs) + arm.unfinished for arm in arms)
    what = f"{runs} runs" if runs == len(names) else f"{len(names)} settings with {runs} runs"
    return f"Of {what}, {'; '.join(told)}."


def _main_sentences(run: RunRecord, arm: StudyArm, name: str, *, alone: bool) -> list[str]:
    subject = _subject(run) if alone else f"Run {name}"
    so_far = "" if run.finished else f" The run is marked {run.status}, so these are not its final numbers."
    if not run.train and not run.evals:
        return [f"{subject} has no metrics, so there is nothing to say about it.{so_far}"]
    if arm.main is None or arm.main.start is None:
        return [_unmeasured(run, arm, subject) + so_far]
    numbers = arm.main
    sentence = f"{subject} {_moved(numbers, arm.kind, run.steps)}."
    greedy = arm.measured.get(GREEDY)
    if alone and arm.kind == "sampled" and greedy and greedy.start is not None:
        sentence += f" Greedy accuracy went from {decimal(greedy.start)} to {decimal(greedy.mean)}"
        gain = numbers.mean - (numbers.start or 0.0)
        sharper = numbers.verdict == "learned" and gain - (greedy.mean - greedy.start) > SHARPENING
        sentence += (
            ", a smaller gain: part of the change is sharpening towards answers the model already preferred."
            if sharper
            else "."
        )
    sentences = [sentence + so_far]
    share = noop_share(run)
    if alone and share is not None and share >= 0.25:
        reason = "there all ratio methods coincide, and any difference comes from the other updates"
        if share > 0.999:
            reason = "this run says nothing about the choice of ratio"
        sentences.append(f"In {share:.0%} of the updates every log-ratio was zero; {reason}.")
    if alone and (hint := _narrow(run)):
        sentences.append(f"{hint}.")
    if alone and (said := fall([point for point in series(run.train, "reward") if math.isfinite(point[1])])):
        sentences.append(f"{said[0].upper()}{said[1:]}.")
    return sentences


def _narrow(run: RunRecord) -> str | None:
    """A hint where the run's clip dropped most tokens, None also where its method is not one of the table."""
    shares = [kept for kept in finite(series(run.train, "trust/kept", skip_noop=True)) if 0 <= kept <= 1]
    try:
        config = parse_toml(run.config)
        if ":" in config["method"]:  # reading a run imports nothing that its files name
            return None
        method = make_method(config["method"], **config.get("method_options", {}))
    except (KalmanRLError, KeyError, TypeError, ValueError):
        return None
    return few_kept(method.name, method.trust, shares)


def _subject(run: RunRecord) -> str:
    get = run.labels.get
    subject = get("model") or f"The run {run.name}"
    task, method = get("task"), get("method")
    detail = ", ".join(
        filter(None, (f"trained on {task}" if task else "", f"method {method}" if method else ""))
    )
    return f"{subject} ({detail})" if detail else subject


def _moved(numbers: Measured, kind: str, steps: int) -> str:
    start, end = decimal(numbers.start or 0.0), decimal(numbers.mean)
    span = f"from {start} to {end}" + (f" over {counted(steps, 'update')}" if steps else "")
    answers = f"{numbers.count:.0f} answers; " if numbers.count else ""
    if numbers.change is None:
        return (
            f"went {span} in {kind} held-out accuracy; the number of answers is not known, "
            "so the change cannot be judged"
        )
    low, high = map(signed, numbers.change)
    difference = signed(numbers.mean - (numbers.start or 0.0))
    proof = f"({answers}change {difference}, 95% interval {low} to {high})"
    phrase = {
        "learned": f"learned: {kind} held-out accuracy rose {span} {proof}",
        "collapsed": f"collapsed: {kind} held-out accuracy fell {span} {proof}",
        "worse": f"lost accuracy: {kind} held-out accuracy fell {span} {proof}",
        "unclear": f"did not change measurably: {kind} held-out accuracy went {span} {proof}",
    }
    return phrase[numbers.verdict]


def _unmeasured(run: RunRecord, arm: StudyArm, subject: str) -> str:
    reward = trend(run, "reward")
    moved = f"; its training reward went from {decimal(reward[0])} to {decimal(reward[1])}" if reward else ""
    if arm.main is None:
        return f"{subject} has no held-out evaluation, so whether it learned cannot be said{moved}."
    only = decimal(arm.main.mean)
    return f"{subject} was evaluated once ({arm.kind} accuracy {only}), so a change cannot be stated{moved}."


def _stress_lead(study: Study, judged: Sequence[StudyArm]) -> list[str]:
    sizes = sorted(set(study.seeds))
    seeds = counted(sizes[0], "seed") if len(sizes) == 1 else f"{sizes[0]} to {sizes[1]} seeds"
    shape = (
        f"The stress study compares {counted(len(study.methods), 'method')} under "
        f"{counted(len(study.conditions), 'condition')} with {seeds} each"
    )
    if not judged:
        return [f"{shape}, but holds no held-out evaluation."]
    sentences = [f"{shape}."]
    always = _everywhere(judged, "learned")
    broken = [method for method in _everywhere(judged, "collapsed") if method not in always]
    parts = [
        f"{listing(methods)} {verdict}"
        for methods, verdict in ((always, "learned"), (broken, "collapsed"))
        if methods
    ]
    if parts:
        sentences.append(f"Under every condition, {' and '.join(parts)}.")
    elif not any(arm.main and arm.main.verdict == "learned" for arm in judged):
        sentences.append("No method learned measurably under any condition.")
    else:
        sentences.append("No method learned, and none collapsed, under every condition.")
    return sentences + _published(study)[:1]


def _everywhere(judged: Sequence[StudyArm], verdict: str) -> list[str]:
    methods = dict.fromkeys(arm.method for arm in judged)
    return [
        method
        for method in methods
        if all(arm.main and arm.main.verdict == verdict for arm in judged if arm.method == method)
    ]


def _overall(judged: Sequence[StudyArm]) -> list[str]:
    starts = [arm.main.start for arm in judged if arm.main and arm.main.start is not None]
    if not starts:
        return [
            "No evaluation before training was recorded, so the methods are only compared with each other."
        ]
    low, high = decimal(min(starts)), decimal(max(starts))
    span = low if low == high else f"{low} to {high}"
    return [
        f"Every run starts at {judged[0].kind} accuracy {span}; a method has "
        "learned or lost accuracy only if its change exceeds the 95% interval."
    ]


def _condition(condition: str, arms: Sequence[StudyArm]) -> str:
    groups: dict[str, list[str]] = {}
    for arm in arms:
        if arm.main:
            groups.setdefault(arm.main.verdict, []).append(f"{arm.method} ({decimal(arm.main.mean)})")
    told = [f"{listing(groups[verdict])} {words}" for verdict, words in VERDICTS.items() if verdict in groups]
    return f"Condition {condition}: {'; '.join(told)}. {_ranking(arms)}"


def _rankings(main: Sequence[RunRecord], arms: Sequence[StudyArm]) -> list[str]:
    """A ranking for each subject with several arms; different models or tasks are not compared."""
    by: dict[str, list[StudyArm]] = {}
    for run, arm in zip(main, arms):
        by.setdefault(subject_of(run), []).append(arm)
    told = []
    for subject, rivals in by.items():
        if len(rivals) > 1:
            text = _ranking(rivals)
            told.append(f"For {subject}: {text[0].lower()}{text[1:]}" if len(by) > 1 and subject else text)
            told += _on_training_prompts(rivals)
    return told


def _on_training_prompts(arms: Sequence[StudyArm]) -> list[str]:
    """Where the arms end on the prompts that they trained on, if all were evaluated on them."""
    found = [(arm.method, measure(arm.runs, POOL_SAMPLED)) for arm in arms]
    known = [(name, numbers) for name, numbers in found if numbers and numbers.noise]
    if len(known) < len(arms):
        return []
    told = [
        f"{name} at {decimal(numbers.mean)} ({decimal(numbers.noise[0])} to {decimal(numbers.noise[1])})"
        for name, numbers in known
        if numbers.noise
    ]
    return [f"On the training prompts, sampled, with 95% intervals: {listing(told)}."]


def _ranking(arms: Sequence[StudyArm]) -> str:
    """Who ends highest, who ties with it, who is below it beyond the noise."""
    ranked = sorted((arm for arm in arms if arm.main), key=lambda arm: -arm.main.mean if arm.main else 0.0)
    if len(ranked) < 2:
        return "There is nothing to compare it with."
    best, rest = ranked[0], ranked[1:]
    equal = [arm.method for arm in rest if ties(best, arm)]
    below = [arm.method for arm in rest if ties(best, arm) is False]
    open_ = [arm.method for arm in rest if ties(best, arm) is None]
    if len(equal) == len(rest):
        return f"All {len(ranked)} are a tie: their intervals overlap with that of {best.method}."
    parts = [f"Highest at the end: {best.method}"]
    if equal:
        parts.append(
            f"{listing(equal)} {'ties' if len(equal) == 1 else 'tie'} with it (overlapping intervals)"
        )
    if below:
        parts.append(f"{listing(below)} {'ends' if len(below) == 1 else 'end'} below it beyond the noise")
    if open_:
        parts.append(f"{listing(open_)} cannot be compared for lack of an interval")
    return "; ".join(parts) + "."


def _published(study: Study) -> list[str]:
    """KPO as published against its diffuse start and against the control whose ratio is always one."""
    sentences = []
    for other, name in ((DIFFUSE, "the diffuse start (kpo_diffuse)"), (CONTROL, "the control ratio_one")):
        pairs = [
            (condition, one, two)
            for condition in study.conditions
            if (one := study.find(condition, PUBLISHED)) and (two := study.find(condition, other))
            and one.main and two.main
        ]  # fmt: skip
        if pairs:
            sentences.append(_compare(pairs, name, control=other == CONTROL))
    return sentences + _undecided(study) + _reason(study)


def _undecided(study: Study) -> list[str]:
    """Conditions under which even the working filter cannot be told from having no ratio."""
    same = [
        condition
        for condition in study.conditions
        if (one := study.find(condition, DIFFUSE))
        and (two := study.find(condition, CONTROL))
        and ties(one, two)
    ]
    if not same:
        return []
    return [
        f"Under {listing(same)} even kpo_diffuse ties with ratio_one, "
        "so nothing there shows that the ratio matters."
    ]


def _compare(pairs: Sequence[tuple[str, StudyArm, StudyArm]], name: str, *, control: bool) -> str:
    groups: dict[str, list[tuple[str, StudyArm, StudyArm]]] = {}
    for condition, one, two in pairs:
        tie = ties(one, two)
        lower = _mean(one) < _mean(two)
        groups.setdefault(
            "open" if tie is None else "tie" if tie else "below" if lower else "above", []
        ).append((condition, one, two))
    words = {
        "below": f"ends below {name}",
        "tie": f"cannot be told apart from {name}" if control else f"ties with {name}",
        "above": f"ends above {name}",
        "open": f"cannot be compared with {name} for lack of an interval",
    }
    parts = []
    for group, phrase in words.items():
        if group in groups:
            where = listing([condition for condition, _, _ in groups[group]])
            numbers = "; ".join(
                f"{decimal(_mean(one))} against {decimal(_mean(two))}" for _, one, two in groups[group]
            )
            parts.append(f"{phrase} under {where} ({numbers})")
    return f"KPO as published (kpo) {listing(parts)}."


def _mean(arm: StudyArm) -> float:
    return arm.main.mean if arm.main else 0.0


def _reason(study: Study) -> list[str]:
    """How much less the published filter lets through, if it is much less."""
    small, large = (
        typical([run for arm in study.arms if arm.method == method for run in arm.runs], FILTERED)
        for method in (PUBLISHED, DIFFUSE)
    )
    if small is None or large is None or not large > 10 * small:
        return []
    times = f"about {float(f'{large / small:.1g}'):,.0f} times smaller than" if small > 0 else "zero, unlike"
    return [
        f"Behind it: the filtered log-ratio of kpo has a variance {times} that of kpo_diffuse "
        "(medians over all updates)."
    ]


def _caution(study: Study) -> list[str]:
    fewest, most = study.seeds
    sentences = []
    if most <= 1:
        sentences.append(
            "There is one seed per method and condition, so the intervals cover only the limited number of "
            "held-out answers. One seed cannot separate methods beyond that: another seed may order them "
            "differently."
        )
    elif fewest >= 2:
        sentences.append(
            f"With {counted(fewest, 'seed')} the t factor is {t_quantile(fewest - 1):.1f}, so only large "
            "differences can be told apart; everything inside the overlapping intervals is called a tie."
        )
    else:
        sentences.append(
            "Some methods have one seed only; their intervals leave out the spread between seeds."
        )
    gone = [
        f"{arm.method} under {arm.condition} ({arm.unfinished} of {arm.unfinished + len(arm.runs)})"
        for arm in study.arms
        if arm.unfinished
    ]
    if gone:
        sentences.append(f"Not finished, and left out of every average: {listing(gone)}.")
    return sentences
