"""What both tests of this folder share: a plain adapter of PEFT's on the tiny model."""

from collections.abc import Callable
from typing import Any

import pytest
from reward_helpers import plain_adapter


@pytest.fixture(scope="session")
def make_adapter(
    base_folder: str, make_tokenizer: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., str]:
    """`make_adapter(seed=3, **lora)`: an adapter without a record of ours, whose weights act."""

    def make(seed: int = 3, **options: Any) -> str:
        return plain_adapter(base_folder, make_tokenizer(), tmp_path_factory.mktemp("plain"), seed, **options)

    return make


@pytest.fixture(scope="session")
def adapter(make_adapter: Callable[..., str]) -> str:
    return make_adapter()
