"""What answer-only and partial-depth adapters save: floating-point operations and time of a step, beside the full one.

    python benchmarks/adapters.py                      # on the CPU, a few minutes
    python benchmarks/adapters.py --shape 8b --device cuda --samples 8

A step is policy, reference, loss and backward pass over pairs with `longprompt`'s lengths (speed_models.py) on a
random NF4 model, with each adapter in turn. Operations are counted by `torch.utils.flop_counter`; `predicted` counts
products of weights and of attention by hand. Ratios of wall times are taken within each turn; their median counts.
Writes benchmarks/results/adapters_<device>.json.
"""

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from speed_models import SHAPES, lengths, make_model, synchronize
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from dpo_peft.artifacts.card import framework_versions
from dpo_peft.forward import PackedBatch, Sample, completion_logps, pack, plan_forward
from dpo_peft.forward.score import logps_with_reference
from dpo_peft.model.rebuilding import keep_weights
from dpo_peft.reference.adapter_off import reference_logps

RESULTS = Path(__file__).parent / "results"
INVOCATION = [1, 2, 3]
RANK, TARGETS = 16, "q_proj k_proj v_proj o_proj gate_proj up_proj down_proj".split()
SHAPES["medium"] = {**SHAPES["small"], "hidden_size": 512, "intermediate_size": 1408, "num_attention_heads": 8}


