"""Mutation score of the numeric core: small faults put into the code one by one, and whether a test notices.

    python tools/mutants.py --sample 400 --seed 1

Run by ``make mutants`` after ``make cover``, in an environment that has mutmut and coverage beside the packages of
``.venv``. Stopped by ``--seconds``, the same command goes on, as long as no source has changed.

The mutants are mutmut's, drawn at random. One process imports everything and collects the tests once; for every
mutant a fork of it puts the changed code into the function and runs the tests that run one of the mutant's lines: first
those of the folder with the room's name, then the quick ones, until they would take ``--budget`` seconds.
A test that fails kills only if it passes alone without the mutant.

Not drawn are mutants that change nothing but the text of a message: those inside the arguments of a raised error, or
inside the arguments of a check that go into its message (``SPOKEN``). A survivor that no test can kill is named in
``tools/equivalent_mutants.toml``, with the reason.
"""

from __future__ import annotations

import argparse
import contextlib
import difflib
import json
import os
import random
import resource
import signal
import sys
import time
import tomllib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from cover import BUILD, ROOMS, ROOT, collected, say, seconds_of_tests, tests_of_lines

PAGE = ROOT / "benchmarks" / "results" / "mutants.md"
EQUIVALENT = ROOT / "tools" / "equivalent_mutants.toml"
SPOKEN = {"expect": (0, 1, 4), "expect_tensor": (0, 2), "reading": (0,), "saved": (0,)}
"""Functions of ``kalman_rl.checks``, and the places of their arguments that go into a message."""
DEAD = ("killed", "out of time")


@dataclass(frozen=True)
class Mutant:
    """One fault: file inside the repository, ``Class.method``, lines of what is changed and of the function's body, and
    the file before and after."""

    file: str
    function: str
    lines: range
    body: range
    was: str = field(repr=False)
    now: str = field(repr=False)

    @property
    def room(self) -> str:
        """Folder of the module.

        >>> Mutant("src/kalman_rl/beliefs/beta.py", "a", range(1), range(1), "", "").room
        'beliefs'
        """
        return self.file.split("/")[2]

    @cached_property
    def name(self) -> str:
        """What tells it from every other one, also after an edit elsewhere: place, lines that go, lines that come."""
        gone, come = (" ".join(line[1:].strip() for line in self.diff(0) if line[0] == sign) for sign in "-+")
        return f"{self.file.removeprefix('src/kalman_rl/')} {self.function} | {gone} | {come}"

    def diff(self, around: int) -> list[str]:
        """Lines of the unified difference, without those that name files."""
        lines = difflib.unified_diff(self.was.splitlines(), self.now.splitlines(), lineterm="", n=around)
        return [line for line in list(lines)[2:] if not line.startswith("@@")]

    def put(self) -> None:
        """Give the live function the changed code; who holds the function already gets it too."""
        dotted = ".".join(Path(self.file).relative_to("src").with_suffix("").parts).removesuffix(".__init__")
        changed: dict[str, Any] = {"__name__": dotted, "__package__": sys.modules[dotted].__package__}
        exec(compile(self.now, self.file, "exec", dont_inherit=True), changed)
        live, new = _found(vars(sys.modules[dotted]), self.function), _found(changed, self.function)
        live.__code__, live.__defaults__ = new.__code__, new.__defaults__
        live.__kwdefaults__ = new.__kwdefaults__


def _found(names: Any, function: str) -> Any:
    holder, _, rest = function.partition(".")
    found = vars(names[holder])[rest] if rest else names[holder]
    return getattr(found, "__func__", found)


def spoken(module: Any) -> set[int]:
    """Identities of the nodes whose change changes nothing but a message: see the head of this file."""
    import libcst as cst

    found: set[int] = set()

    def take(node: Any) -> None:
        found.add(id(node))
        for child in node.children:
            take(child)

    class Visitor(cst.CSTVisitor):
        def visit_Raise(self, node: cst.Raise) -> None:
            if isinstance(node.exc, cst.Call):
                found.add(id(node.exc))
                for argument in node.exc.args:
                    take(argument)

        def visit_Call(self, node: cst.Call) -> None:
            if isinstance(node.func, cst.Name):
                for place in SPOKEN.get(node.func.value, ()):
                    if place < len(node.args):
                        take(node.args[place])

    module.visit(Visitor())
    return found


