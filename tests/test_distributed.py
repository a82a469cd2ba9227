"""The pieces of training in several processes, in three connected ones and against plain arithmetic.

As a script it is one of those processes: it writes what each piece gave to a file, and the tests read all of them.
"""

import json
import os
import pickle
import random
import statistics
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from parallel_run import launch, leave
from torch.utils.data import DataLoader, IterableDataset

from dpo_peft import distributed as parallel
from dpo_peft.distributed import (
    ShareCollator,
    any_process,
    check_launch,
    check_same,
    copy_from_first,
    gather_over_processes,
    rank,
    shares,
    sum_gradients,
    sum_over_processes,
    unshard,
    world_size,
)
from dpo_peft.errors import OptionError

PROCESSES = 3
SIZES = [10, 8, 3, 1]  # of datasets, for batches of 4
GLOBAL_BATCHES = [7, 6, 3, 2, 1]


# ---- What each process does -----------------------------------------------------------------------------------------


def parameters(of: int) -> list[torch.nn.Parameter]:
    """Six weights of three dtypes. Gradients are whole numbers, so that sums are exact in any order.

    The second has none on rank 1, the third has one on rank 2 alone, the fifth nowhere; the last is frozen.
    """
    kinds = [torch.float32, torch.float32, torch.bfloat16, torch.float64, torch.float32, torch.float32]
    weights = [torch.nn.Parameter(torch.full((3, i + 1), float(of)).to(kind)) for i, kind in enumerate(kinds)]
    for index, weight in enumerate(weights):
        if index != 4 and (index, of) not in [(1, 1), (2, 0), (2, 1)]:
            weight.grad = torch.full_like(weight, 10 * index + of)
    weights[-1].requires_grad_(False)
    return weights


