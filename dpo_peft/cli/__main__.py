"""`python -m dpo_peft.cli` is `dpo-peft`."""

import sys

from .train import main

sys.exit(main())
