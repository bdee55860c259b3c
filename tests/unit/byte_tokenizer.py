"""The smallest tokenizer that the data path can work with."""

from collections.abc import Sequence

import numpy as np


class ByteTokenizer:
    """One token per byte, <|bos|> is 256."""

    bos_id = 256
    vocab_size = 257
    fingerprint = "bytes"

    def encode_batch(
        self, texts: Sequence[str], num_threads: int = 1, prepend_bos: bool = False
    ) -> tuple[np.ndarray, np.ndarray]:
        encoded = [[self.bos_id] * prepend_bos + list(text.encode()) for text in texts]
        offsets = np.cumsum([0] + [len(e) for e in encoded]).astype(np.int64)
        return np.array([t for e in encoded for t in e], dtype=np.int32), offsets
