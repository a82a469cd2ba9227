"""What somebody meant who wrote another name: a typing error, or what another tool calls it."""

import difflib
from collections.abc import Iterable

# What other tools call options, or people when they type from memory.
_ALSO_CALLED = {
    "model_name_or_path": "model base_model model_name model_id",
    "dataset_name": "dataset data data_path train_file dataset_path datasets_path",
    "eval_share": "val_set_size val_size eval_size validation_split test_size",
    "max_length": "cutoff_len sequence_len max_seq_length max_seq_len model_max_length",
    "sigmoid": "dpo",
    "loss_type": "loss pref_loss rl objective",
    "beta": "dpo_beta pref_beta rl_beta kl_coef",
    "learning_rate": "lr",
    "lr_scheduler_type": "lr_scheduler scheduler",
    "warmup_steps": "warmup warmup_ratio",
    "num_train_epochs": "epochs num_epochs",
    "max_steps": "steps iters",
    "per_device_train_batch_size": "batch_size micro_batch_size train_batch_size",
    "per_device_eval_batch_size": "eval_batch_size",
    "gradient_accumulation_steps": "grad_accum accumulation_steps",
    "optim": "optimizer",
    "lora_r": "lora_rank rank r lora_dim",
    "lora_alpha": "alpha",
    "lora_target_modules": "lora_target target_modules lora_modules",
    "lora_layers_to_transform": "layers_to_transform peft_layers_to_transform lora_layers",
    "quantize_base": "load_in_4bit quantization_bit quantize",
    "report_to": "wandb use_wandb",
    "resume_from_checkpoint": "resume auto_resume_from_checkpoints",
}
_MEANT = {name: option for option, names in _ALSO_CALLED.items() for name in names.split()}


def meant(given: object, known: Iterable[str]) -> str:
    """Returns " Did you mean '...'?" with the known name that somebody who wrote another one probably meant; "" if
    there is none near."""
    known = [*known]
    wanted = _MEANT.get(str(given), "")
    if wanted == "eval_share" and wanted not in known:
        wanted = "test_split_size"
    if wanted:
        close = [wanted] if wanted in known else []
    else:
        close = difflib.get_close_matches(str(given), known, n=1)
    return f" Did you mean {close[0]!r}?" if close else ""