def draw(sample: int, seed: int, rooms: Sequence[str]) -> tuple[list[Mutant], int, int]:
    """A random sample over all rooms. Returns: the mutants, how many there are, how many of these change only text."""
    import libcst as cst
    from libcst.metadata import MetadataWrapper, PositionProvider
    from mutmut.mutation.file_mutation import ChildReplacementTransformer, create_mutations

    every: list[tuple[str, Any, Any]] = []
    total, sources = 0, ROOT / "src" / "kalman_rl"
    for path in [file for room in rooms for file in sorted((sources / room).rglob("*.py"))]:
        file = path.relative_to(ROOT).as_posix()
        module, made, _, _ = create_mutations(file, path.read_text())
        inside = [one for one in made if isinstance(one.contained_by_top_level_function, cst.FunctionDef)]
        text = spoken(module)
        total += len(inside)
        every += [(file, module, one) for one in inside if id(one.original_node) not in text]
    drawn, places, names = [], {}, {}
    for file, module, one in random.Random(seed).sample(every, min(sample, len(every))):
        if file not in places:
            places[file] = MetadataWrapper(module, unsafe_skip_copy=True).resolve(PositionProvider)
            names[file] = {
                id(node): node.name.value for node in module.body if isinstance(node, cst.FunctionDef)
            }
            for holder in [node for node in module.body if isinstance(node, cst.ClassDef)]:
                methods = [node for node in holder.body.body if isinstance(node, cst.FunctionDef)]
                names[file] |= {id(node): f"{holder.name.value}.{node.name.value}" for node in methods}
        outer = one.contained_by_top_level_function
        at = places[file].get(one.original_node) or places[file][outer]
        now = module.visit(ChildReplacementTransformer(one.original_node, one.mutated_node))
        lines, body = (range(part.start.line, part.end.line + 1) for part in (at, places[file][outer.body]))
        drawn.append(Mutant(file, names[file][id(outer)], lines, body, module.code, now.code))
    return sorted(drawn, key=lambda mutant: mutant.name), total, total - len(every)


def in_child(work: Callable[[], int], seconds: int) -> int:
    """Run ``work`` in a fork, with at most so many seconds of the processor (ten times as many on the clock) and 8 GB.

    Returns: what it returns, 70 after an exception, negative for a signal.
    """
    child = os.fork()
    if not child:
        code = 70
        try:
            quiet = os.open(BUILD / "last.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(quiet, 1)
            os.dup2(quiet, 2)
            resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 5))
            resource.setrlimit(resource.RLIMIT_DATA, (8 << 30, 8 << 30))
            code = work()
        finally:
            sys.stdout.flush()
            os._exit(code)
    signal.signal(signal.SIGALRM, lambda *_: os.kill(child, signal.SIGKILL))
    signal.alarm(10 * seconds)
    _, status = os.waitpid(child, 0)
    signal.alarm(0)
    return os.waitstatus_to_exitcode(status)


class Judge:
    """A plugin of pytest: takes the place of the run once the tests are collected."""

    def __init__(self, mutants: list[Mutant], known: dict[str, str], budget: float, until: float) -> None:
        self.mutants, self.known, self.budget, self.until = mutants, known, budget, until
        self.sound: dict[str, bool] = {}  # whether a test that failed passes alone without a mutant

    def pytest_runtestloop(self, session: Any) -> bool:
        """Judge every mutant that has no verdict yet."""
        import gc

        session.config.pluginmanager.unregister(self)
        items = {item.nodeid: item for item in session.items}
        if items.keys() - seconds_of_tests().keys():
            say("mutants: got tests that cover has not run, expected none; run make cover first")
            return True
        lines, seconds = tests_of_lines(), seconds_of_tests()
        gc.collect()
        gc.freeze()
        todo = [mutant for mutant in self.mutants if mutant.name not in self.known]
        for mutant in todo:
            if time.time() > self.until:
                break
            near = (f"tests/{mutant.room}", f"src/kalman_rl/{mutant.room}")
            tests = run_by(mutant.lines, lines[mutant.file]) & items.keys()
            tests = tests or run_by(mutant.body, lines[mutant.file]) & items.keys()  # a default, or a lambda
            chosen, spent = list[Any](), 0.0
            for name in sorted(tests, key=lambda name: (not name.startswith(near), seconds[name], name)):
                if seconds[name] >= 0 and (not chosen or spent + seconds[name] <= self.budget):
                    chosen.append(items[name])
                    spent += seconds[name]
            verdict = "not reached" if not chosen else self.verdict(session, mutant, chosen, spent)
            self.known[mutant.name] = verdict
            if verdict not in DEAD:
                say(f"{verdict}: {mutant.name}")
        return True

    def verdict(self, session: Any, mutant: Mutant, chosen: list[Any], spent: float) -> str:
        """One of "killed", "out of time" (or out of memory), "survived"."""
        code, killer = run(session, chosen, int(20 + 4 * spent), mutant)
        if code == 1 and not self.alone(session, chosen, killer):
            rest = [item for item in chosen if item.nodeid != killer]
            return self.verdict(session, mutant, rest, spent)
        if code == 70:
            raise SystemExit(f"mutants: {mutant.name} could not be judged, see {BUILD / 'last.txt'}")
        return {0: "survived", 1: "killed"}.get(code, "out of time")

    def alone(self, session: Any, chosen: list[Any], killer: str) -> bool:
        """Whether a test passes alone, without a mutant."""
        if killer not in self.sound:
            one = [item for item in chosen if item.nodeid == killer]
            self.sound[killer] = run(session, one, 600, None)[0] == 0
        return self.sound[killer]


