"""Citations become [1], in whole texts and however a text is cut into pieces."""

import pytest

from moss_jt.chat.citation_reader import CitationReader

TEXTS = [
    ("The Moon<sup><|1|></sup>.", "The Moon[1].", [1]),
    ("a<sup><|1|><|3|></sup> b", "a[1][3] b", [1, 3]),
    ("bare <|2|> one", "bare [2] one", [2]),
    ("a<sup><|1|></sup><sup><|2|></sup>", "a[1][2]", [1, 2]),
    ("broken <sup><|1|> half", "broken [1] half", [1]),
    ("other <|1|></sup>", "other [1]", [1]),
    ("x<sup>2</sup> stays", "x<sup>2</sup> stays", []),
    ("a < b <| c <|x|> <|1 <sup", "a < b <| c <|x|> <|1 <sup", []),
    ("twice <|1|> and <|1|>", "twice [1] and [1]", [1]),
    ("<|1234|>", "<|1234|>", []),
    ("", "", []),
]


@pytest.mark.parametrize(("text", "shown", "cited"), TEXTS)
@pytest.mark.parametrize("step", [1, 2, 3, 5, 100])
def test_citations_are_rendered_whatever_the_pieces(
    text: str, shown: str, cited: list[int], step: int
) -> None:
    reader = CitationReader()
    pieces = [reader.push(text[at : at + step]) for at in range(0, len(text), step)]
    assert "".join(pieces) + reader.finish() == shown
    assert reader.cited == cited


def test_text_that_cannot_become_a_citation_is_not_held_back() -> None:
    reader = CitationReader()
    assert reader.push("a < b") == "a < b"
    assert reader.push(" <su") == " "
    assert reader.push("m>") == "<sum>"
