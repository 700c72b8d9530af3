"""The two languages that MOSS speaks, and which one to speak to a user."""

import os
import re
from collections.abc import Mapping
from typing import Literal

Language = Literal["en", "zh"]

IDEOGRAPH = re.compile("[\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]")
LETTER = re.compile("[A-Za-z]")


def user_language(environment: Mapping[str, str] = os.environ) -> Language:
    """By the locale's variables, the strongest first."""
    for name in ("LC_ALL", "LC_MESSAGES", "LANG"):
        if value := environment.get(name):
            return "zh" if value.lower().startswith("zh") else "en"
    return "en"


def language_of(text: str, otherwise: Language) -> Language:
    """Chinese where a Chinese character occurs, English where a letter does."""
    if IDEOGRAPH.search(text):
        return "zh"
    return "en" if LETTER.search(text) else otherwise
