"""DPO over LoRA on a 4-bit base, from any model and preference dataset: a TRL script with another import.

Needs:    pip install "dpo-peft[trl]"
GPU:      one of 24 GB for 8B
Peak:     from 8.01 GiB with every layer checkpointed, up to what the card has; predicted by `dpo-peft plan
          --model_name_or_path Qwen/Qwen3-8B --per_device_train_batch_size 4 --gradient_accumulation_steps 4`
Time:     not measured; recipes/dpo_qlora_8b.yaml is faster, as it packs micro-batches by tokens
Command:  python recipes/dpo_qlora.py \
              --model_name_or_path Qwen/Qwen3-8B --dataset_name trl-lib/ultrafeedback_binarized \
              --load_in_4bit --use_bnb_nested_quant --dtype bfloat16 \
              --use_peft --lora_r 16 --lora_alpha 32 --lora_target_modules all-linear \
              --per_device_train_batch_size 4 --gradient_accumulation_steps 4 --learning_rate 5e-6 \
              --num_train_epochs 1 --output_dir outputs/qwen3-8b-dpo
Expected: loss from 0.693 down and rewards/margins from 0 up. The trained model's own figures were not measured here
"""

from datasets import load_dataset
from trl import ModelConfig, ScriptArguments, TrlParser, get_peft_config, get_quantization_config

from dpo_peft import DPOConfig, DPOTrainer  # the only line that differs from a script for TRL's trainer


def main() -> None:
    parser = TrlParser((ScriptArguments, DPOConfig, ModelConfig))
    script_args, training_args, model_args = parser.parse_args_and_config()

    dataset = load_dataset(script_args.dataset_name, name=script_args.dataset_config)
    evaluate = training_args.eval_strategy != "no"
    trainer = DPOTrainer(
        model=model_args.model_name_or_path,
        args=training_args,
        train_dataset=dataset[script_args.dataset_train_split],
        eval_dataset=dataset[script_args.dataset_test_split] if evaluate else None,
        quantization_config=get_quantization_config(model_args),
        peft_config=get_peft_config(model_args),
    )
    trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)
    if evaluate:
        trainer.evaluate()
    trainer.save_model(training_args.output_dir)
    if training_args.push_to_hub:
        trainer.push_to_hub(dataset_name=script_args.dataset_name)


if __name__ == "__main__":
    main()
