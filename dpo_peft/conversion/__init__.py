"""Config files of Axolotl and LLaMA-Factory as ours: every key of theirs is taken over, or named with the reason.

What their options are called here stands in names.yaml; the modules have what is more than a name.
"""

from pathlib import Path

import yaml

from ..errors import OptionError
from .axolotl import read_axolotl
from .llamafactory import read_llamafactory
from .made import Made

__all__ = ["convert"]


def convert(path: str) -> tuple[str, list[str]]:
    """Returns a config file for `dpo-peft train`, commented, and a line for each key that was not taken over.

    Args:
        path: a YAML file of Axolotl or LLaMA-Factory. For the latter, dataset_info.json is looked for where it says.

    Raises:
        OptionError: no such file, not one of theirs, or a training that is not one from preferences.
    """
    try:
        given = yaml.safe_load(Path(path).read_text("utf-8"))
    except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
        raise OptionError(f"from_file={path!r} can't be read: {error}") from error
    if not isinstance(given, dict):
        raise OptionError(f"from_file={path!r} must hold `option: value` lines.")
    given = {key: value for key, value in given.items() if value is not None}
    if "base_model" in given:
        made = Made("axolotl", given)
        read_axolotl(made)
    elif {"stage", "finetuning_type", "pref_loss", "dataset_dir"} & {*given}:
        made = Made("llamafactory", given)
        read_llamafactory(made, Path(path).parent)
    elif "model_name_or_path" in given:
        raise OptionError(f"from_file={path!r} is in TRL's terms, which are ours: dpo-peft train --config {path}")
    else:
        raise OptionError(
            f"from_file={path!r} is no config of Axolotl (base_model) or LLaMA-Factory (stage). Unsloth has no such "
            "file for preferences: the arguments of its scripts are TRL's, see docs/from-trl.md."
        )
    text = made.text(path)
    return text, made.notes