def adapters(layers: int) -> dict[str, dict[str, Any]]:
    """Options of `LoraConfig` by the name of the adapter."""
    upper = {"layers_to_transform": list(range(layers // 2, layers))}
    answers = {"alora_invocation_tokens": INVOCATION}
    return {"full": {}, "answer-only": answers, "upper half": upper, "both": {**answers, **upper}}


def samples_of(number: int, answer_only: bool, vocab: int) -> list[Sample]:
    draw = torch.Generator().manual_seed(0)
    found = []
    for prompt, *completions in lengths("longprompt", number):
        ids = [
            torch.randint(4, vocab, (n,), generator=draw).tolist() for n in (prompt - len(INVOCATION), *completions)
        ]
        found.append(Sample(ids[0] + INVOCATION, ids[1:], adapter_start=len(ids[0]) if answer_only else None))
    return found


def _product(total: Any, a: Any, b: Any, *args: Any, **kwargs: Any) -> int:
    return 2 * a[0] * a[1] * b[1]


def _attention(q: Any, k: Any, v: Any, *args: Any, **kwargs: Any) -> int:
    return sdpa_flop_count(q, k, v)


def _attention_backward(grad: Any, q: Any, k: Any, v: Any, *args: Any, **kwargs: Any) -> int:
    return sdpa_backward_flop_count(grad, q, k, v)


# What the counter does not know: attention on a CPU, and sums in place.
UNKNOWN = {
    torch.ops.aten.addmm_: _product,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
}


class Step:
    """A training step with one kind of adapter."""

    def __init__(self, shape: str, device: str, dtype: torch.dtype, number: int, options: dict[str, Any]):
        self.shape, self.options = SHAPES[shape], options
        config = LoraConfig(r=RANK, lora_alpha=32, target_modules=TARGETS, task_type="CAUSAL_LM", **options)
        base = make_model(shape, device, dtype)
        keep_weights(base)
        self.model = get_peft_model(base, config)
        self.decoder = plan_forward(self.model).fused
        self.samples = samples_of(number, "alora_invocation_tokens" in options, self.shape["vocab_size"])
        self.batch: PackedBatch = pack(self.samples).to(device)

    def __call__(self) -> None:
        decoder = self.decoder
        if decoder.shares_work:
            policy, reference = logps_with_reference(self.model, self.batch, decoder, None)
        else:
            reference = reference_logps(self.model, self.batch, decoder)
            policy = completion_logps(self.model, self.batch, decoder)
        rewards_E2 = (policy.logps_C - reference.logps_C).view(-1, 2)
        loss = -torch.nn.functional.logsigmoid(0.1 * (rewards_E2[:, 0] - rewards_E2[:, 1])).mean()
        loss.backward()

    def predicted(self) -> float:
        """Floating-point operations by hand: two for each weight and token in a forward pass, as many for the gradient
        to the inputs, none to frozen weights; LoRA's factors three times; attention's two products over all keys of a
        sample, as the dense backend computes them, and five in the backward pass."""
        c, layers = self.shape, self.shape["num_hidden_layers"]
        hidden, inner, kv = c["hidden_size"], c["intermediate_size"], c["hidden_size"] // c["num_attention_heads"]
        kv *= c["num_key_value_heads"]
        sizes = [(hidden, hidden + 2 * kv, 3), (hidden, hidden, 1), (hidden, 2 * inner, 2), (inner, hidden, 1)]
        first = min(self.options.get("layers_to_transform", [0]))
        trunk, upper = first, layers - first

        def linear(tokens: float, rank: int, backward: bool) -> float:
            total = 0.0
            for inputs, outputs, parts in sizes:
                forward = tokens * ((inputs + rank * parts) * outputs + rank * parts * inputs)
                # To [x, u]; the factors' own share of dx; dA and dB.
                total += 2 * forward + backward * 2 * (forward + tokens * rank * parts * (inputs + outputs))
            return total

        def attended(queries: float, keys: float, backward: bool) -> float:
            return (2 + 5 * backward) * 2 * queries * keys * hidden

        total = 0.0
        whole = max(len(s.prompt) + sum(map(len, s.completions)) for s in self.samples)
        number, given = len(self.samples), [s.alone for s in self.samples]
        tokens = self.batch.input_ids.numel()
        if self.batch.alora_offsets is None:
            own, keys, queries = tokens, whole, whole
        else:
            own = self.batch.alora_offsets[0]
            keys, queries = self.batch.sample_index.shape[1], self.batch.query_index.shape[1]
            prompt = max(given)
            total += layers * number * attended(prompt, prompt, False)
            total += trunk * linear(tokens - own, 0, False) + upper * linear(tokens - own, RANK, False)
        total += trunk * (linear(own, 0, False) + number * attended(queries, keys, False))
        for backward in (False, True):  # reference, policy
            total += upper * (linear(own, RANK, backward) + number * attended(queries, keys, backward))
        head = 2 * len(self.batch.target) * hidden * c["vocab_size"]
        return total + 3 * head


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="medium", choices=SHAPES)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--samples", type=int, default=2)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--threads", type=int)
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    dtype = torch.bfloat16 if args.device == "cuda" else torch.float32
    kinds = adapters(SHAPES[args.shape]["num_hidden_layers"])
    steps = {name: Step(args.shape, args.device, dtype, args.samples, options) for name, options in kinds.items()}
    found: dict[str, dict[str, Any]] = {}
    for name, step in steps.items():
        with FlopCounterMode(display=False, custom_mapping=UNKNOWN) as counter:
            step()
        found[name] = {"flops": counter.get_total_flops(), "predicted": step.predicted(), "seconds": [], "cpu": []}
    for _ in range(args.turns):
        for name, step in steps.items():
            synchronize(args.device)
            start, used = time.perf_counter(), time.process_time()
            step()
            synchronize(args.device)
            found[name]["seconds"].append(time.perf_counter() - start)
            found[name]["cpu"].append(time.process_time() - used)  # beside other work the surer figure
    full = found["full"]
    for one in found.values():
        one["flops_ratio"] = full["flops"] / one["flops"]
        one["predicted_ratio"] = full["predicted"] / one["predicted"]
        for clock in ("seconds", "cpu"):
            ratios = [a / b for a, b in zip(full[clock], one[clock], strict=True)]
            one[f"{clock}_ratio"] = statistics.median(ratios)
    sizes = lengths("longprompt", args.samples)
    result = {
        "shape": SHAPES[args.shape], "lengths": sizes, "device": args.device, "threads": torch.get_num_threads(),
        "versions": framework_versions(), "adapters": found,
    }  # fmt: skip
    print(json.dumps(found, indent=2))
    path = RESULTS / f"adapters_{args.device}.json"
    path.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
