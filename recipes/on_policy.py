"""On-policy rounds on the bundled model: sample, judge, make pairs, train, and again from the adapter that came out.

GPU:      none
Peak:     0.8 GiB of the machine's memory
Time:     about 2 minutes of one CPU core
Command:  python recipes/on_policy.py [--rounds 3] [--method rso] [--reference base] [--output_dir FOLDER]
Expected: mean true reward of fresh answers to held-out prompts -0.06 (before), +0.44, +1.21, +1.70 (after 3 rounds),
          standard errors of 0.02 to 0.04; fluency 0.986 -> 0.933

Preference pairs age: what the model wrote before training is not what it writes now, and the reward's gradient is
where it writes now. So each round samples fresh answers to new prompts from the adapter of the round before, has them
judged (here by the bundled task's true reward; `dpo-peft pairs` takes any), and trains on the pairs of widest margin.

The reference of a round is the adapter as it came in (`reference="initial"`), not the bare base. The pairs were
sampled from that adapter, and DPO's reward is what the policy gains over its reference: a round then asks for
pi_0 exp(r / beta) of what it began with, and k rounds together for pi_0 exp(k r / beta). Against the base every round
asks for the same pi_0 exp(r / beta), so that later rounds only come nearer to it: --reference base, if the model must
stay within one KL budget. Each adapter records what it was trained against, so the choice has to be said here.
"""

import argparse
import json
import os
import statistics
import time
from collections.abc import Sequence
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Threads that wait by spinning make a step ten times slower as soon as anything else runs on the machine.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

from dpo_peft.cli.options import show_progress

show_progress()  # before torch is imported

from datasets import Dataset

from dpo_peft import DPOConfig, DPOTrainer, quickstart
from dpo_peft.cli.pairs import describe
from dpo_peft.data.prompts import encode_prompts, read_prompts
from dpo_peft.pairs import PairsOptions, make_pairs
from dpo_peft.pairs.building import seed_of
from dpo_peft.pairs.engines import ModelSource, Sampling, TransformersEngine

LONGEST = 120  # tokens of an answer


def main(argv: Sequence[str] | None = None) -> list[dict[str, float]]:
    """Run the rounds. Returns the figures of the base and of each round's adapter; they are in rounds.json too."""
    args = parse(argv)
    started, policy, folder = time.monotonic(), quickstart.model_path(), Path(args.output_dir)
    figures = [{"round": 0, **judge(policy, 0, args)}]
    print(f"base: {told(figures[0])}")
    for number in range(1, args.rounds + 1):
        adapter = folder / f"round-{number}"
        pairs = write_pairs(policy, number, args, adapter / "pairs.jsonl")
        train(policy, adapter, adapter / "pairs.jsonl", args)
        policy = str(adapter)
        figures.append({"round": number, **judge(policy, number, args), **pairs})
        print(f"round {number}: {told(figures[-1])}")
    (folder / "rounds.json").write_text(json.dumps(figures, indent=2) + "\n")
    print(f"{time.monotonic() - started:.0f} s. Adapters, pairs and rounds.json: {folder}")
    return figures


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="On-policy rounds on the bundled model.", formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=3, help="how often to sample and train")
    parser.add_argument("--prompts_per_round", type=int, default=64, help="new prompts for each round")
    parser.add_argument("--candidates", type=int, default=8, help="answers to each prompt")
    parser.add_argument("--method", default="all", choices=["best_worst", "all", "rso"], help="how pairs are made")
    parser.add_argument("--max_pairs", type=int, default=4, help="pairs of a prompt, with method all")
    parser.add_argument("--steps", type=int, default=-1, help="of training in a round; -1: one epoch")
    parser.add_argument("--beta", type=float, default=0.5, help="of DPO")
    parser.add_argument("--learning_rate", type=float, default=5e-4, help="of each round")
    parser.add_argument("--reference", default="initial", choices=["initial", "base"], help="of the later rounds")
    parser.add_argument("--held_out", type=int, default=256, help="fresh completions that judge each adapter")
    parser.add_argument("--seed", type=int, default=0, help="of everything")
    parser.add_argument("--output_dir", default="outputs/on_policy", help="gets a folder for each round")
    args = parser.parse_args(argv)
    available = len(Dataset.from_json(quickstart.train_file()))
    if args.rounds * args.prompts_per_round > available:
        parser.error(f"there are {available} prompts: lower --rounds or --prompts_per_round")
    return args


