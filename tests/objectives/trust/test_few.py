"""The hint where a clip drops most tokens."""

from __future__ import annotations

from kalman_rl.objectives.trust import Clip, unclipped
from kalman_rl.objectives.trust.few import STEPS, FewKept, few_kept


def test_the_mean_over_steps_decides() -> None:
    narrow = Clip(3e-4, 4e-4)
    assert few_kept("kpo", narrow, [0.1] * (STEPS - 1)) is None, "too few steps"
    assert few_kept("kpo", narrow, [0.4, 0.6] * STEPS) is None, "half of them is enough"
    hint = few_kept("kpo", narrow, [0.3, 0.6] * STEPS)
    assert hint is not None and "kpo: got 45 %" in hint and "low 0.0003, high 0.0004" in hint
    assert few_kept("open", unclipped, [0.1] * STEPS) is None, "nothing to widen"


def test_it_is_said_once_of_steps_that_moved() -> None:
    kept = FewKept("kpo", Clip(3e-4, 4e-4))
    still, moved = {"ratio/noop": 1.0, "trust/kept": 1.0}, {"ratio/noop": 0.0, "trust/kept": 0.4}
    said = [kept.see(metrics) for _ in range(2 * STEPS) for metrics in (still, moved)]
    first = 2 * STEPS - 1
    assert said[:first] == [None] * first and said[first + 1 :] == [None] * (len(said) - first - 1)
    assert said[first] == kept.hint() == few_kept("kpo", Clip(3e-4, 4e-4), [0.4] * STEPS)
    for _ in range(STEPS):
        kept.see({"ratio/noop": 0.0, "trust/kept": 0.9})
    assert kept.hint() is None, "the steps are the last ones"
