"""Our reasons in the chat's language: the templates of moss_jt.errors.Reason in Chinese. What others' code says stays as it is."""

from moss_jt.chat.language import Language
from moss_jt.errors import Reason

CHINESE: dict[str, str] = {
    # plugins in general
    "nothing was found": "什么也没找到",
    "there is no function {name}, or it is switched off": "没有 {name} 这个函数，或者它没有开启",
    "it took longer than {seconds:g} s": "用时超过 {seconds:g} 秒",
    "the time for this turn is over": "本轮时间已用完",
    "too many earlier calls have not ended yet": "之前有太多调用还没有结束",
    "there is no plugin {name!r}; there are {known}. One of your own: ./FILE.py:CLASS.": (
        "没有 {name} 这个插件；可用的有 {known}。自己写的插件请写成 ./文件.py:类名。"
    ),
    "there is no plugin {name!r}; did you mean {meant}? There are {known}.": (
        "没有 {name} 这个插件，是不是想用 {meant}？可用的有 {known}。"
    ),
    "the plugin {name} cannot be loaded: {reason}": "插件 {name} 无法加载：{reason}",
    "name the class in it, too: {name}:CLASS": "还要写出其中的类名：{name}:类名",
    "{path} has no class {name}": "{path} 中没有 {name} 这个类",
    "the plugin {name} cannot be called: {fault}.": "插件 {name} 无法调用：{fault}。",
    "the plugin cannot be called: {fault}": "插件无法调用：{fault}",
    "{name} is missing": "缺少 {name}",
    "{name} cannot be read": "无法读取 {name}",
    "{name} is {type}, and must be text": "{name} 的类型是 {type}，应为文本",
    "timeout_s is {type}, and must be a number of seconds above 0": "timeout_s 的类型是 {type}，应为大于 0 的秒数",
    "style is not one of {styles}": "style 应为 {styles} 之一",
    "call is not a method": "call 不是方法",
    "the plugin answered with {type}, and must answer with an Outcome": "插件返回了 {type}，应返回 Outcome",
    "in the plugin's Outcome, {name} is {type}": "插件返回的 Outcome 中，{name} 的类型是 {type}",
    "in the plugin's Outcome, an item is {type}, or has no Source": (
        "插件返回的 Outcome 中，有一项的类型是 {type}，或者缺少 Source"
    ),
    "in the plugin's Outcome, an item holds something other than text": "插件返回的 Outcome 中，有一项含有非文本内容",
    # files and servers
    "there is no file {path}": "没有 {path} 这个文件",
    "no permission for {path}": "没有访问 {path} 的权限",
    "{path} cannot be read or written ({error})": "无法读写 {path}（{error}）",
    "{option} {address} is not an address; write it as http://host:port": (
        "{option} {address} 不是有效的地址，应写成 http://主机:端口"
    ),
    "the address is neither http nor https": "地址既不是 http 也不是 https",
    "the connection was refused; is the server running?": "连接被拒绝，请检查服务器是否已启动",
    "the server's name is unknown; check the address and the network": "无法解析服务器的域名，请检查地址和网络",
    "the server did not answer in time": "服务器没有及时回应",
    "the connection was broken off": "连接中断",
    "the server answered with error {code}": "服务器返回错误 {code}",
    "the server's answer is not JSON": "服务器返回的不是 JSON",
    "the answer takes too long": "服务器回应过慢",
    "the answer has more than {limit} bytes": "服务器的回应超过 {limit} 字节",
    # search and pictures
    "web search needs the package ddgs: pip install ddgs. Without it, start with --search-folder DIR to search your own text "
    "files, with --search-url and a SearXNG server's address, or with a Serper key in {key}.": (
        "网络搜索需要安装 ddgs：pip install ddgs。也可以在启动时用 --search-folder 指定文件夹，搜索自己的文本文件；"
        "用 --search-url 指定 SearXNG 服务器；或者在环境变量 {key} 中设置 Serper 的密钥。"
    ),
    "the search engines gave no answer ({error})": "搜索引擎没有给出结果（{error}）",
    "--search-folder {folder} is not a folder.": "--search-folder {folder} 不是文件夹。",
    "the index of {folder} cannot be written: {error}.": "无法写入 {folder} 的索引：{error}。",
    "Not all of {folder} is searched: {left_out}.": "{folder} 并未全部纳入搜索：{left_out}。",
    "files of more than {limit} MiB: {count}": "超过 {limit} MiB 的文件有 {count} 个",
    "nothing beyond {count:,} files or {limit} MiB": "超出 {count:,} 个文件或 {limit} MiB 的部分未读取",
    "{first}; {second}": "{first}；{second}",
    "text-to-image needs a server that draws: start with --image-url and the address of an Automatic1111 or OpenAI-compatible "
    "server.": "文生图需要绘图服务器：请在启动时用 --image-url 指定 Automatic1111 或兼容 OpenAI 接口的服务器地址。",
    "the server sent neither a PNG nor a JPEG picture": "服务器返回的既不是 PNG 也不是 JPEG 图片",
    "the picture is not valid base64": "图片不是有效的 base64",
    "there is no picture in the server's answer": "服务器的回应中没有图片",
    # arithmetic
    "these equations have no answer within the limits of time and memory": "在时间和内存限制内没有解出结果",
    "the expression is empty or too long": "表达式为空或过长",
    "the text is too long": "内容过长",
    "the result is not a number": "结果不是数",
    "the number is too large": "数太大",
    "the number is not finite": "结果不是有限的数",
    "the power is too large": "乘方的结果太大",
    "the power is too small": "乘方的结果太小",
    "the argument is too large": "参数太大",
    "that many digits are not there": "没有那么多位数字",
    "division by zero": "除数为零",
    "a function has no value for such a number": "超出函数的定义域",
    "{name} is a variable": "{name} 是变量，不是函数",
    "{name} is unknown": "不认识 {name}",
    "the function {name} is unknown": "不认识函数 {name}",
    "a number is cut off": "有一个数不完整",
    "a part before the last assigns nothing": "最后一段之前的某一段不是赋值",
    "more than {limit} absolute values": "绝对值超过 {limit} 个",
    "something is missing at the end": "末尾缺少内容",
    "an absolute value has no end": "绝对值符号没有闭合",
    "a bracket is not closed": "括号没有闭合",
    "it is nested too deeply": "嵌套过深",
    "{text!r} does not belong there": "{text!r} 的位置不对",
    "{text!r} stands where a number is needed": "{text!r} 处应为一个数",
    "absolute values can be read in two ways": "绝对值有两种读法",
    "a product can be read in two ways": "乘积有两种读法",
    "a quotient can be read in two ways": "除式有两种读法",
    "a power can be read in two ways": "乘方有两种读法",
    "a root can be read in two ways": "根式有两种读法",
    "a double factorial is something else": "不支持双阶乘",
    "how far {sign!r} reaches is not clear before {number!r}": "{number!r} 前的 {sign!r} 作用范围不明确",
    "{text!r} is not a name": "{text!r} 不能作名称",
    "{text!r} is part of a number": "{text!r} 是数的一部分",
    "{text!r} begins with a zero": "{text!r} 以 0 开头",
    "{text!r} is too large": "{text!r} 太大",
    "{text!r} is too small": "{text!r} 太小",
    "{text!r} can be read in two ways": "{text!r} 有两种读法",
    "{unit!r} has more than one meaning": "{unit!r} 不止一种含义",
    "its commas can be read in many ways": "其中的逗号有多种读法",
    "its commas can be read in two ways": "其中的逗号有两种读法",
    "a comma does not belong there": "逗号的位置不对",
    # the conversation
    "the context has room for {room} tokens, and the instruction that a conversation begins with takes {needed} with the "
    "shortest turn. Load the model with a larger context, shorten the instruction, or switch on fewer plugins.": (
        "上下文只能容纳 {room} 个词元，而元指令加上最短的一轮对话需要 {needed} 个。请增大上下文、缩短元指令，或少开几个插件。"
    ),
}


def in_language(text: object, language: Language) -> str:
    """A text, or what an error says, in that language where it is one of our reasons."""
    if isinstance(text, Exception):
        text = text.args[0] if text.args and isinstance(text.args[0], Reason) else str(text)
    if language == "en" or not isinstance(text, Reason) or text.template not in CHINESE:
        return str(text)
    return CHINESE[text.template].format(**{name: _in_chinese(value) for name, value in text.values.items()})


def _in_chinese(value: object) -> object:
    if isinstance(value, tuple):
        return "、".join(map(str, value))
    return in_language(value, "zh") if isinstance(value, Reason) else value
