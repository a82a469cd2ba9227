"""Tells from a run's figures how healthy it is: a history of metrics in, named warnings out, also while it trains.

Each check looks at the newest held-out figures, or at the last training logs where there is no evaluation. What they
mean, why the thresholds stand where they do, and the literature: docs/diagnostics.md.
"""

import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from transformers import TrainerCallback, TrainerControl, TrainerState

from ..config import DPOConfig
from ..data import DataReport
from ..distributed import rank
from ..objective import TrainingObjective
from ..training.metrics import NOISE
from .samples import KeptRows, Row

logger = logging.getLogger(__name__)

WINDOW = 5  # training logs that are averaged: a single one is of few pairs

DISPLACED_NATS = 0.1  # likelihood-displacement: chosen completions' fall in nats a token; perplexity is up by 10 %
DISPLACED_SHARE = 0.5  # ... and as a share of the margin's growth
HIGH_KL = 0.5  # high-kl: nats per token
SATURATED = 0.01  # reward-saturation: mean weight of a pair in the gradient; it starts at 0.5
LENGTH_GAP = 0.3  # length-exploitation: accuracy where the longer one is better minus where the shorter one is
LENGTH_ONLY = 0.9  # ... or this share of pairs decided by length alone, and accuracy as high
LOSS_RISE, LOSS_RISE_SHARE = 0.02, 0.1  # overfitting: of the held-out loss over its lowest, in nats and as a share
UNMOVED = NOISE / 2  # no-learning: the mean margin in nats; one that grows evenly ends at twice that, within noise
UNMOVED_STEPS = 20  # ... after so many steps at least

REMEDIES = {
    "likelihood-displacement": "Add an SFT term (loss_type: [sigmoid, sft]), lower learning_rate, raise beta or stop "
    "earlier; look at samples (sample_prompts), and at pairs whose two completions are almost the same.",
    "high-kl": "Raise beta, lower learning_rate or stop earlier, and look at samples (sample_prompts).",
    "reward-saturation": "More steps bring little: stop here, or use harder pairs; with wrong labels among them "
    "label_smoothing or loss_type ipo bounds the margin.",
    "length-exploitation": "Balance the pairs by length, or use ld_alpha or loss_type simpo; judge by "
    "accuracies/length_balanced.",
    "overfitting": "Keep the best adapter (load_best_model_at_end), stop early (early_stopping_patience), use fewer "
    "epochs, a lower learning_rate or more pairs.",
    "no-learning": "Raise learning_rate: LoRA needs about ten times what full fine-tuning does, often 1e-5 to 1e-4; "
    "small models and short runs need more.",
    "no-change": "Raise learning_rate or train longer: what was learned doesn't reach the text.",
}

Figures = Mapping[str, float]  # names of metrics to values


class Finding(NamedTuple):
    """One warning."""

    step: int
    name: str  # a key of `REMEDIES`
    message: str


class RunFacts(NamedTuple):
    """What a history doesn't say of its run."""

    reward: str = "log_ratio"  # what implicit rewards are made of: "log_ratio", "logp" or "mean_logp"
    beta: float = 1.0  # their factor
    tokens: float | None = None  # a completion's mean number of predicted ones; None: nothing per token is checked
    # Metric prefix ("eval", "eval_<name>") of each dataset that is evaluated as training goes on, to its number of
    # rows (0: unknown). If there is none, training logs are judged in its place.
    held_out: Mapping[str, int] = {"eval": 0}
    max_steps: int = 0  # 0: unknown


class Look(NamedTuple):
    """Figures to be judged: names without prefix to values."""

    where: str  # for the message
    first: Figures  # of the first evaluation; empty if there is none
    now: Figures
    rows: int  # held-out rows; 0 if unknown


