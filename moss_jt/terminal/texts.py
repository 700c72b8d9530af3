"""What the terminal says by itself, in both languages, the chat's notices among it."""

from moss_jt.chat.events import Notice
from moss_jt.chat.language import Language

TEXTS: dict[str, tuple[str, str]] = {
    "greeting": (
        "{model} is ready. Just type; clear forgets the conversation, stop ends it, /help tells the rest.",
        "{model} 已就绪，直接输入即可开始对话。输入 clear 忘掉对话，输入 stop 结束，/help 查看全部说明。",
    ),
    "plugins_hint": (
        "Plugins are off; /plugins lists them and switches them on.",
        "插件未开启；输入 /plugins 查看并开启。",
    ),
    "plugins_on": ("Plugins: {names}.", "已开启插件：{names}。"),
    "plugins_list": (
        "{marks}\n/plugins NAME switches a plugin on or off.",
        "{marks}\n输入 /plugins 名称 可开关插件。",
    ),
    "help": (
        "  clear, /clear      forget the conversation\n"
        "  stop, /stop        end (or Ctrl-D)\n"
        "  /plugins [NAMES]   list plugins, or switch some on or off\n"
        "  /thoughts          show inner thoughts, or hide them\n"
        "  /help              this list\n"
        "  Ctrl-C             end the answer and keep the conversation\n"
        "  Alt-Enter          a new line in a message",
        "  clear, /clear      忘掉对话\n"
        "  stop, /stop        结束（或 Ctrl-D）\n"
        "  /plugins [名称]    列出插件，或开关其中几个\n"
        "  /thoughts          显示或隐藏内心想法\n"
        "  /help              本说明\n"
        "  Ctrl-C             中止回答，保留对话\n"
        "  Alt-Enter          在消息中换行",
    ),
    "cleared": ("The conversation is forgotten.", "对话已清空。"),
    "thoughts_on": ("Inner thoughts are shown.", "显示内心想法。"),
    "thoughts_off": ("Inner thoughts are hidden.", "隐藏内心想法。"),
    "unknown": (
        "There is no command {word}; /help lists them.",
        "没有 {word} 这个命令，输入 /help 查看全部命令。",
    ),
    "leave": ("Type stop, or press Ctrl-D, to leave.", "输入 stop 或按 Ctrl-D 结束。"),
    "bye": ("Goodbye!", "再见！"),
    "stopped": ("Stopped.", "已停止。"),
    "dropped": (
        "The conversation has reached the end of the context: its {turns} oldest turns are forgotten.",
        "对话已到上下文末尾，最早的 {turns} 轮已被遗忘。",
    ),
    "dropped_one": (
        "The conversation has reached the end of the context: its oldest turn is forgotten.",
        "对话已到上下文末尾，最早的一轮已被遗忘。",
    ),
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
    "no_result": ("no result", "没有结果"),
    "picture": ("picture: {path}", "图片：{path}"),
    "converted": ("{path} is converted ({seconds} s).", "{path} 已转换（{seconds} 秒）。"),
    "loaded": (
        "Loaded ({seconds} s). A short conversation, greedy, with all four plugins. This MOSS has two million parameters: "
        "it calls plugins well, and repeats badly what a search finds.",
        "已加载（{seconds} 秒）。下面是一段简短的对话（贪心解码，四个插件全开）。"
        "这个 MOSS 只有两百万参数：会调用插件，但复述搜索结果很差。",
    ),
    "times": (
        "{first} s to the first word, {total} s in all; {read} tokens read, {new} written",
        "首字 {first} 秒，共 {total} 秒；读入 {read} 个词元，写出 {new} 个",
    ),
    "failed": ("The demonstration failed:", "演示失败："),
    "your_turn": ("Your turn: the same conversation goes on.", "轮到您了：对话继续。"),
}


def say(code: str, language: Language, **values: str | int) -> str:
    """A text by name, filled in."""
    english, chinese = TEXTS[code]
    return (chinese if language == "zh" else english).format(**values)


def notice_text(notice: Notice, language: Language) -> str:
    """A chat's notice in words."""
    one = notice.code == "dropped" and notice.values["turns"] == 1
    return say("dropped_one" if one else notice.code, language, **notice.values)
