"""Rebuild everything the quickstart ships: tokenizer, small language model, preference pairs.

GPU:       none; one thread of a 2-core Xeon with AVX512-BF16 and AMX; 2.2M parameters (4 layers, width 192, tied head
           of 2048 tokens); model/ 4.3 MiB, data/ 0.9 MiB
Peak:      1.7 GiB of the machine's memory
Time:      pretraining 345 s, pairs 240 s
Command:   python recipes/build_quickstart_model.py --output dpo_peft/quickstart
Expected:  1.012 nats per held-out token in NF4 (1.011 in fp32). The NF4 model is the quickstart's reference policy:
           its answers at temperature 1 have true reward -0.02 +- 0.58, all end by themselves, and 98.7 % of their word
           trigrams are known to the grammar (99.7 % for the grammar's own new text). 1243 training and 266 held-out
           pairs, reward gap 1.46 on average; the longer completion is the chosen one in 50.0 % and 47.4 % of them.

Steps: write chats with the grammar of `recipes/quickstart_grammar`, train a byte-level BPE and a small Llama on them,
load that model in NF4, sample several completions to each of many new prompts, and pair a good with a bad one by the
true reward. Held-out prompts ask about subjects that no training prompt names. Another machine rounds differently and
so samples other answers: the shipped files are one run's.

What did not work: 1400 steps of AdamW without the toned start (see `pretrain`) gave models as fluent (1.03 nats)
that did not know praise from blame. DPO on their pairs stayed at 0.70 held-out accuracy; here it reaches 0.99.
"""

import argparse
import itertools
import json
import math
import random
import statistics
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from quickstart_grammar.text import known_trigrams, write_chat, write_prompt
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from dpo_peft.quickstart.fluency import known_trigram_share
from dpo_peft.quickstart.reward import true_reward

VOCAB_SIZE = 2048
CANDIDATES = 6
MIN_GAP = 0.9  # in units of the reward; its standard deviation at the start is about 0.55
TONED_START = 0.4  # share of the steps
SPECIAL_TOKENS = ["<|pad|>", "<|im_start|>", "<|im_end|>"]
# A completion is exactly content + <|im_end|>, which is what a sampler returns; the newline belongs to the next turn.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if not loop.first %}{{ '\\n' }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '\\n<|im_start|>assistant\\n' }}{% endif %}"
)