class Run:
    """A history, sorted as it grows. The datasets that are evaluated stay the same."""

    def __init__(self, facts: RunFacts):
        self.facts, self.step, self._seen = facts, 0, 0
        self.training: list[Figures] = []
        self.evaluations: dict[str, list[Figures]] = {prefix: [] for prefix in facts.held_out}  # names without prefix
        self.lowest: dict[str, float] = {}  # loss of each of them

    def read(self, history: Sequence[Figures]) -> None:
        """Takes in what has been logged since it was read last."""
        for entry in history[self._seen :]:
            if "loss" in entry:
                self.training.append(entry)
            for prefix, entries in self.evaluations.items():
                if f"{prefix}_loss" in entry:
                    named = {name: value for name, value in entry.items() if name.startswith(f"{prefix}_")}
                    entries.append({name.removeprefix(f"{prefix}_"): value for name, value in named.items()})
                    self.lowest[prefix] = min(self.lowest.get(prefix, math.inf), entry[f"{prefix}_loss"])
            self.step = int(entry.get("step", 0))
        self._seen = len(history)

    def looks(self) -> Iterator[Look]:
        """Yields the newest evaluation of each dataset; if none is evaluated, the mean of the last training logs."""
        for prefix, entries in self.evaluations.items():
            name = prefix.removeprefix("eval").removeprefix("_")
            where = f"on the held-out rows of {name!r}" if name else "on held-out rows"
            if entries:
                yield Look(where, entries[0], entries[-1], self.facts.held_out[prefix])
        if not self.evaluations and len(self.training) >= WINDOW:
            yield Look(f"over the last {WINDOW} training logs", {}, self.recent(), 0)

    def recent(self) -> dict[str, float]:
        """Returns means over the last `WINDOW` training logs, of what stands in all of them."""
        logs = self.training[-WINDOW:]
        names = set(logs[0]).intersection(*logs) if logs else set()
        return {name: sum(log[name] for log in logs) / len(logs) for name in names}

    def per_token(self, nats: float) -> float:
        """Returns nats a completion as nats a token; 0 if the completions' length is unknown."""
        return nats / self.facts.tokens if self.facts.tokens else 0.0


def diagnose(history: Sequence[Figures], facts: RunFacts) -> list[Finding]:
    """Returns the warnings that the newest figures of a run call for; none for a run without any.

    Args:
        history: `trainer.state.log_history`, or `log_history` of a metrics.json.
        facts: about the run.
    """
    run = Run(facts)
    run.read(history)
    return findings(run)


def findings(run: Run) -> list[Finding]:
    """Returns the warnings that a run's newest figures call for."""
    found = [(name, next(check(run), None)) for name, check in CHECKS.items()]
    return [finding(run.step, name, text) for name, text in found if text]


def finding(step: int, name: str, text: str) -> Finding:
    """Returns a warning with its remedy."""
    return Finding(step, name, f"{text} {REMEDIES[name]} See docs/diagnostics.md#{name}.")


# ---- Checks: each yields what it finds, and the first counts --------------------------------------------------------


def _displacement(run: Run) -> Iterator[str]:
    """Finds that chosen completions have become less likely, by much of what the margin has grown."""
    beta = run.facts.beta
    for where, first, now, _ in run.looks():
        if run.facts.reward == "log_ratio":  # of the same rows under the reference, so the first look is not needed
            change, gain = now.get("rewards/chosen", 0.0) / beta, now.get("rewards/margins", 0.0) / beta
        elif "logps/chosen" in first and "logps/chosen" in now:
            change = now["logps/chosen"] - first["logps/chosen"]
            gain = change - (now["logps/rejected"] - first["logps/rejected"])
        else:
            continue
        per_token = run.per_token(-change)
        if per_token >= DISPLACED_NATS and gain > 0 and -change >= DISPLACED_SHARE * gain:
            yield (
                f"Chosen completions have become less likely {where}: by {-change:.1f} nats each ({per_token:.2f} a "
                f"token), while rejected ones fell by {gain - change:.1f}. The margin grows, and probability goes to "
                "completions that are neither."
            )


