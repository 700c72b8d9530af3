"""The notices of a chat, in both languages."""

from moss_jt.chat.events import Notice
from moss_jt.chat.language import Language

TEXTS: dict[str, tuple[str, str]] = {
    "dropped": (
        "The conversation has reached the end of the context: its {turns} oldest turns are forgotten.",
        "对话已到上下文末尾，最早的 {turns} 轮已被遗忘。",
    ),
    "dropped_one": (
        "The conversation has reached the end of the context: its oldest turn is forgotten.",
        "对话已到上下文末尾，最早的一轮已被遗忘。",
    ),
    "stopped": ("Stopped.", "已停止。"),
    "cut": (
        "The answer was cut at {tokens} tokens. Ask MOSS to go on, or give --max-new-tokens a larger number.",
        "回答在 {tokens} 个词元处被截断。可以请 MOSS 继续，或增大 --max-new-tokens。",
    ),
    "full": (
        "The answer fills the context and ends here.",
        "回答已占满上下文，到此为止。",
    ),
    "empty": ("MOSS gave no answer.", "MOSS 没有作答。"),
    "too_long": (
        "The message has {tokens} tokens, and the context has room for {room}. Shorten it, or start with a larger --context "
        "where the model and the memory allow it.",
        "这条消息有 {tokens} 个词元，而上下文只能容纳 {room} 个。请缩短消息，或在模型和内存允许时增大 --context。",
    ),
    "results_cut": (
        "The results are longer than the context; MOSS reads the first part.",
        "结果超出上下文长度，MOSS 只读取前一部分。",
    ),
    "commands_cut": (
        "MOSS gave {commands} commands; only the first {limit} were run.",
        "MOSS 给出了 {commands} 条命令，只执行了前 {limit} 条。",
    ),
}


def notice(code: str, language: Language, **values: int) -> Notice:
    english, chinese = TEXTS[code]
    return Notice((chinese if language == "zh" else english).format(**values), code)
