"""What do products in FP8 change, and what do they save? (`fp8_products`, docs/quantization.md)

    python benchmarks/fp8.py [--model FOLDER] [--steps 30] [--pairs 8]

Errors: a LoRA that bfloat16 trained for ten steps is put into each variant, and log-probs, margins and gradients of
held-out pairs are compared with those in float32. Drift: the same run of --steps steps in each variant; its margins
beside those of fused layers in bfloat16. The yardstick is the drift of the model's own layers, whose rounding differs
and no more. The bundled model and its rows unless --model says otherwise; NF4. A GPU also times products of the shapes
of Llama 3.1 8B, [q, k, v] and [gate, up], in microseconds.

Writes benchmarks/results/fp8_<device>.json, under the model's name, and prints the tables.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid

from dpo_peft import DPOConfig, DPOTrainer, quickstart
from dpo_peft.artifacts.card import framework_versions
from dpo_peft.files import read_rows
from dpo_peft.forward import PackedBatch
from dpo_peft.fused import fp8
from dpo_peft.fused.lora import Projection, ProjectionPass

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
RESULT = Path(__file__).parent / "results" / f"fp8_{DEVICE}.json"
OWN, BF16, FP8 = {"fused_layers": False}, {"fused_layers": True}, {"fused_layers": True, "fp8_products": True}


class ForwardOnly(fp8.FP8Pass):
    """dx = dy W in bfloat16, of the weight as it was before e4m3."""

    backward = ProjectionPass.backward


class WideGradient(fp8.FP8Pass):
    """dy in e5m2, which has a bit less of precision and more of range."""

    def backward(self, grad_TN: Tensor) -> Tensor:
        weight_NK, scale = self.rounded(grad_TN)
        grad_extended = super().backward(grad_TN)
        scales_T1 = (grad_TN.float().abs().amax(1, keepdim=True) / 57344).clamp(min=1e-38)
        rounded_TN = (grad_TN.float() / scales_T1).to(torch.float8_e5m2)
        scales = {"scale_a": scales_T1, "scale_b": scale.expand(1, self.inputs).contiguous()}
        weight_KN = weight_NK.T.contiguous()
        grad_TK = torch._scaled_mm(rounded_TN, weight_KN.T, **scales, out_dtype=grad_TN.dtype)
        grad_extended[:, : self.inputs] = grad_TK
        return grad_extended


class Inside(fp8.FP8Pass):
    """[x, u] [W, B]^T as one product in FP8, B beside W under one scale."""

    def forward(self, extended: Tensor) -> Tensor:
        _, scale = self.rounded(extended)
        return fp8.product(extended, (self.weight(extended).float() / scale).to(fp8.E4M3), scale)


VARIANTS: dict[str, tuple[dict[str, Any], type[ProjectionPass] | None]] = {
    "bfloat16, fused layers": (BF16, None),
    "bfloat16, own layers": (OWN, None),
    "FP8": (FP8, None),
    "FP8, forward only": (FP8, ForwardOnly),
    "FP8, dy in e5m2": (FP8, WideGradient),
    "FP8, adapter inside": (FP8, Inside),
}


def trainer_of(args: argparse.Namespace, name: str, **options: Any) -> DPOTrainer:
    given, kind = VARIANTS.get(name, ({"fused_layers": True, "bf16": False}, None))
    given = {"bf16": True, "model_init_kwargs": {"dtype": "bfloat16" if name in VARIANTS else "float32"}, **given}
    of_run = {"max_steps": args.steps, "per_device_train_batch_size": args.pairs, "learning_rate": args.rate}
    quiet = {"report_to": "none", "save_strategy": "no", "disable_tqdm": True, "logging_steps": 1}
    config = DPOConfig(
        output_dir=tempfile.mkdtemp(), lr_scheduler_type="constant", gradient_checkpointing=False,
        use_cpu=DEVICE == "cpu", beta=0.5, **{**given, **of_run, **quiet, **options},
    )  # fmt: skip
    files = {"train_dataset": quickstart.train_file(), "eval_dataset": quickstart.test_file()}
    rows = {key: read_rows(file).select(range(64 if key == "eval_dataset" else 512)) for key, file in files.items()}
    trainer = DPOTrainer(args.model, args=config, **rows)
    if kind is not None:
        for layer in trainer.forward_plan.fused.parts.layers:
            for projection in layer.projections:
                projection.kind = kind
    return trainer


def scored(trainer: DPOTrainer, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Log-probs of tokens, margins and all gradients, for 8 held-out pairs and an adapter."""
    trainer.model.load_state_dict(state, strict=False)
    trainer.model.zero_grad()
    batch = trainer.collate([trainer.eval_dataset[i] for i in range(8)])
    batch = PackedBatch(**{k: v for k, v in batch.items() if k != "coupled"}).to(trainer.args.device)
    policy, reference = trainer.policy_logps(batch), trainer.reference.logps(batch)
    ratio = policy.logps_C - reference.logps_C
    margins = ratio[::2] - ratio[1::2]
    (-logsigmoid(0.5 * margins).mean()).backward()
    grads = torch.cat([p.grad.flatten().double() for p in trainer.model.parameters() if p.grad is not None])
    return {"tokens": policy.token_logps_N.detach().double(), "margins": margins.detach().double(), "grads": grads}