def _high_kl(run: Run) -> Iterator[str]:
    """Finds that the policy is far from its reference."""
    for look in run.looks():
        kl = look.now.get("kl", 0.0)
        if (per_token := run.per_token(kl)) >= HIGH_KL:
            what = f"kl is {kl:.1f} nats a completion, {per_token:.2f} a token"
            yield f"The policy is far from its reference {look.where}: {what}."


def _saturation(run: Run) -> Iterator[str]:
    """Finds that the training pairs are won by so much that they give no gradient."""
    weight = run.recent().get("sample_weight", math.inf)
    if len(run.training) >= WINDOW and weight <= SATURATED:
        yield (
            f"Training pairs hardly count any more: over the last {WINDOW} logs their weight in the gradient is "
            f"{weight:.4f} on average (0.5 at the start)."
        )


def _length(run: Run) -> Iterator[str]:
    """Finds that accuracy follows length."""
    for where, _, now, rows in run.looks():
        accuracy, by_length = now.get("rewards/accuracies"), now.get("accuracies/length_only")
        if accuracy is None or by_length is None:
            continue
        decided = max(by_length, 1 - by_length)
        if decided >= LENGTH_ONLY and accuracy >= LENGTH_ONLY:
            side = "longer" if by_length > 0.5 else "shorter"
            yield (
                f"The {side} completion is the better one in {decided:.0%} of pairs {where}, so an accuracy of "
                f"{accuracy:.0%} says nothing beyond length."
            )
        longer, shorter = now.get("accuracies/chosen_longer"), now.get("accuracies/chosen_shorter")
        if longer is None or shorter is None or not rows:
            continue
        # Two independent shares, each of so many pairs (Laplace's estimate: one pair doesn't make certain); three
        # standard errors, since every evaluation is another look.
        groups = ((longer, rows * by_length), (shorter, rows * (1 - by_length)))
        shares = [((share * n + 1) / (n + 2), n + 2) for share, n in groups]
        error = math.sqrt(sum(p * (1 - p) / n for p, n in shares))
        if abs(longer - shorter) >= max(LENGTH_GAP, 3 * error):
            yield (
                f"Accuracy leans on length {where}: {longer:.0%} where the longer completion is the better one, "
                f"{shorter:.0%} where the shorter one is."
            )


def _overfitting(run: Run) -> Iterator[str]:
    """Finds that the held-out loss rises while the training loss is below it."""
    train_loss = run.recent().get("loss", math.inf)
    for prefix, entries in run.evaluations.items():
        newest = [entry["loss"] for entry in entries[-2:]]
        lowest = run.lowest.get(prefix, math.nan)
        bound = lowest + max(LOSS_RISE, LOSS_RISE_SHARE * abs(lowest))
        if len(entries) >= 3 and min(newest) >= bound and train_loss < lowest:
            yield (
                f"{prefix}_loss has risen from {lowest:.3f} to {newest[-1]:.3f}, while the training loss went on "
                f"to {train_loss:.3f}: the training pairs are learned by heart."
            )


def _no_learning(run: Run) -> Iterator[str]:
    """Finds that half of the run is over and policy and reference are still the same."""
    logs, total = len(run.training), run.facts.max_steps
    before, steps = [0, 0, *(int(log.get("step", 0)) for log in run.training)][-2:]
    late = 2 * steps >= total if logs >= WINDOW else 2 * steps - before > total  # the last log that there will be
    late = late and total > 0 and steps >= UNMOVED_STEPS
    margin, beta = run.recent().get("rewards/margins", math.inf), run.facts.beta
    if run.facts.reward == "log_ratio" and late and abs(margin) < UNMOVED * beta:
        yield (
            f"Nothing is learned: after {steps} of {total} steps the margin is {margin:.2g} on average over the last "
            f"{min(logs, WINDOW)} logs (0 at the start), {abs(margin) / beta:.2g} nats."
        )