def run(session: Any, chosen: list[Any], seconds: int, mutant: Mutant | None) -> tuple[int, str]:
    """Run tests in a fork, the mutant in place. Returns: 1 after the first that fails, else 0; the name of that one."""
    killer = BUILD / "killer.txt"

    def work() -> int:
        import hypothesis

        phases = [hypothesis.Phase.explicit, hypothesis.Phase.generate]
        hypothesis.settings.register_profile("mutants", hypothesis.settings(), phases=phases)
        hypothesis.settings.load_profile("mutants")
        if mutant:
            mutant.put()
        session.items = chosen
        session.config.pluginmanager.unregister(name="terminalreporter")
        session.config.pluginmanager.register(Killer(killer))
        with contextlib.suppress(session.Failed):
            session.config.hook.pytest_runtestloop(session=session)
        return int(session.testsfailed > 0)

    killer.write_text("")
    return in_child(work, seconds), killer.read_text()


class Killer:
    """A plugin of pytest that writes down which test failed."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def pytest_runtest_logreport(self, report: Any) -> None:
        """Keep the name of a test that failed."""
        if report.failed:
            self.file.write_text(report.nodeid)


def run_by(lines: range, tests: dict[int, list[str]]) -> set[str]:
    """Tests that run one of the lines."""
    return {test for line in lines for test in tests.get(line, ())}


def page(title: str, total: int, text: int, mutants: list[Mutant], verdicts: dict[str, str]) -> str:
    """What is written for a reader."""
    known = tomllib.loads(EQUIVALENT.read_text())["mutant"] if EQUIVALENT.exists() else []
    reasons = {one["name"]: one["reason"] for one in known}
    alive = [mutant for mutant in mutants if verdicts[mutant.name] not in DEAD]
    same = [mutant for mutant in alive if mutant.name in reasons]
    kinds = (*DEAD, "survived", "not reached")
    lines = [
        f"{title}: {total} mutants, {text} change only the text of a message, {len(mutants)} of the others drawn.",
        "",
        f"| room | drawn | {' | '.join(kinds)} |",
        "|---|" + "---:|" * (1 + len(kinds)),
    ]
    for room in (*dict.fromkeys(mutant.room for mutant in mutants), "together"):
        part = Counter(verdicts[mutant.name] for mutant in mutants if room in (mutant.room, "together"))
        lines.append(f"| {room} | {part.total()} | {' | '.join(str(part[kind]) for kind in kinds)} |")
    dead = len(mutants) - len(alive)
    lines += [
        "",
        f"**Score {dead / len(mutants):.1%}**; {dead / (len(mutants) - len(same)):.1%} without the {len(same)} "
        "survivors that no test can kill, each with its reason.",
    ]
    for mutant in sorted(alive, key=lambda mutant: (mutant.name in reasons, mutant.name)):
        why = f"equivalent: {reasons[mutant.name]}" if mutant.name in reasons else verdicts[mutant.name]
        lines += ["", f"{mutant.name.partition(' | ')[0]}: {why}", "", "```diff", *mutant.diff(1), "```"]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Draw, judge, print."""
    parser = argparse.ArgumentParser(description="Mutation score of the numeric core.")
    parser.add_argument("--rooms", nargs="+", choices=ROOMS, default=ROOMS)
    parser.add_argument("--sample", type=int, default=400, help="how many mutants")
    parser.add_argument("--seed", type=int, default=1, help="of the draw")
    parser.add_argument("--budget", type=float, default=20, help="seconds of tests for one mutant")
    parser.add_argument(
        "--seconds", type=float, default=1e6, help="stop after so long; the same command goes on"
    )
    parser.add_argument(
        "--again", action="store_true", help="judge the survivors once more, after a new test"
    )
    parser.add_argument("--output", type=Path, help="append the table to a page")
    options = parser.parse_args()
    until = time.time() + options.seconds
    os.chdir(ROOT)
    BUILD.mkdir(parents=True, exist_ok=True)
    drawn, total, text = draw(options.sample, options.seed, options.rooms)
    kept = BUILD / f"verdicts-{options.seed}-{'-'.join(options.rooms)}.json"
    known = dict(json.loads(kept.read_text())) if kept.exists() else {}
    if options.again:
        known = {name: verdict for name, verdict in known.items() if verdict in DEAD}
    collected(options.rooms, Judge(drawn, known, options.budget, until))
    kept.write_text(json.dumps(known, indent=0))
    left = [mutant for mutant in drawn if mutant.name not in known]
    if left:
        return say(f"{len(drawn) - len(left)} judged, {Counter(known.values())}, {len(left)} left")
    rooms = "" if options.rooms == ROOMS else f" --rooms {' '.join(options.rooms)}"
    written = page(
        f"`tools/mutants.py --sample {options.sample} --seed {options.seed}{rooms}`",
        total,
        text,
        drawn,
        known,
    )
    print(written)
    if options.output:
        with options.output.open("a") as out:
            out.write(written)


if __name__ == "__main__":
    main()