def build_tokenizer(seed: int, chats: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE on grammar text: any text encodes, and the grammar's words are mostly one token."""
    tokenizer = Tokenizer(models.BPE())
    # Newlines stand alone, so no merge crosses the border between the template and the content.
    newline = pre_tokenizers.Split(Regex("\n"), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([newline, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    rng = random.Random(seed)
    lines = (message["content"] for _ in range(chats) for message in write_chat(rng))
    roles = ["system", "user", "assistant"] * 1000
    tokenizer.train_from_iterator(list(lines) + roles, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<|pad|>",
        eos_token="<|im_end|>",
        additional_special_tokens=["<|im_start|>"],
        chat_template=CHAT_TEMPLATE,
        model_max_length=512,
        clean_up_tokenization_spaces=False,
    )


def save_tokenizer(tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Save with a class name that transformers 4 and 5 both know."""
    tokenizer.save_pretrained(folder)
    file = folder / "tokenizer_config.json"
    config = json.loads(file.read_text())
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    file.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n")


def new_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """A 2M-parameter Llama. Every linear dimension is a multiple of 64, NF4's block size."""
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=3,
        num_key_value_heads=3,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
    )
    model = LlamaForCausalLM(config)
    model.generation_config = GenerationConfig(
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        max_new_tokens=120,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return model


def batches(
    tokenizer: PreTrainedTokenizerFast, rng: random.Random, size: int, toned: float = 0.5
) -> Iterator[dict[str, torch.Tensor]]:
    """Yield endless batches of fresh chats of similar length: input_ids, attention_mask and labels, (size, tokens)."""
    while True:
        chats = [tokenizer.apply_chat_template(write_chat(rng, toned), tokenize=False) for _ in range(size * 16)]
        rows = sorted(tokenizer(chats, add_special_tokens=False)["input_ids"], key=len)
        groups = [rows[start : start + size] for start in range(0, len(rows), size)]
        rng.shuffle(groups)
        for group in groups:
            batch = tokenizer.pad({"input_ids": group}, return_tensors="pt")
            yield {**batch, "labels": batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)}


def new_optimizers(model: PreTrainedModel) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the layers, AdamW for embedding and norms; learning rates are set per step."""
    inner = {name: p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name}
    outer = [p for name, p in model.named_parameters() if name not in inner]
    muon = torch.optim.Muon(list(inner.values()), lr=1.0, weight_decay=0.01, adjust_lr_fn="match_rms_adamw")
    return [muon, torch.optim.AdamW(outer, lr=1.0, betas=(0.9, 0.98), weight_decay=0.0)]


def pretrain(tokenizer: PreTrainedTokenizerFast, steps: int, seed: int, batch_size: int = 32) -> LlamaForCausalLM:
    """Next-token training on prompts and answers, cosine to zero, bf16 autocast.

    In the first part every request names a tone. Without this start the model writes just as fluently but does not
    learn in this time which words praise and which blame, and then no preference training generalizes.
    """
    torch.manual_seed(seed)
    model = new_model(tokenizer)
    optimizers = new_optimizers(model)
    toned = batches(tokenizer, random.Random(seed + 1), batch_size, toned=1.0)
    mixed = batches(tokenizer, random.Random(seed + 2), batch_size)
    peak, warmup, started = 3e-3, 100, time.time()
    for step in range(steps):
        rate = peak * min((step + 1) / warmup, 0.5 * (1 + math.cos(math.pi * step / steps)))
        for group in itertools.chain(*(optimizer.param_groups for optimizer in optimizers)):
            group["lr"] = rate
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(**next(toned if step < TONED_START * steps else mixed)).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
        model.zero_grad()
        if step % 100 == 0 or step == steps - 1:
            print(f"step {step:5d}  loss {loss.item():.4f}  {time.time() - started:6.0f} s", flush=True)
    return model


@torch.no_grad()
def held_out_loss(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, seed: int, count: int = 16) -> float:
    """Mean nats per token over `count` batches of 64 fresh chats."""
    source = batches(tokenizer, random.Random(seed + 1000), 64)
    return sum(model(**next(source)).loss.item() for _ in range(count)) / count


def load_4bit(folder: Path) -> PreTrainedModel:
    """The quickstart's reference policy: NF4 with double quantization, fp32 compute."""
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    model = AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=quantization, dtype=torch.float32, device_map="cpu"
    )
    for module in model.modules():
        # On a CPU with AVX512-BF16 bitsandbytes would repack the weights at the first eval forward and compute in bf16
        # from then on, so the same seed would give other samples on other machines.
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return model.eval()


@torch.no_grad()
def sample(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, prompts: list[str], batch_size: int = 256
) -> list[str | None]:
    """Sample one answer per prompt at temperature 1; None where it did not end within the limit."""
    answers: list[str | None] = []
    for start in range(0, len(prompts), batch_size):
        chats = [[{"role": "user", "content": prompt}] for prompt in prompts[start : start + batch_size]]
        texts = tokenizer.apply_chat_template(chats, tokenize=False, add_generation_prompt=True)
        batch = tokenizer(texts, padding=True, padding_side="left", add_special_tokens=False, return_tensors="pt")
        batch.pop("token_type_ids", None)
        output = model.generate(**batch)[:, batch["input_ids"].shape[1] :]
        for row in output.tolist():
            done = tokenizer.eos_token_id in row
            answers.append(tokenizer.decode(row[: row.index(tokenizer.eos_token_id)]) if done else None)
    return answers


def draw_prompts(count: int, rng: random.Random, excluded: set[str]) -> list[str]:
    """Draw `count` distinct prompts whose subjects are not in `excluded`, then add their subjects to it."""
    prompts: dict[str, str] = {}
    while len(prompts) < count:
        prompt, _, subject = write_prompt(rng)
        if subject not in excluded:
            prompts[prompt] = subject
    excluded |= set(prompts.values())
    return list(prompts)


def choose_pair(answers: list[str], lengths: list[int]) -> tuple[int, int] | None:
    """Pick (chosen, rejected) among one prompt's answers: a gap near the largest, and lengths as equal as can be.

    Equal lengths keep "prefer the longer" at chance, so held-out accuracy measures the task. None below `MIN_GAP`.
    """
    rewards = [true_reward(answer) for answer in answers]
    gaps = {(i, j): rewards[i] - rewards[j] for i in range(len(answers)) for j in range(len(answers))}
    widest = max(gaps.values(), default=0.0)
    if widest < MIN_GAP:
        return None
    wide = [pair for pair, gap in gaps.items() if gap >= max(MIN_GAP, 0.75 * widest)]
    return min(wide, key=lambda pair: (abs(lengths[pair[0]] - lengths[pair[1]]), -gaps[pair]))


def write_pairs(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, prompts: list[str], candidates: int, file: Path
) -> dict[str, float]:
    """Sample `candidates` answers per prompt, rank them by the true reward, write one pair a line. Returns figures."""
    answers = sample(model, tokenizer, [prompt for prompt in prompts for _ in range(candidates)])
    rows, longer, gaps = [], [], []
    for index, prompt in enumerate(prompts):
        group = [answer for answer in answers[index * candidates : (index + 1) * candidates] if answer]
        lengths = [len(tokenizer(answer, add_special_tokens=False)["input_ids"]) for answer in group]
        pair = choose_pair(group, lengths)
        if pair is None:
            continue
        row: dict[str, object] = {"prompt": [{"role": "user", "content": prompt}]}
        for name, answer in zip(("chosen", "rejected"), pair, strict=True):
            row[name] = [{"role": "assistant", "content": group[answer]}]
        for name, answer in zip(("chosen", "rejected"), pair, strict=True):
            row[f"{name}_reward"] = round(true_reward(group[answer]), 4)
        rows.append(json.dumps(row, ensure_ascii=False))
        gaps.append(true_reward(group[pair[0]]) - true_reward(group[pair[1]]))
        difference = lengths[pair[0]] - lengths[pair[1]]
        longer.append(0.5 if difference == 0 else float(difference > 0))
    if not rows:
        unfinished = sum(answer is None for answer in answers)
        raise SystemExit(
            f"No pairs in {len(answers)} answers, {unfinished} of which did not end. Where most did not end, train "
            "the model for more --steps; else give more prompts."
        )
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("\n".join(rows) + "\n", encoding="utf-8")
    rewards = [true_reward(answer) for answer in answers if answer]
    return {
        "pairs": len(rows),
        "unfinished answers": sum(answer is None for answer in answers),
        "sampled reward, mean": statistics.mean(rewards),
        "sampled reward, std": statistics.pstdev(rewards),
        "pair gap, mean": statistics.mean(gaps),
        "longer is chosen": statistics.mean(longer),
        "known trigrams": known_trigram_share([answer for answer in answers if answer][:2000]),
    }


def report(title: str, figures: dict[str, float]) -> None:
    print(f"{title}: " + ", ".join(f"{name} {value:.4g}" for name, value in figures.items()), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="gets model/, data/ and trigrams.txt")
    parser.add_argument("--steps", type=int, default=1000, help="pretraining steps of 32 chats")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1, help="CPU threads; the exact weights depend on it")
    parser.add_argument("--pairs_only", action="store_true", help="keep the model in --output, sample new pairs")
    parser.add_argument("--train_prompts", type=int, default=1400)
    parser.add_argument("--test_prompts", type=int, default=300)
    parser.add_argument("--tokenizer_chats", type=int, default=30_000, help="chats that the tokenizer is trained on")
    parser.add_argument("--eval_batches", type=int, default=16, help="batches of 64 chats to measure the model on")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    folder = args.output / "model"
    folder.mkdir(parents=True, exist_ok=True)
    (args.output / "trigrams.txt").write_text("\n".join(known_trigrams()) + "\n", encoding="utf-8")
    if not args.pairs_only:
        tokenizer = build_tokenizer(args.seed, args.tokenizer_chats)
        model = pretrain(tokenizer, args.steps, args.seed)
        nats = held_out_loss(model, tokenizer, args.seed, args.eval_batches)
        report("fp32 model", {"held-out nats per token": nats})
        model.to(torch.bfloat16).save_pretrained(folder)
        save_tokenizer(tokenizer, folder)
    tokenizer, model = AutoTokenizer.from_pretrained(folder), load_4bit(folder)
    nats = held_out_loss(model, tokenizer, args.seed, args.eval_batches)
    report("NF4 model", {"held-out nats per token": nats})
    torch.manual_seed(args.seed)
    rng, taken = random.Random(f"prompts {args.seed}"), set()
    for name, count in (("test", args.test_prompts), ("train", args.train_prompts)):
        prompts = draw_prompts(count, rng, taken)
        report(name, write_pairs(model, tokenizer, prompts, CANDIDATES, args.output / "data" / f"{name}.jsonl"))


if __name__ == "__main__":
    main()
