"""How much memory training takes, and how to run a step within it, predicted from shapes.

from dpo_peft.planning import plan

plan(shape="8b", gpu="24GB", lora_r=64).figures["peak"]  # bytes
"""

from .gpus import of_size
from .memory import GIB, RESERVE, MemoryModel
from .run import Plan, PlanOptions, plan
from .shapes import PRESETS, Lora, Shape
from .sketch import Sketch
from .steps import checkpoints_for, layers_to_stream, plan_step

__all__ = ["GIB", "PRESETS", "RESERVE", "Lora", "MemoryModel", "Plan", "PlanOptions", "Shape", "Sketch"]
__all__ += ["checkpoints_for", "layers_to_stream", "of_size", "plan", "plan_step"]
