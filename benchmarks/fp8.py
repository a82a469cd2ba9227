"""What do products in FP8 change, and what do they save? (`fp8_products`, docs/quantization.md)

    python benchmarks/fp8.py [--model FOLDER] [--steps 30] [--pairs 4]

Errors: the adapter of a bfloat16 run is put into each variant; log-probs, margins and gradients of held-out pairs
are compared with float32's. Drift: the same run in each variant, its margins beside those of fused layers in bfloat16.
The yardstick is the model's own layers, which differ in rounding alone. The bundled model unless --model says
otherwise, its rows, NF4. A GPU also times products of Llama 3.1 8B's shapes on 8,192 tokens, dequantization included.

Adds to benchmarks/results/fp8_<device>.json. The bundled model takes about 5 minutes on 1 CPU core.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from dpo_peft import DPOConfig, DPOTrainer, quickstart
from dpo_peft.artifacts.card import framework_versions
from dpo_peft.files import read_rows
from dpo_peft.forward import PackedBatch
from dpo_peft.fused import fp8
from dpo_peft.fused.lora import Projection, ProjectionPass

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
RESULT = Path(__file__).parent / "results" / f"fp8_{DEVICE}.json"
EXACT = {"bf16": False, "fused_layers": True}
PLAIN, FP8 = {"fused_layers": True}, {"fused_layers": True, "fp8_products": True}


class ForwardOnly(fp8.FP8Pass):
    backward = ProjectionPass.backward  # by the weight as it was before e4m3


class Inside(fp8.FP8Pass):
    """[x, u] [W, B]^T as one product in FP8: B under the scale of W."""

    def forward(self, extended: Tensor) -> Tensor:
        _, scale = self.rounded(extended)
        return fp8.product(extended, (self.weight(extended).float() / scale).to(fp8.E4M3), scale)


VARIANTS: dict[str, tuple[dict[str, Any], type[ProjectionPass] | None]] = {
    "bfloat16": (PLAIN, None),
    "bfloat16, own layers": ({"fused_layers": False}, None),
    "FP8": (FP8, None),
    "FP8 forward": (FP8, ForwardOnly),
    "FP8, adapter inside": (FP8, Inside),
}


def trainer_of(args: argparse.Namespace, given: dict[str, Any], kind: type[ProjectionPass] | None) -> DPOTrainer:
    dtype = "bfloat16" if given.get("bf16", True) else "float32"
    config = DPOConfig(
        output_dir=tempfile.mkdtemp(), max_steps=args.steps, per_device_train_batch_size=args.pairs, beta=0.5,
        learning_rate=args.rate, lr_scheduler_type="constant", gradient_checkpointing=False, use_cpu=DEVICE == "cpu",
        model_init_kwargs={"dtype": dtype}, report_to="none", save_strategy="no", disable_tqdm=True, logging_steps=1,
        per_device_eval_batch_size=args.pairs, **given,
    )  # fmt: skip
    train = read_rows(quickstart.train_file()).select(range(args.steps * args.pairs))
    test = read_rows(quickstart.test_file()).select(range(8 * args.pairs))
    trainer = DPOTrainer(args.model, args=config, train_dataset=train, eval_dataset=test)
    if kind is not None:
        for projection in (p for layer in trainer.forward_plan.fused.parts.layers for p in layer.projections):
            projection.kind = kind
    return trainer


def scored(trainer: DPOTrainer, state: dict[str, Tensor], pairs: int) -> dict[str, Tensor]:
    """Log-probs of tokens, margins and all gradients of held-out pairs under an adapter."""
    trainer.model.load_state_dict(state, strict=False)
    fields = trainer.collate([trainer.eval_dataset[i] for i in range(pairs)])
    batch = PackedBatch(**{k: v for k, v in fields.items() if k != "coupled"}).to(trainer.args.device)
    policy, reference = trainer.policy_logps(batch), trainer.reference.logps(batch)
    ratio_C = policy.logps_C - reference.logps_C
    margins = ratio_C[::2] - ratio_C[1::2]
    (-logsigmoid(0.5 * margins).mean()).backward()
    grads = torch.cat([p.grad.flatten() for p in trainer.model.parameters() if p.grad is not None])
    return {"tokens": policy.token_logps_N.detach(), "margins": margins.detach(), "grads": grads}


def errors(found: dict[str, Tensor], exact: dict[str, Tensor]) -> dict[str, float]:
    """Of log-probs and margins in nats, root mean square; of gradients relative to their norm, and their cosine."""
    off = {key: float((found[key] - exact[key]).double().square().mean().sqrt()) for key in ("tokens", "margins")}
    grads, given = exact["grads"], found["grads"]
    return off | {
        "margins_exact": float(exact["margins"].double().square().mean().sqrt()),
        "grads_cosine": float(torch.cosine_similarity(given, grads, dim=0)),
        "grads": float((given - grads).norm() / grads.norm()),
    }


def run(trainer: DPOTrainer) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Margins, held-out figures and seconds of a run, and its adapter."""
    started = time.time()
    trainer.train()
    seconds = round(time.time() - started, 1)
    margins = [entry["rewards/margins"] for entry in trainer.state.log_history if "rewards/margins" in entry]
    state = {k: v.detach().clone() for k, v in trainer.model.state_dict().items() if "lora_" in k}
    return {"margins": margins, "held_out": held_out(trainer), "seconds": seconds}, state