class Watch:
    """Counts the elements of what is sent, and passes it on."""

    def __init__(self) -> None:
        self.sent: list[int] = []
        self.all_reduce = torch.distributed.all_reduce

    def __call__(self, tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        self.sent.append(tensor.numel())
        return self.all_reduce(tensor, *args, **kwargs)


def gradients(bucket_bytes: int) -> dict[str, Any]:
    """The gradients after their sum, and the sizes of what was sent for it."""
    weights, kept = parameters(rank()), parallel.BUCKET_BYTES
    watch = Watch()
    parallel.BUCKET_BYTES, torch.distributed.all_reduce = bucket_bytes, watch
    sum_gradients(iter(weights))
    parallel.BUCKET_BYTES, torch.distributed.all_reduce = kept, watch.all_reduce
    grads = [None if weight.grad is None else weight.grad.flatten().tolist() for weight in weights]
    return {"grads": grads, "sent": watch.sent}


class Stream(IterableDataset):
    """The numbers below `size`, without a length."""

    def __init__(self, size: int):
        self.size = size

    def __iter__(self) -> Any:
        return iter(range(self.size))


def datasets_of(size: int) -> dict[str, Any]:
    """The numbers below `size`, in each kind of dataset that a trainer is given."""
    from datasets import Dataset

    rows = Dataset.from_dict({"n": list(range(size))})
    shards = min(size, 4)
    return {
        "list": list(range(size)),
        "dataset": rows,
        "stream": rows.to_iterable_dataset(),
        "stream in shards": rows.to_iterable_dataset(num_shards=shards),
        "torch stream": Stream(size),
    }


def batches_of(dataset: Any, whole: bool, drop_last: bool = False, epochs: int = 2) -> dict[str, Any]:
    """What a data loader with global batches of 4 gives after accelerate has prepared it."""
    from accelerate import Accelerator
    from accelerate.utils import DataLoaderConfiguration

    torch.manual_seed(5)
    config = DataLoaderConfiguration(use_seedable_sampler=True, dispatch_batches=False)
    accelerator = Accelerator(cpu=True, dataloader_config=config)
    shuffle = not isinstance(dataset, IterableDataset)
    plain = DataLoader(dataset, batch_size=4, shuffle=shuffle, drop_last=drop_last, collate_fn=list)
    loader = accelerator.prepare(plain)
    if whole:
        unshard(loader, dataset)
    seen, remainders = [], []
    for _ in range(epochs):
        for batch in loader:
            seen.append([row["n"] if isinstance(row, dict) else row for row in batch])
            remainders.append(loader.remainder)
    lengths = {"length": len(loader), "total": loader.total_batch_size} if shuffle else {}
    return {"batches": seen, "remainders": remainders, **lengths}


def loaders(whole: bool) -> dict[str, Any]:
    found = {}
    for size in SIZES:
        for name, dataset in datasets_of(size).items():
            found[f"{name} of {size}"] = batches_of(dataset, whole)
            found[f"{name} of {size}, full batches"] = batches_of(dataset, whole, drop_last=True)
    return found


def error_of(action: Any, *args: Any) -> str:
    try:
        action(*args)
    except OptionError as error:
        return str(error)
    return ""


def work() -> dict[str, Any]:
    """Everything that the tests look at, as this process sees it."""
    from accelerate import PartialState

    PartialState(cpu=True)  # connects the processes
    me = rank()
    share = ShareCollator(lambda rows: {"rows": rows}, lambda row: 1)
    weights = parameters(me)
    copy_from_first(weights)
    # Every process reaches the end of each of these, whatever the others raise: nobody waits for ever.
    return {
        "rank": me,
        "world_size": world_size(),
        "sums": sum_over_processes([2**51 + me, 0.1 * (me + 1), -me, True]),
        "no sums": sum_over_processes([]),
        "gathered": gather_over_processes({"rank": me, "rows": ["x"] * me}),
        "any": [any_process(me == 2), any_process(False), any_process(True)],
        "gradients": gradients(2**20),
        "gradients in small buckets": gradients(20),
        "copied": [weight.flatten().tolist() for weight in weights],
        "shares": [share(list(range(size))) for size in GLOBAL_BATCHES],
        "shares by size": ShareCollator(lambda rows: {"rows": rows}, int)([5, 1, 1, 9, 4, 4]),
        "pickled share": pickle.dumps(ShareCollator(dict.fromkeys, int)).hex(),
        "whole": loaders(True),
        "sharded": loaders(False),
        "without dataset": error_of(unshard, DataLoader(Stream(3), batch_size=2)),
        "same": error_of(check_same, "seed", 3),
        "not the same": error_of(check_same, "seed", 3 + (me == 1)),
        "launched": error_of(check_launch, arguments(seed=1)),
        "launched apart": error_of(check_launch, arguments(seed=me)),
        "batches split": error_of(check_launch, arguments(accelerator_config=SimpleNamespace(split_batches=True))),
        "spread": error_of(check_launch, arguments(model_init_kwargs={"device_map": "auto"})),
        "mean of means": error_of(check_launch, arguments(average_tokens_across_devices=False)),
    }


def arguments(kind: str = "MULTI_CPU", **changed: Any) -> SimpleNamespace:
    """The attributes of `DPOConfig` that matter."""
    options: dict[str, Any] = dict.fromkeys((*parallel._SAME_OPTIONS, "fsdp", "deepspeed", "parallelism_config"))
    options |= {"accelerator_config": SimpleNamespace(split_batches=False), "average_tokens_across_devices": True}
    options |= {"model_init_kwargs": None, "world_size": world_size(), "seed": 0}
    state = SimpleNamespace(distributed_type=SimpleNamespace(value=kind))
    return SimpleNamespace(**{**options, "distributed_state": state, **changed})


# ---- Tests: three processes -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of the processes found, by rank."""
    folder = tmp_path_factory.mktemp("parallel")
    launch(Path(__file__), [str(folder)], folder, PROCESSES)
    return [json.loads((folder / f"{index}.json").read_text()) for index in range(PROCESSES)]


def test_processes_know_each_other(results: list[dict[str, Any]]) -> None:
    assert [result["rank"] for result in results] == [0, 1, 2]
    assert [result["world_size"] for result in results] == [3, 3, 3]


def test_sums_are_exact_and_the_same_everywhere(results: list[dict[str, Any]]) -> None:
    expected = [3 * 2**51 + 3, pytest.approx(0.6, abs=1e-15), -3.0, 3.0]
    assert all(result["sums"] == expected for result in results)
    assert float(torch.tensor(3 * 2**51 + 3, dtype=torch.float32)) != 3 * 2**51 + 3  # float32 would not do
    assert results[0]["sums"] == results[1]["sums"] == results[2]["sums"]
    assert all(result["no sums"] == [] for result in results)


def test_values_are_gathered_in_the_order_of_ranks(results: list[dict[str, Any]]) -> None:
    expected = [{"rank": index, "rows": ["x"] * index} for index in range(PROCESSES)]
    assert all(result["gathered"] == expected for result in results)
    assert all(result["any"] == [True, False, True] for result in results)


@pytest.mark.parametrize("name", ["gradients", "gradients in small buckets"])
def test_gradients_are_summed_where_any_process_has_one(results: list[dict[str, Any]], name: str) -> None:
    everywhere = [0 + 1 + 2, 10 + 12, 22, 30 + 31 + 32, None]  # see `parameters`
    expected = [total and [float(total)] * (3 * (index + 1)) for index, total in enumerate(everywhere)]
    for index, result in enumerate(results):
        assert result[name]["grads"][:5] == expected
        assert result[name]["grads"][5] == [50.0 + index] * 18  # frozen: its gradient is not ours to touch


def test_gradients_are_sent_in_few_buckets(results: list[dict[str, Any]]) -> None:
    """Flags of the five trainable weights, then float32 (3 + 6 elements), bfloat16 (9), float64 (12)."""
    assert [result["gradients"]["sent"] for result in results] == [[5, 9, 9, 12]] * 3
    # At most 20 bytes: one weight each.
    assert [result["gradients in small buckets"]["sent"] for result in results] == [[5, 3, 6, 9, 12]] * 3


def test_every_process_gets_the_trainable_weights_of_the_first(results: list[dict[str, Any]]) -> None:
    for index, result in enumerate(results):
        assert all(value == 0.0 for weight in result["copied"][:5] for value in weight)
        assert result["copied"][5] == [float(index)] * 18  # frozen


def test_shares_are_every_row_once(results: list[dict[str, Any]]) -> None:
    for case, size in enumerate(GLOBAL_BATCHES):
        for index, result in enumerate(results):
            own = list(range(index, size, 3))
            assert result["shares"][case] == ({"rows": own, "order": own} if own else {"empty": True})


def test_shares_are_level(results: list[dict[str, Any]]) -> None:
    """By hand: 9 alone; 5, then a 1; 4 and 4 to the lightest, and the other 1 to 5 + 1 = 6 < 8."""
    shared = [result["shares by size"] for result in results]
    assert shared == [
        {"rows": [9], "order": [3]},
        {"rows": [5, 1, 1], "order": [0, 1, 2]},
        {"rows": [4, 4], "order": [4, 5]},
    ]


def test_a_share_goes_to_a_worker_that_is_not_connected(results: list[dict[str, Any]]) -> None:
    assert world_size() == 1
    collators = [pickle.loads(bytes.fromhex(result["pickled share"])) for result in results]
    assert [list(collator([5, 6, 7, 8])) for collator in collators] == [[8, "order"], [7, "order"], [5, 6, "order"]]


def test_every_process_reads_the_batches_of_a_single_one(results: list[dict[str, Any]]) -> None:
    alone = loaders(True)  # here, in one process
    assert alone["list of 10"]["batches"][2] != alone["list of 10"]["batches"][5], "epochs are shuffled anew"
    assert [len(batch) for batch in alone["list of 10"]["batches"]] == [4, 4, 2] * 2
    for result in results:
        assert result["whole"] == alone


def test_without_unshard_processes_read_other_batches(results: list[dict[str, Any]]) -> None:
    """Negative control: what accelerate does by itself, dropping or repeating rows to fill the last batches."""
    for name, whole in results[0]["whole"].items():
        sharded = [result["sharded"][name]["batches"] for result in results]
        if whole["batches"]:
            assert any(batches != whole["batches"] for batches in sharded), name
    # In one of two epochs of 10 rows, 12 rows or none instead of 2 would be taken at the end.
    seen = [row for result in results for batch in result["sharded"]["list of 10"]["batches"] for row in batch]
    assert len(seen) > 2 * 10


def test_a_stream_must_be_given_whole(results: list[dict[str, Any]]) -> None:
    assert all("must be whole in every process" in result["without dataset"] for result in results)


def test_options_must_agree_in_all_processes(results: list[dict[str, Any]]) -> None:
    assert all(result["same"] == result["launched"] == "" for result in results)
    for result in results:
        assert result["not the same"].startswith("seed differs between the processes (by rank: [3, 4, 3])")
        assert "'seed': '2'" in result["launched apart"]


@pytest.mark.parametrize(
    "name, word",
    [
        ("batches split", "split_batches=True"),
        ("spread", "device_map='auto'"),
        ("mean of means", "average_tokens_across_devices=False"),
    ],
)
def test_options_that_would_do_something_else_are_refused(results: list[dict[str, Any]], name: str, word: str) -> None:
    assert all(word in result[name] for result in results)


# ---- Tests: one process ---------------------------------------------------------------------------------------------


def test_a_single_process_is_left_as_it_is() -> None:
    assert (world_size(), rank()) == (1, 0)
    assert sum_over_processes([3, 0.25]) == [3.0, 0.25]
    value = object()
    assert gather_over_processes(value) == [value]
    assert [any_process(True), any_process(False)] == [True, False]
    weights = parameters(1)
    before = [None if weight.grad is None else weight.grad.clone() for weight in weights]
    sum_gradients(weights)
    copy_from_first(weights)
    check_same("seed", 1)
    for weight, grad in zip(weights, before, strict=True):
        assert (weight.grad is None and grad is None) or torch.equal(weight.grad, grad)
        assert torch.all(weight == 1.0)
    assert ShareCollator(dict.fromkeys, int)([1, 2, 3]) == {1: None, 2: None, 3: None, "order": [0, 1, 2]}
    unshard(DataLoader([1, 2, 3], batch_size=2))


def spread(sizes: list[int], split: list[list[int]]) -> float:
    """How far the largest share is above the mean."""
    loads = [sum(sizes[i] for i in share) for share in split]
    return max(loads) * len(loads) / sum(loads) - 1


@pytest.mark.parametrize("processes", [2, 4, 8])
@pytest.mark.parametrize("each, most, usual", [(8, 0.07, 0.03), (32, 0.01, 0.003)])
def test_shares_of_real_rows_are_level(data_dir: Path, processes: int, each: int, most: float, usual: float) -> None:
    """Characters of 299 pairs of one set and 1,100 short ones of another. The control: every n-th row for each."""
    long = json.loads((data_dir / "llama-factory-demo/dpo_en_demo.json").read_text())
    short = json.loads((data_dir / "rasbt-instruction-preference/instruction-data-with-preference.json").read_text())
    lengths = [
        [len(json.dumps([row["conversations"], row["chosen"], row["rejected"]])) for row in long],
        [sum(len(row[name]) for name in ("instruction", "input", "chosen", "rejected")) for row in short],
    ]
    for of_set in lengths:
        draws = [random.Random(seed).sample(of_set, processes * each) for seed in range(60)]
        level = [spread(sizes, shares(sizes, processes)) for sizes in draws]
        strided = [spread(sizes, [list(range(r, len(sizes), processes)) for r in range(processes)]) for sizes in draws]
        assert max(level) < most and statistics.mean(level) < usual
        assert statistics.mean(strided) > max(0.03, 10 * statistics.mean(level) if each == 32 else 0)
        for sizes in draws[:5]:
            assert sorted(i for share in shares(sizes, processes) for i in share) == list(range(len(sizes)))


@pytest.mark.parametrize(
    "env, word",
    [
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, "DeepSpeed is not offered"),
        ({"ACCELERATE_USE_MEGATRON_LM": "true"}, "Megatron-LM is not offered"),
        ({"WORLD_SIZE": "4"}, "use_cpu=True"),
        ({"ACCELERATE_USE_PARALLELISM_CONFIG": "true", "PARALLELISM_CONFIG_TP_SIZE": "2"}, "tp_size=2"),
        ({"ACCELERATE_USE_PARALLELISM_CONFIG": "true", "PARALLELISM_CONFIG_CP_SIZE": "4"}, "cp_size=4"),
    ],
)
def test_launches_that_split_the_model_are_refused(env: dict[str, str], word: str) -> None:
    check_launch(arguments("NO"), {name: "1" if value.isdigit() else "false" for name, value in env.items()})
    with pytest.raises(OptionError, match=word):
        check_launch(arguments("NO"), env)


