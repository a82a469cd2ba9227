"""What a completion's log-probs depend on, as a key for a cache of them."""

import struct
from hashlib import blake2b

import numpy as np

from .layout import PackedBatch, kept_samples, scored_places

KEY_BYTES = 16
# Hashed into every key. Another number for another way to hash, so that stored keys of the old way are never found.
KEY_VERSION = 1


def content_keys(batch: PackedBatch) -> tuple[bytes, ...]:
    """Returns one 16-byte digest per completion of what its log-probs depend on, given the model.

    That is the ids of prompt + completion, which of them are predicted, and the prompt's images. Where the prompt ends
    counts by the predicted ones alone. Labels, row numbers, the other completions, the layout and the padding don't
    count.

    Raises:
        ValueError: the batch does not hold its samples.
    """
    keys = []
    for sample in kept_samples(batch):
        prompt = _little_endian(np.asarray(sample.prompt))
        for completion, places in scored_places(sample):
            tokens = len(sample.prompt) + len(completion)
            # The two counts come first, so that no two contents are one string of bytes.
            digest = blake2b(struct.pack("<3q", KEY_VERSION, tokens, len(places)), digest_size=KEY_BYTES)
            digest.update(prompt)
            digest.update(_little_endian(completion))
            digest.update(_little_endian(len(sample.prompt) + places))
            digest.update(sample.images.key if sample.images else b"")
            keys.append(digest.digest())
    return tuple(keys)


def _little_endian(numbers: np.ndarray) -> bytes:
    return numbers.astype("<i8").tobytes()
