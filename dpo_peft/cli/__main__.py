"""`python -m dpo_peft.cli` is `dpo-peft`."""

import sys

from . import main

sys.exit(main())