def write_pairs(policy: str, number: int, args: argparse.Namespace, output: Path) -> dict[str, float]:
    """Answers of `policy` to this round's prompts, as pairs. As `dpo-peft pairs POLICY --prompts ... --output ...`."""
    rows = Dataset.from_json(quickstart.train_file()).shuffle(seed=args.seed).select_columns(["prompt"])
    first = (number - 1) * args.prompts_per_round
    prompts = output.with_name("prompts.jsonl")
    prompts.parent.mkdir(parents=True, exist_ok=True)
    rows.select(range(first, first + args.prompts_per_round)).to_json(str(prompts))
    result = make_pairs(
        PairsOptions(
            model=policy,
            prompts=str(prompts),
            output=str(output),
            reward="dpo_peft.quickstart:review_reward",
            method=args.method,
            max_pairs=args.max_pairs if args.method == "all" else None,
            rso_accept=max(2, args.candidates // 2) if args.method == "rso" else PairsOptions.rso_accept,
            num_candidates=args.candidates,
            max_new_tokens=LONGEST,
            batch_size=128,
            dtype="float32" if number == 1 else None,  # an adapter knows how its base was loaded
            seed=seed_of(args.seed, number),
            overwrite=True,
        )
    )
    print(describe(result))
    return {"pairs": result["pairs"], "answers": result["reward"]["candidates"], "margin": result["reward"]["margin"]}


def train(policy: str, output: Path, pairs: Path, args: argparse.Namespace) -> None:
    """DPO from `policy`, a model or the adapter of the round before."""
    config = DPOConfig(
        output_dir=str(output),
        overwrite_output_dir=True,
        model_init_kwargs={"dtype": "float32"},
        reference=args.reference,
        beta=args.beta,
        learning_rate=args.learning_rate,
        max_steps=args.steps,
        num_train_epochs=1,
        per_device_train_batch_size=16,
        warmup_steps=2,
        max_length=256,
        logging_steps=5,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        seed=args.seed,
    )
    trainer = DPOTrainer(policy, args=config, train_dataset=Dataset.from_json(str(pairs)))
    trainer.train()
    trainer.save_model()


def judge(policy: str, after: int, args: argparse.Namespace) -> dict[str, float]:
    """True reward and fluency of fresh answers to held-out prompts, one to each, after so many rounds."""
    held_out = Dataset.from_json(quickstart.test_file()).select_columns(["prompt"])
    prompts, _ = read_prompts(held_out.select(range(min(args.held_out, len(held_out)))), "held-out prompts")
    source = ModelSource(policy, dtype="float32" if policy == quickstart.model_path() else None)
    engine = TransformersEngine.load(source, Sampling(LONGEST), batch_size=128)
    ids = encode_prompts(engine.tokenizer, prompts, "held-out prompts")
    seeds = [seed_of(args.seed, "held out", after, number) for number in range(len(ids))]
    texts = [sample.text for sample in engine(ids, seeds)]
    rewards = quickstart.review_reward(texts)
    return {
        "reward": statistics.mean(rewards),
        "standard_error": statistics.stdev(rewards) / len(rewards) ** 0.5,
        "fluency": quickstart.known_trigram_share(texts),
        "words": statistics.mean(len(text.split()) for text in texts),
    }


def told(figures: dict[str, float]) -> str:
    return (
        f"mean true reward {figures['reward']:+.2f} (standard error {figures['standard_error']:.2f}), fluency "
        f"{figures['fluency']:.3f}, {figures['words']:.0f} words"
    )


if __name__ == "__main__":
    main()