def errors(found: dict[str, Tensor], exact: dict[str, Tensor]) -> dict[str, float]:
    off = {k: found[k] - exact[k] for k in exact}
    cosine = torch.cosine_similarity(found["grads"], exact["grads"], dim=0)
    return {
        "token_rms": float(off["tokens"].square().mean().sqrt()),
        "margin_rms": float(off["margins"].square().mean().sqrt()),
        "margin_size": float(exact["margins"].square().mean().sqrt()),
        "grad_cosine": float(cosine),
        "grad_off": float(off["grads"].norm() / exact["grads"].norm()),
    }


def run(args: argparse.Namespace, name: str) -> dict[str, Any]:
    trainer, started = trainer_of(args, name), time.time()
    trainer.train()
    seconds = time.time() - started
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    held_out = trainer.evaluate()
    return {
        "margins": [entry["rewards/margins"] for entry in logs],
        "loss": [entry["loss"] for entry in logs],
        "held_out": {k: held_out[f"eval_{k}"] for k in ("loss", "rewards/margins", "rewards/accuracies")},
        "seconds": round(seconds, 1),
    }


def products(tokens: int = 8192) -> dict[str, dict[str, float]]:
    """Microseconds of one product, dequantization included, in bfloat16 and in FP8, forward and backward."""
    found: dict[str, dict[str, float]] = {}
    for name, inputs, outputs in (("qkv", 4096, [4096, 1024, 1024]), ("gate_up", 4096, [14336] * 2)):
        layers = [bnb.nn.Linear4bit(inputs, n, bias=False, quant_type="nf4").to(torch.bfloat16) for n in outputs]
        projection = Projection([layer.cuda() for layer in layers])
        x, dy = (torch.randn(tokens, n, device="cuda", dtype=torch.bfloat16) for n in (inputs, sum(outputs)))
        for kind in (ProjectionPass, fp8.FP8Pass):
            for which, given in (("forward", x), ("backward", dy)):
                call, events = getattr(kind(projection), which), [torch.cuda.Event(enable_timing=True) for _ in "ab"]
                for i in range(13):
                    if i == 3:
                        events[0].record()
                    call(given)
                events[1].record()
                torch.cuda.synchronize()
                found.setdefault(name, {})[f"{kind.__name__} {which}"] = events[0].elapsed_time(events[1]) * 100
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=quickstart.model_path())
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--pairs", type=int, default=8)
    parser.add_argument("--rate", type=float, default=1e-3)
    args = parser.parse_args()
    first = trainer_of(args, "bfloat16, fused layers", max_steps=10)
    first.train()
    state = {k: v.detach().clone() for k, v in first.model.state_dict().items() if "lora_" in k}
    exact = scored(trainer_of(args, "float32"), state)
    off = {name: errors(scored(trainer_of(args, name), state), exact) for name in VARIANTS}
    print(json.dumps(off, indent=1), flush=True)
    runs = {name: run(args, name) for name in VARIANTS if "inside" not in name}
    plain = runs["bfloat16, fused layers"]["margins"]
    for one in runs.values():
        apart = [abs(a - b) for a, b in zip(one["margins"], plain, strict=True)]
        one["apart"] = sum(apart) / sum(map(abs, plain))
    print(json.dumps({k: [v["apart"], v["seconds"], v["held_out"]] for k, v in runs.items()}, indent=1), flush=True)
    found = json.loads(RESULT.read_text()) if RESULT.exists() else {}
    case = {"options": vars(args) | {"model": Path(args.model).name}, "versions": framework_versions()}
    found[Path(args.model).name] = case | {"errors": off, "runs": runs}
    if DEVICE == "cuda":
        found["products"] = products()
    RESULT.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
