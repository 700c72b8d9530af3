"""What the terminal says by itself, in both languages, the chat's notices among it."""

from moss_jt.chat.events import Notice
from moss_jt.chat.language import Language

TEXTS: dict[str, tuple[str, str]] = {
    "greeting": (
        "{model} is ready. Type a message; clear forgets the conversation, stop leaves, /help lists every command.",
        "{model} 已就绪，直接输入即可开始对话。输入 clear 清空对话，stop 退出，/help 查看全部命令。",
    ),
    "plugins_hint": (
        "No plugins are on; /plugins lists them and switches them on.",
        "插件未开启；输入 /plugins 查看并开启。",
    ),
    "plugins_on": ("Plugins: {names}.", "已开启插件：{names}。"),
    "plugins_list": (
        "{marks}\n/plugins NAME switches a plugin on or off.",
        "{marks}\n输入 /plugins 名称 可开关插件。",
    ),
    "help": (
        "  clear, /clear      forget the conversation\n"
        "  stop, /exit, /quit end (or Ctrl-D)\n"
        "  /retry             another answer to the last message\n"
        "  /set [NAME VALUE]  list the settings, or change one: /set temperature 0.3\n"
        "  /system [FILE]     use a text file as the meta instruction; without FILE, MOSS's own again\n"
        "  /plugins [NAMES]   list plugins, or switch some on or off\n"
        "  /thoughts [on|off] show inner thoughts, or hide them\n"
        "  /save NAME         give the conversation a name; moss-jt chat --resume NAME goes on with it\n"
        "  /chats             list the conversations that are kept\n"
        "  /help              this list\n"
        "  Ctrl-C             end the answer and keep the conversation\n"
        "  Alt-Enter          a new line in a message",
        "  clear, /clear      清空对话\n"
        "  stop, /exit, /quit 退出（或按 Ctrl-D）\n"
        "  /retry             重新回答上一条消息\n"
        "  /set [名称 值]     列出设置，或修改其中一项：/set temperature 0.3\n"
        "  /system [文件]     用文本文件的内容作元指令；不写文件则恢复 MOSS 自己的\n"
        "  /plugins [名称]    列出插件，或开关其中几个\n"
        "  /thoughts [on|off] 显示或隐藏内心想法\n"
        "  /save 名称         以此名称保存对话，之后可用 moss-jt chat --resume 名称 继续\n"
        "  /chats             列出已保存的对话\n"
        "  /help              本说明\n"
        "  Ctrl-C             中止回答，保留对话\n"
        "  Alt-Enter          在消息中换行",
    ),
    "cleared": ("The conversation is forgotten.", "对话已清空。"),
    "thoughts_on": ("Inner thoughts are shown.", "已显示内心想法。"),
    "thoughts_off": ("Inner thoughts are hidden.", "已隐藏内心想法。"),
    "unknown": (
        "There is no command {word}; /help lists them.",
        "没有 {word} 这个命令，输入 /help 查看全部命令。",
    ),
    "unknown_meant": (
        "There is no command {word}; did you mean {meant}? /help lists them all.",
        "没有 {word} 这个命令，是不是想用 {meant}？输入 /help 查看全部命令。",
    ),
    "takes_nothing": (
        "{word} is a command of its own: type nothing after it.",
        "{word} 是单独的命令，后面不用加任何内容。",
    ),
    "set_usage": (
        "Type /set NAME VALUE to change a setting, or /set to list them.",
        "修改设置请输入 /set 名称 值，查看设置请输入 /set。",
    ),
    "leave": ("Type stop, or press Ctrl-D, to leave.", "输入 stop 或按 Ctrl-D 退出。"),
    "bye": ("Goodbye!", "再见！"),
    "stopped": ("Stopped.", "已停止。"),
    "dropped": (
        "The conversation has reached the end of the context: its {turns} oldest turns are forgotten.",
        "对话已达上下文上限，最早的 {turns} 轮已丢弃。",
    ),
    "dropped_one": (
        "The conversation has reached the end of the context: its oldest turn is forgotten.",
        "对话已达上下文上限，最早的一轮已丢弃。",
    ),
    "cut": (
        "The answer was cut at {tokens} tokens. Ask MOSS to go on, or raise --max-new-tokens.",
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
    "not_kept": (
        "The conversation is not kept on the disk any more: {reason}",
        "对话未能保存到磁盘：{reason}",
    ),
    "keeps_none": (
        "This conversation is not being saved: it belongs to the demo, --no-keep was given, or there is no folder for it.",
        "本次对话不会保存：这是演示，或使用了 --no-keep，或没有可用的文件夹。",
    ),
    "save_what": ("Give it a name: /save NAME", "请给出名称：/save 名称"),
    "no_name": (
        'A conversation cannot be called {name}: a name begins with no dot, dash or space, has none of / \\ : * ? " < > |, and '
        "is not too long.",
        '对话不能叫 {name}：名称不能以点、短横线或空格开头，不能含有 / \\ : * ? " < > |，也不能太长。',
    ),
    "name_taken": (
        "There is a conversation called {name} already; moss-jt rm {name} removes it.",
        "已有名为 {name} 的对话；可用 moss-jt rm {name} 删除它。",
    ),
    "saved": (
        "The conversation is kept as {name}; moss-jt chat --resume {name} goes on with it.",
        "对话已保存为 {name}；用 moss-jt chat --resume {name} 可继续。",
    ),
    "chats": (
        "{lines}\nmoss-jt chat --resume NAME goes on with one.",
        "{lines}\n用 moss-jt chat --resume 名称 继续其中一个。",
    ),
    "no_chats": ("No conversation is kept yet.", "还没有保存的对话。"),
    "chat_turns": ("{turns} turns", "{turns} 轮"),
    "chat_turn": ("1 turn", "1 轮"),
    "resumed": (
        "The conversation goes on; it has {turns} turns, the last one:",
        "继续之前的对话（共 {turns} 轮），最后一轮：",
    ),
    "resumed_one": ("The conversation goes on; it has one turn:", "继续之前的对话（共 1 轮）："),
    "chat_damaged": (
        "{lines} damaged lines of the conversation {name} are left out.",
        "对话 {name} 中有 {lines} 行已损坏，已略过。",
    ),
    "chat_damaged_one": (
        "One damaged line of the conversation {name} is left out.",
        "对话 {name} 中有 1 行已损坏，已略过。",
    ),
    "chat_dropped": (
        "Its {turns} oldest turns have no room in the context; MOSS does not know them any more.",
        "最早的 {turns} 轮放不进上下文，MOSS 已不再记得。",
    ),
    "chat_dropped_one": (
        "Its oldest turn has no room in the context; MOSS does not know it any more.",
        "最早的一轮放不进上下文，MOSS 已不再记得。",
    ),
    "plugin_left_out": (
        "The plugin {name} of this conversation is not switched on: {reason}",
        "未能开启该对话用过的插件 {name}：{reason}",
    ),
    "no_result": ("no result", "没有结果"),
    "colon": (": ", "："),
    "reading": (
        "reading {tokens} tokens: {percent} %, {left} s left",
        "正在预填充 {tokens} 个词元：{percent} %，还需 {left} 秒",
    ),
    "reading_and_loading": (
        "reading {tokens} tokens: {percent} %, the model is loaded to {loaded} %, {left} s left",
        "正在预填充 {tokens} 个词元：{percent} %，模型已加载 {loaded} %，还需 {left} 秒",
    ),
    "cost": (
        "{read} tokens read and {new} written in {seconds} s",
        "输入 {read} 个词元，生成 {new} 个，用时 {seconds} 秒",
    ),
    "speed": ("; written at {speed} tokens/s", "；生成速度 {speed} 词元/秒"),
    "comma": (", ", "、"),
    "retry_greedy": (
        "At temperature 0 MOSS gives the same answer again; /set temperature 0.7 lets it vary.",
        "温度为 0 时回答不会变；可以先用 /set temperature 0.7 让回答有所变化。",
    ),
    "nothing_to_retry": ("Nothing was asked yet.", "还没有提过问题。"),
    "settings": (
        "{lines}\n/set NAME VALUE changes one. seed may be random, and repetition_penalty default: {penalty}, 1 when greedy.",
        "{lines}\n用 /set 名称 值 修改。seed 可设为 random，repetition_penalty 可设为 default（{penalty}，贪心解码时为 1）。",
    ),
    "set": ("{name} is {value} from now on.", "{name} 已设为 {value}。"),
    "not_set": ("{name} cannot be {value}: it must be {wanted}.", "{name} 不能设为 {value}：应为{wanted}。"),
    "no_setting": (
        "There is no setting {name}; /set lists them.",
        "没有 {name} 这个设置，输入 /set 查看全部设置。",
    ),
    "no_setting_meant": (
        "There is no setting {name}; did you mean {meant}? /set lists them all.",
        "没有 {name} 这个设置，是不是想用 {meant}？输入 /set 查看全部设置。",
    ),
    "wanted_temperature": ("0 (greedy) or more", "不小于 0 的数（0 为贪心解码）"),
    "wanted_top_k": ("a whole number, 0 (all tokens) or more", "不小于 0 的整数（0 表示不限）"),
    "wanted_top_p": ("above 0 and at most 1", "大于 0 且不大于 1 的数"),
    "wanted_repetition_penalty": ("above 0 (1 for none)", "大于 0 的数（1 表示不惩罚）"),
    "wanted_seed": ("a whole number, 0 or more", "不小于 0 的整数"),
    "wanted_max_new_tokens": ("a whole number, 1 or more", "不小于 1 的整数"),
    "system_set": ("The meta instruction is {path}'s from now on.", "元指令已换成 {path} 的内容。"),
    "system_own": ("The meta instruction is MOSS's own again.", "已恢复 MOSS 自己的元指令。"),
    "system_failed": (
        "{path} cannot be read as UTF-8 text: {reason}",
        "无法把 {path} 读作 UTF-8 文本：{reason}",
    ),
    "file_missing": ("there is no such file.", "没有这个文件。"),
    "file_unreadable": ("it may not be read, or it is not a file.", "没有读取权限，或者不是普通文件。"),
    "file_no_text": ("it holds something else.", "内容不是 UTF-8 文本。"),
    "file_too_long": ("it is longer than {limit} KiB.", "它超过 {limit} KiB。"),
    "picture": ("picture: {path}", "图片：{path}"),
    "converted": ("{path} has been converted ({seconds} s).", "{path} 已转换（{seconds} 秒）。"),
    "loaded": (
        "Loaded ({seconds} s). A short conversation, greedy, with all four plugins. This MOSS has two million parameters: "
        "it calls plugins well, but repeats badly what a search finds.",
        "已加载（{seconds} 秒）。下面是一段简短的对话（贪心解码，四个插件全开）。"
        "这个 MOSS 只有两百万参数：会调用插件，但复述搜索结果很差。",
    ),
    "failed": ("The demonstration failed:", "演示失败："),
    "your_turn": ("Your turn: the same conversation goes on.", "轮到你了：接着上面的对话继续聊吧。"),
    "page": (
        "The same in a browser: moss-jt serve moss-tiny, then open http://127.0.0.1:8000.",
        "也可以用浏览器：运行 moss-jt serve moss-tiny，然后打开 http://127.0.0.1:8000。",
    ),
}


def say(code: str, language: Language, **values: str | int) -> str:
    """A text by name, filled in."""
    english, chinese = TEXTS[code]
    return (chinese if language == "zh" else english).format(**values)


def notice_text(notice: Notice, language: Language) -> str:
    """A chat's notice in words."""
    one = notice.code == "dropped" and notice.values["turns"] == 1
    return say("dropped_one" if one else notice.code, language, **notice.values)
