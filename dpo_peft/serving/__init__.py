"""An adapter in other programs: written as they load it, and compared with the model that was trained."""

from ..merge.loaders import gguf_problems, max_lora_rank, serving_problems

__all__ = ["gguf_problems", "max_lora_rank", "serving_problems"]
