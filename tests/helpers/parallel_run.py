"""Starts connected processes for tests, and the training run that each of them does.

`launch` starts a script in several processes that find each other as those of `accelerate launch` do. As a script,

    python tests/parallel_run.py case.json

does the runs of the case one after the other (see `train`), and writes what came of each to
`<folder of the case>/<name of the run>-<rank>.json`.
"""

import gc
import json
import logging
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from paths import REPO

SCRIPT = Path(__file__).resolve()
HOST = "127.0.0.1"
STUCK = 6  # seconds after which processes that are to wait for each other in vain are ended


# ---- Starting processes ---------------------------------------------------------------------------------------------


def free_port() -> int:
    """A port that nothing listens on just now."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return probe.getsockname()[1]


def child_environment(**changed: str) -> dict[str, str]:
    """The environment of a process that a test starts: this checkout, one thread."""
    path = [str(REPO), str(SCRIPT.parent), os.environ.get("PYTHONPATH", "")]
    threads = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive", "MKL_NUM_THREADS": "1"}
    return {**os.environ, **threads, "PYTHONPATH": os.pathsep.join(path), **changed}


def launch(
    script: Path, arguments: Sequence[str], folder: Path, processes: int = 2, timeout: float = 300, **changed: str
) -> None:
    """Run `python script *arguments` in several connected processes, to the end of all of them. `changed` goes into
    their environment.

    Raises:
        AssertionError: one failed, or they ran out of time. The others are killed then: they would wait for ever.
    """
    shared = {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes), **changed}
    shared |= {"MASTER_ADDR": HOST, "MASTER_PORT": str(free_port())}
    command = [sys.executable, str(script), *arguments]
    logs = [folder / f"output-{rank}.txt" for rank in range(processes)]
    children = []
    for rank, log in enumerate(logs):
        env = child_environment(**shared, RANK=str(rank), LOCAL_RANK=str(rank))
        with log.open("w") as output:
            children.append(start(command, env, output))
    wait_for(children, logs, timeout)


def start(command: Sequence[str], env: dict[str, str], output: Any) -> subprocess.Popen:
    """Start a command as the head of a group, which can be killed with all that it starts."""
    return subprocess.Popen(command, env=env, stdout=output, stderr=subprocess.STDOUT, start_new_session=True)


def leave() -> None:
    """End a started process whose results are written. At an orderly end a native thread of one of the libraries that
    read datasets still runs now and then (1 of 75 ends), and aborts it."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def wait_for(children: Sequence[subprocess.Popen], logs: Sequence[Path], timeout: float) -> None:
    """Until all have ended well; otherwise kill them, those that `start` started, and say what they printed."""
    deadline = time.monotonic() + timeout
    try:
        while any(child.poll() is None for child in children):
            assert not any(child.poll() for child in children), "a process failed"
            assert time.monotonic() < deadline, f"not done after {timeout} s"
            time.sleep(0.05)
        assert not any(child.returncode for child in children), "a process failed"
    except AssertionError as error:
        tails = "\n".join(f"--- {log.name}\n{log.read_text()[-6000:]}" for log in logs)
        raise AssertionError(f"{error}\n{tails}") from None
    finally:
        for child in children:
            if child.poll() is None:
                os.killpg(child.pid, signal.SIGKILL)
                child.wait()


# ---- What each process does -----------------------------------------------------------------------------------------