def held_out(trainer: DPOTrainer) -> dict[str, float]:
    found = trainer.evaluate()
    return {key: found[f"eval_{key}"] for key in ("loss", "rewards/margins", "rewards/accuracies")}


def products() -> dict[str, float]:
    """Microseconds of one product, by its shape."""
    found = {}
    for name, outputs in (("qkv", [4096, 1024, 1024]), ("gate_up", [14336, 14336])):
        projection = Projection([bnb.nn.Linear4bit(4096, n, bias=False, quant_type="nf4").cuda() for n in outputs])
        for kind in (ProjectionPass, fp8.FP8Pass):
            for which, columns in (("forward", 4096), ("backward", sum(outputs))):
                given = torch.randn(8192, columns, device="cuda", dtype=torch.bfloat16)
                start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                for i in range(13):
                    if i == 3:
                        start.record()
                    getattr(kind(projection), which)(given)
                end.record()
                end.synchronize()
                found[f"{name}, {kind.__name__} {which}"] = start.elapsed_time(end) * 100
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=quickstart.model_path())
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--pairs", type=int, default=4)
    parser.add_argument("--rate", type=float, default=5e-4)
    args, states = parser.parse_args(), {}
    options = {k: v for k, v in vars(args).items() if k != "model"}
    case: dict[str, Any] = {"options": options, "versions": framework_versions(), "runs": {}, "errors": {}}
    for name in ("bfloat16", "bfloat16, own layers", "FP8"):
        case["runs"][name], states[name] = run(trainer_of(args, *VARIANTS[name]))
        plain, own = (torch.tensor(case["runs"][n]["margins"], dtype=torch.float64) for n in ("bfloat16", name))
        case["runs"][name]["apart"] = float((own - plain).norm() / plain.norm())
        write(args.model, case)
    exact = scored(trainer_of(args, EXACT, None), states["bfloat16"], 2 * args.pairs)
    for name, variant in VARIANTS.items():
        trainer = trainer_of(args, *variant)
        case["errors"][name] = errors(scored(trainer, states["bfloat16"], 2 * args.pairs), exact)
        if name == "bfloat16":  # as an adapter that FP8 trained is served
            trainer.model.load_state_dict(states["FP8"], strict=False)
            case["runs"]["FP8"]["held_out_in_bfloat16"] = held_out(trainer)
        write(args.model, case)


def write(model: str, case: dict[str, Any]) -> None:
    found = json.loads(RESULT.read_text()) if RESULT.exists() else {}
    found["bundled" if model == quickstart.model_path() else Path(model).resolve().name] = case
    if DEVICE == "cuda" and "products" not in found:
        found["products"] = products()
    RESULT.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
