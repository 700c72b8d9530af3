"""The example of training: a habit that moss-tiny learns."""

from pathlib import Path

import pytest

from moss_jt.demos import teach_sums


@pytest.mark.long
def test_moss_tiny_learns_a_habit(tmp_path: Path) -> None:
    before, after = teach_sums.main([str(tmp_path)])
    assert before == 0 and after > teach_sums.ASKED // 2
