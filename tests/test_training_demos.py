"""The example of training: a habit that moss-tiny learns."""

from pathlib import Path

import pytest

from moss_jt.demos import teach_copying


@pytest.mark.long
def test_moss_tiny_learns_to_copy_what_a_search_found(tmp_path: Path) -> None:
    before, after = teach_copying.main([str(tmp_path)])
    assert after > before
