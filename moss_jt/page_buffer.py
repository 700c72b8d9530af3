"""Page-aligned anonymous memory for weights: what a direct read can fill, and what no page cache can push out."""

import mmap

import numpy as np

from moss_jt.sizes import whole_pages


def page_buffer(n_bytes: int) -> np.ndarray:
    """Zeroed memory of ``n_bytes``, rounded up to whole pages, as uint8. It is freed with its last view.

    Huge pages where the system has them: a matrix of 450 MB touches a hundred thousand small ones.
    """
    memory = mmap.mmap(-1, whole_pages(n_bytes))
    memory.madvise(mmap.MADV_HUGEPAGE)
    return np.frombuffer(memory, dtype=np.uint8)
