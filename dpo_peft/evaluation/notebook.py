"""Shows a run in a notebook: a bar, and a table of the figures that matter. Imported in notebooks alone."""

from typing import Any

from IPython.display import HTML, display
from transformers import TrainerControl, TrainerState
from transformers.utils.notebook import NotebookProgressCallback, text_to_html_table

from .console import METRICS, Shows, figure, label_of

TRAINING = {"Loss": "loss", "Margin": "margin", "Accuracy": "acc", "KL": "KL"}  # heading to column
EVALUATED = {"accuracy": "rewards/accuracies", "length alone": "accuracies/length_only", "loss": "loss"}


class NotebookConsole(Shows, NotebookProgressCallback):
    """Shows training logs and evaluations as rows of one table: transformers' has a column for every metric."""

    prediction_bar: Any

    def write(self, line: str) -> None:
        """Leaves it to the table."""

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Begins the table."""
        super().on_train_begin(args, state, control, **kwargs)
        NotebookProgressCallback.on_train_begin(self, args, state, control, **kwargs)
        names = ["Step", *(heading for heading, name in TRAINING.items() if name not in self.without)]
        names += [self._heading(prefix, what) for prefix in self.labels for what in self._shown()]
        self.training_tracker.inner_table = [names]

    def on_log(self, args: Any, state: TrainerState, control: TrainerControl, logs: Any = None, **kwargs: Any) -> None:
        """Adds to the table, if a run is under way."""
        super().on_log(args, state, control, logs, **kwargs)
        cells = {heading: figure(logs.get(METRICS[name])) for heading, name in TRAINING.items()}
        if "loss" not in logs:
            prefixes = [name.removesuffix("_runtime") for name in logs if name.endswith("_runtime")]
            cells = {
                self._heading(prefix, what): figure(logs.get(f"{prefix}_{EVALUATED[what]}"))
                for prefix in prefixes
                for what in self._shown()
                if prefix != "train"
            }
        if self.training_tracker is None:
            if "loss" not in logs and cells:
                display(HTML(text_to_html_table([list(cells), list(cells.values())])))
            return
        table = self.training_tracker.inner_table
        if cells and table[-1][0] != state.global_step:
            table.append([state.global_step, *[""] * (len(table[0]) - 1)])
        for heading, cell in cells.items():
            if heading in table[0]:
                table[-1][table[0].index(heading)] = cell
        self.training_tracker.display()

    def on_evaluate(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Takes away the evaluation's bar."""
        if self.training_tracker is not None:
            self.training_tracker.remove_child()
        elif self.prediction_bar is not None:
            self.prediction_bar.close()
        self.prediction_bar, self._force_next_update = None, True

    def _shown(self) -> list[str]:
        """Returns what is shown of an evaluation: of several sets the accuracy alone."""
        return list(EVALUATED) if len(self.labels) < 2 else ["accuracy"]

    @staticmethod
    def _heading(prefix: str, what: str) -> str:
        return f"{'Held-out' if prefix == 'eval' else label_of(prefix)} {what}"
