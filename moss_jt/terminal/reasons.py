"""Why a call has no result, in the chat's language: our own plugins' reasons in Chinese, others' as they are."""

import re

from moss_jt.chat.language import Language

# What moss_jt.plugins says, and how it reads in Chinese. Of an exception's name before it nothing is lost.
CHINESE: tuple[tuple[str, str], ...] = (
    (r"nothing was found", "什么也没找到"),
    (r"there is no function (.*), or it is switched off", r"没有 \1 这个函数，或者它没有开启"),
    (r"it took longer than (\S+) s", r"用时超过 \1 秒"),
    (r"the turn's time is over", "本轮时间已用完"),
    (r"too many earlier calls have not ended yet", "之前有太多调用还没有结束"),
    (r"the plugin cannot be called: (.*)", r"无法调用该插件：\1"),
    (r"the solver has ended", "求解器已退出"),
    (r"the solver takes too long", "求解时间过长"),
    (r"the expression is empty or too long", "表达式为空或过长"),
    (r"the result is no number", "结果不是数"),
    (r"the number is too large", "数太大"),
    (r"the number is not finite", "结果不是有限的数"),
    (r"the power is too (?:large|small)", "乘方的结果超出范围"),
    (r"the argument is too large", "参数太大"),
    (r"division by zero|float division by zero|integer modulo by zero", "除数为零"),
    (r"math domain error", "超出函数的定义域"),
    (r"the answer takes too long", "对方回应过慢"),
    (r"the answer has more than (\d+) bytes", r"回应超过 \1 字节"),
    (r"the server sent neither a PNG nor a JPEG picture", "服务器返回的既不是 PNG 也不是 JPEG 图片"),
    (r"the picture is no base64", "图片不是有效的 base64"),
    (r".*Connection refused.*", "连接被拒绝"),
    (r".*(?:Name or service not known|Temporary failure in name resolution).*", "无法解析主机名"),
    (r".*timed out.*", "连接超时"),
    (r"HTTP Error (\d+).*", r"服务器返回错误 \1"),
)


def reason(failure: str, language: Language) -> str:
    """A Result's failure as it is shown."""
    if language == "en":
        return failure
    text = re.sub(r"^(?:\w+(?:Error|Exception)): ", "", failure)
    for english, chinese in CHINESE:
        if match := re.fullmatch(english, text):
            return match.expand(chinese)
    return failure
