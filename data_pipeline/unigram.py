"""The baseline that a language model has to beat: bits per byte of the token unigram model.

Its probabilities are the train split's token counts with add-one smoothing; it is measured over exactly the labels of
the held-out rows, so its number can be printed beside the model's.
"""

import numpy as np

from conf.refusal import BadRequest
from data_pipeline.packing import IGNORE, RowView


def unigram_bits_per_byte(view: RowView, counts: np.ndarray, token_bytes: np.ndarray, max_rows: int) -> float:
    """Bits per byte of text on the first `max_rows` rows of `view`; raises ValueError when there are none."""
    rows = min(view.num_rows, max_rows)
    if rows == 0:
        raise BadRequest(
            f"data.heldout_fraction: no held-out row of {view.row_tokens} tokens\nraise data.heldout_fraction"
        )
    bits_of = np.log2(counts.sum() + len(counts)) - np.log2(counts + 1.0)
    seen = np.zeros(len(counts), np.int64)
    for i in range(rows):
        _, labels, _ = view.example(i)
        seen += np.bincount(labels[labels != IGNORE], minlength=len(counts))
    return float((seen * bits_of).sum() / (seen * token_bytes).sum())
