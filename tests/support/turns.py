"""Finished turns as they are kept."""

from moss_jt.chat.finished_turn import FinishedTurn


def turn_of(message: str, answer: str) -> FinishedTurn:
    middle = {
        "Inner Thoughts": "<|Inner Thoughts|>: None<eot>\n",
        "Commands": "<|Commands|>: None<eoc>\n",
        "Tool Responses": "<|Results|>: None<eor>\n",
    }
    return FinishedTurn(
        {"Human": f"<|Human|>: {message}<eoh>\n", **middle, "MOSS": f"<|MOSS|>: {answer}<eom>\n"}
    )