def train(run: dict[str, Any], folder: str, processes: int, rank: int) -> dict[str, Any]:
    """One training run by the public API: its logs, evaluation and final weights, or the error it ended with.

    Args:
        run: `name`, `loss` (names), `rows` and `eval_rows` (numbers), `batch` (rows of a global micro-batch); if given
            also `options` (of `DPOConfig`), `metrics` (evaluate with `figures`), `stream` (number of shards of a
            streaming dataset), `nf4` (a base in 4 bits), `own_seed` (each process draws an adapter of its own),
            `resume` (a checkpoint below the folder), `cache` (log-probs of the reference are kept in a folder of this
            name, one per process; `cache_lost`: but for the first one they are gone) and `broken` (see
            `break_on_purpose`).
        folder: holds `model`, and gets the run's outputs.
        processes: how many share a batch.
        rank: which of them this one is.
    """
    import torch
    from objective_rows import NEEDED, rows_for
    from trainer_helpers import adapter_weights, ours
    from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed

    def rows(number: int, seed: int) -> Any:
        dataset = rows_for(run["loss"][0], number, seed)
        return dataset.to_iterable_dataset(num_shards=run["stream"]) if run.get("stream") else dataset

    torch.set_num_threads(1)
    share = run["batch"] // processes
    options = {"per_device_train_batch_size": share, "per_device_eval_batch_size": share, "optim": "sgd"}
    options |= {"learning_rate": 0.2, "max_steps": -1, "num_train_epochs": 2, "loss_type": run["loss"]}
    options |= NEEDED.get(run["loss"][0], {}) | run.get("options", {})
    if processes == 1:
        options.pop("fsdp", None)
    if run.get("cache"):
        cache = Path(f"{folder}/{run['cache']}-{processes}-{rank}")
        options |= {"cache_ref_log_probs": True, "ref_cache_dir": str(cache)}
        if run.get("cache_lost") and rank:
            shutil.rmtree(cache)
    if run.get("eval_rows"):
        options["eval_dataset"] = rows(run["eval_rows"], seed=1)
    if run.get("metrics"):
        options["compute_metrics"] = figures
    set_seed(rank if run.get("own_seed") else 0)
    quantized = {"quantization_config": in_4_bits()} if run.get("nf4") else {}
    model = AutoModelForCausalLM.from_pretrained(f"{folder}/model", dtype=torch.float32, **quantized)
    if run.get("own_seed"):
        model = adapter_drawn_here(model)
    tokenizer = AutoTokenizer.from_pretrained(f"{folder}/model")
    output = f"{folder}/outputs-{run['name']}-{processes}"
    trainer = ours(model, rows(run["rows"], seed=0), tokenizer, output, **options)
    break_on_purpose(trainer, run.get("broken", ""), rank)
    heard, ear = logging.getLogger("dpo_peft.training.resume"), Ear(logging.WARNING)
    heard.addHandler(ear)
    try:
        result = trainer.train(resume_from_checkpoint=f"{folder}/{run['resume']}" if run.get("resume") else None)
    except ValueError as error:
        return {"error": type(error).__name__, "step": trainer.state.global_step}
    finally:
        heard.removeHandler(ear)
    return {
        **({"warnings": ear.said} if run.get("resume") else {}),
        "loss": result.training_loss,
        "logs": trainer.state.log_history,
        "eval": trainer.evaluate() if run.get("eval_rows") else {},
        "weights": {name: weight.flatten().tolist() for name, weight in adapter_weights(trainer).items()},
    }


def in_4_bits() -> Any:
    """NF4 with double quantization, which computes in float32."""
    import torch
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )


class Ear(logging.Handler):
    """Keeps what is logged."""

    def __init__(self, level: int):
        super().__init__(level)
        self.said: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.said.append(record.getMessage())


def figures(predictions: Any) -> dict[str, float]:
    """For `compute_metrics`: how many pairs there were, and of each the margin at its place in the dataset."""
    margins = predictions.predictions[:, 0] - predictions.predictions[:, 1]
    return {"pairs": len(margins), **{f"margin_{i}": float(margin) for i, margin in enumerate(margins)}}


def adapter_drawn_here(model: Any) -> Any:
    """A PeftModel with the random start that this process's own seed gives."""
    from peft import get_peft_model
    from trainer_helpers import lora

    return get_peft_model(model, lora())


def break_on_purpose(trainer: Any, what: str, rank: int) -> None:
    """`gradients`: they don't cross; `nan`: the weights of the last rank (or of the only process) are lost at step 2;
    `memory`: it runs out once in the last of several ranks, in the middle of a forward pass; `turns`: the processes
    don't agree whose pass comes next."""
    import torch
    from transformers import TrainerCallback

    from dpo_peft.forward.modules import decoder_layers, unwrap
    from dpo_peft.model import placement

    if what == "gradients":
        sent = torch.distributed.all_reduce

        def send_no_gradients(tensor: Any, *args: Any, **kwargs: Any) -> Any:
            return None if tensor.dtype == torch.float32 and tensor.numel() > 100 else sent(tensor, *args, **kwargs)

        torch.distributed.all_reduce = send_no_gradients
    if what == "memory" and rank and rank == trainer.args.world_size - 1:
        passes, layers = [], decoder_layers(unwrap(trainer.model))
        arrive = vars(layers[1])["bring_in"]

        def run_out(*_: Any) -> None:
            arrive()
            if trainer.state.global_step == 2 and torch.is_grad_enabled() and not passes:
                passes.append(1)
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

        vars(layers[1])["bring_in"] = run_out
    if what == "turns" and trainer.args.world_size > 1:
        placement._TURNS._agree = lambda wanted: wanted
        threading.Timer(STUCK, leave).start()
        sys.excepthook = lambda *_: leave()
    if what == "nan":

        class Lose(TrainerCallback):
            def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
                if state.global_step == 2 and rank == args.world_size - 1:
                    for parameter in model.parameters():
                        parameter.data.fill_(float("nan"))

        trainer.add_callback(Lose())


def main(case_file: str) -> None:
    """Do the runs of a case; of several processes each writes its own results."""
    case = json.loads(Path(case_file).read_text())
    folder = str(Path(case_file).parent)
    processes, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    for run in case:
        result = train(run, folder, processes, rank)
        Path(f"{folder}/{run['name']}-{rank}.json").write_text(json.dumps(result))


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    import trainer_helpers  # noqa: F401

    gc.freeze()  # else each run looks through all that is imported
    main(sys.argv[1])
    leave()