@pytest.mark.parametrize("kind", ["FSDP", "DEEPSPEED", "XLA", "MULTI_NPU", "MEGATRON_LM"])
def test_other_kinds_of_processes_are_refused(kind: str) -> None:
    with pytest.raises(OptionError, match=rf"over {kind} is not offered.*recipes/accelerate/ddp.yaml"):
        check_launch(arguments(kind), {})


@pytest.mark.parametrize("kind", ["NO", "MULTI_CPU", "MULTI_GPU"])
def test_data_parallel_launches_are_accepted(kind: str) -> None:
    check_launch(arguments(kind), {"WORLD_SIZE": "1", "PARALLELISM_CONFIG_TP_SIZE": "2"})


@pytest.mark.parametrize(
    "option, value",
    [
        ("deepspeed", "zero.json"),
        ("model_init_kwargs", {"tp_plan": "auto"}),
        ("parallelism_config", SimpleNamespace(tp_size=1, cp_size=1, sp_size=1, dp_shard_size=2)),
    ],
)
def test_options_that_split_the_model_are_refused(option: str, value: Any) -> None:
    with pytest.raises(OptionError, match=f"{option}.*recipes/accelerate/ddp.yaml"):
        check_launch(arguments("NO", **{option: value}), {})


def test_real_arguments_are_understood(tmp_path: Path) -> None:
    """`arguments` above stands for these."""
    from dpo_peft import DPOConfig

    args = DPOConfig(output_dir=str(tmp_path), use_cpu=True, report_to="none")
    check_launch(args, {})
    with pytest.raises(OptionError, match="WORLD_SIZE=2"):
        check_launch(args, {"WORLD_SIZE": "2"})
    args.distributed_state.distributed_type = type(args.distributed_state.distributed_type)("XLA")
    with pytest.raises(OptionError, match="over XLA"):
        check_launch(args, {})


if __name__ == "__main__":
    found = work()
    Path(sys.argv[1], f"{os.environ['RANK']}.json").write_text(json.dumps(found))
    leave()