CHECKS: dict[str, Callable[[Run], Iterator[str]]] = {
    "likelihood-displacement": _displacement,
    "high-kl": _high_kl,
    "reward-saturation": _saturation,
    "length-exploitation": _length,
    "overfitting": _overfitting,
    "no-learning": _no_learning,
}


def unchanged(samples: Sequence[Row]) -> str:
    """Returns that the newest samples, lines of `samples.jsonl`, are those from before training; nothing if not."""
    steps: dict[int, list[str]] = {}
    for row in samples:
        steps.setdefault(row["step"], []).append(row["completion"])
    newest = max(steps, default=0)
    if newest == 0 or steps.get(0) != steps[newest]:
        return ""
    return f"The training has changed no text: all {len(steps[0])} samples of step {newest} are those of step 0."


# ---- While a run is under way ---------------------------------------------------------------------------------------


class Warnings(TrainerCallback):
    """Looks at what has been logged, and warns of each trouble once a run (docs/diagnostics.md). `summaries` say what
    became of a dataset's rows, by its name; `evaluated` are metric prefixes of the evaluation datasets ("eval",
    "eval_<name>"), and `samples` the run's, which are compared with those from before training when it is over."""

    def __init__(
        self,
        args: DPOConfig,
        objective: TrainingObjective,
        summaries: Mapping[str, DataReport],
        evaluated: Iterable[str],
        samples: KeptRows,
    ):
        self._args, self._objective, self._summaries = args, objective, summaries
        self._samples, self._over = samples, False
        self._evaluated = list(evaluated) if args.eval_strategy != "no" else []
        self.raised: list[dict[str, Any]] = []  # `step`, `name` and `message` of this run's warnings, each name once
        self._run: Run | None = None  # since it began, or was resumed

    def facts(self, state: TrainerState) -> RunFacts:
        """Returns what is known of the run beside its log; of a stream more as it is read."""
        train = self._summaries["train"]
        return RunFacts(
            reward=self._objective.parts[0].reward,
            beta=1.0 if self._args.beta is None else self._args.beta,
            tokens=train.completion_tokens / train.completions if train.completions else None,
            held_out={name: self._summaries[name].kept_rows for name in self._evaluated},
            max_steps=state.max_steps,
        )

    def on_train_begin(self, args: object, state: TrainerState, control: TrainerControl, **kwargs: object) -> None:
        """Forgets an earlier run."""
        self._run, self._over = None, False
        if state.global_step == 0:
            self.raised = []

    def on_train_end(self, args: object, state: TrainerState, control: TrainerControl, **kwargs: object) -> None:
        """Compares the samples; those that come later are compared as they come."""
        self._over = True
        self.compare()

    def compare(self) -> None:
        """Warns, when the run is over, of samples that it has not changed."""
        if self._over and (text := unchanged(self._samples.rows)):
            self.add([finding(self._samples.rows[-1]["step"], "no-change", text)])

    def on_log(self, args: object, state: TrainerState, control: TrainerControl, **kwargs: object) -> None:
        """Warns of what is new."""
        facts = self.facts(state)
        if self._run is None:
            self._run = Run(facts)
        self._run.facts = facts  # of a stream more is known by now
        self._run.read(state.log_history)
        self.add(findings(self._run))

    def add(self, findings: Iterable[Finding]) -> None:
        """Warns of those whose name is new."""
        for found in findings:
            if found.name not in {warning["name"] for warning in self.raised}:
                self.raised.append(found._asdict())
                if rank() == 0:
                    logger.warning("%s at step %d: %s", found.name, found.step, found.message)

    def state_dict(self, folder: Path) -> dict[str, Any]:
        """Returns the warnings so far."""
        return {"warnings": self.raised}

    def load_state_dict(self, state: Mapping[str, Any], folder: Path) -> None:
        """Takes up a run's warnings."""
        self.raised = list(state.get("warnings", []))
