"""Rules for the best step of a run, compared with the judge's verdict on runs that are trained too long."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import mean

Row = Mapping[str, float]

USUAL = 290
"""The number of steps that the demo's settings are made for."""

FALLEN = 0.05
"""How far below its best a run's score must stay, from a step to the end, for that step to be overfitted."""


@dataclass(frozen=True)
class ScoredRun:
    """A run that is trained too long.

    Attributes:
        subject, way: the subject, and how the class is kept.
        scores: the scores by step, with the base as step 0.
        figures: the judge's figures by step.
    """

    subject: str
    way: str
    scores: Mapping[int, Row]
    figures: Mapping[int, Row]

    @property
    def steps(self) -> list[int]:
        """The steps that are judged, from which a rule chooses."""
        return sorted(self.figures)

    def up_to(self, step: int) -> ScoredRun:
        """The run as if it had ended at a step."""
        return replace(self, figures={at: row for at, row in self.figures.items() if at <= step})

    def combined(self, step: int) -> float:
        """The judge's combined score: the mean of gain, gain in new scenes, right backgrounds in new scenes, and the
        share of class pictures that are not judged the subject; each at most 1."""
        row = self.figures[step]
        parts = [row["gain"], row["gain_in_new_scenes"], row["background_in_new_scenes"]]
        return mean([*(min(1.0, part) for part in parts), 1 - row["class_prompt_is_the_subject"]])

    @property
    def best(self) -> float:
        """The highest combined score of any step."""
        return max(map(self.combined, self.steps))

    def regret(self, step: int) -> float:
        """What is lost with a step, as a share of the best combined score."""
        return (self.best - self.combined(step)) / self.best

    def is_overfitted(self, step: int) -> bool:
        """Whether the score has fallen by FALLEN at this step, and does not come back."""
        best_at = max(self.steps, key=self.combined)
        return step > best_at and all(
            self.combined(later) < self.best - FALLEN for later in self.steps if later >= step
        )


Rule = Callable[[ScoredRun], int]
Rules = Mapping[float, Rule]
"""A rule for each value of its constant."""


def _lowest(score: str) -> Rule:
    return lambda run: min(run.steps, key=lambda step: run.scores[step][score])


def _last_with(condition: Callable[[Row], bool]) -> Rule:
    """The step before the first one that does not meet a condition."""

    def choose(run: ScoredRun) -> int:
        chosen = run.steps[0]
        for step in run.steps:
            if not condition(run.scores[step]):
                break
            chosen = step
        return chosen

    return choose


def _scenes(least: float) -> Rule:
    return _last_with(lambda row: row["scene_kept"] >= least)


def _drift(most: float) -> Rule:
    return _last_with(lambda row: row["class_drift"] <= most)


def _product(parts: Sequence[int]) -> Rule:
    """The highest product of some of what is learned of the photos, and kept of scenes and class."""
    from trainer.runs.best_step import shares

    def value(run: ScoredRun, step: int) -> float:
        found, product = shares(run.scores[step], run.scores[0]), 1.0
        assert found is not None
        for part in parts:
            product *= found[part]
        return product

    return lambda run: max(run.steps, key=lambda step: (value(run, step), step))


def _the_rule(run: ScoredRun) -> int:
    from trainer.runs.best_step import best_step

    choice = best_step(run.scores, run.steps)
    assert choice is not None
    return choice.step


def _fixed(step: int) -> Rule:
    return lambda run: min(run.steps, key=lambda at: abs(at - step))


SCENES_KEPT = (0.4, 0.5, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85)
DRIFTS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8, 1.0, 1.5, 2.0)


def all_rules() -> dict[str, Rules]:
    """The rules by name; those with a constant have several."""
    return {
        "`best`": {0: _the_rule},
        "the last step": {0: lambda run: run.steps[-1]},
        f"step {USUAL}, the demo's own number": {0: _fixed(USUAL)},
        f"step {2 * USUAL}": {0: _fixed(2 * USUAL)},
        "lowest loss on the photos": {0: _lowest("photo_loss")},
        "lowest loss on held-out crops": {0: _lowest("held_out_loss")},
        "lowest loss on held-out photos": {0: _lowest("held_out_photo_loss")},
        "scenes kept above a limit": {limit: _scenes(limit) for limit in SCENES_KEPT},
        "class drift below a limit": {limit: _drift(limit) for limit in DRIFTS},
        "photos learned x class kept": {0: _product((0, 2))},
        "photos learned x scenes kept x class kept": {0: _product((0, 1, 2))},
    }


def chosen_steps(rules: Rules, runs: Sequence[ScoredRun]) -> list[int]:
    """The step that a rule chooses in each run. A constant is fitted to the runs of the other subjects."""
    steps = []
    for run in runs:
        others = [other for other in runs if other.subject != run.subject] or list(runs)
        constant = min(rules, key=lambda value: mean(other.regret(rules[value](other)) for other in others))
        steps.append(rules[constant](run))
    return steps


def tables(runs: Sequence[ScoredRun]) -> str:
    """Markdown: the regret of each rule for each way to keep the class, and the steps that `best` chooses."""
    lines = []
    for way in dict.fromkeys(run.way for run in runs):
        ours = [run for run in runs if run.way == way]
        lines += [f"{way}: {len(ours)} subjects", "", "| rule | regret, mean | worst | overfitted | steps |"]
        lines += ["|---|---|---|---|---|"]
        for name, rules in all_rules().items():
            steps = chosen_steps(rules, ours)
            regrets = [run.regret(step) for run, step in zip(ours, steps, strict=True)]
            overfitted = sum(run.is_overfitted(step) for run, step in zip(ours, steps, strict=True))
            span = f"{min(steps)} to {max(steps)}" if min(steps) < max(steps) else str(steps[0])
            lines.append(
                f"| {name} | {mean(regrets):.1%} | {max(regrets):.1%} | {overfitted} of {len(ours)} | {span} |"
            )
        lines.append("")
        short = [run.up_to(USUAL) for run in ours]
        lost = [run.combined(run.steps[-1]) / run.combined(_the_rule(run)) - 1 for run in short]
        lines += [
            f"Of {USUAL} steps, `best` loses {mean(lost):.1%} of the last step's score, at most {max(lost):.1%}.",
            "",
        ]
        for run in ours:
            step, best_at = _the_rule(run), max(run.steps, key=run.combined)
            lines.append(
                f"{run.subject}: best {best_at} ({run.best:.3f}), chosen {step} ({run.combined(step):.3f}), "
                f"last {run.combined(run.steps[-1]):.3f}"
            )
        lines.append("")
    return "\n".join(lines)
