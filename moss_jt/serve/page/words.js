// What the page says, in two languages.

// Of an answer that took no time worth telling, nobody wants the speed.
const slow = (timing) => timing.seconds >= 0.5 && timing.tokens_per_s;

const WORDS = {
  en: {
    skip: "To the message", newChat: "New chat", conversations: "Conversations", closeList: "Close the list",
    openList: "Open the list of conversations", settings: "Settings", turns: "Conversation", plugins: "Plugins",
    message: "Message to MOSS", send: "Send", stop: "Stop", system: "Who MOSS is (its own words when empty)", model: "Model",
    cancel: "Cancel", save: "Save", ok: "OK", key: "Key …", keyTitle: "Key of this server", theme: "Light or dark",
    rename: "Rename", remove: "Delete", removeTitle: "Delete this conversation?", copy: "Copy", copied: "Copied",
    retry: "Another answer", edit: "Edit and ask again", thoughts: "Inner thoughts", sources: "Sources",
    untitled: "New chat", empty: "Ask MOSS something.", loading: "The model is being loaded …",
    lost: "Connection lost. Trying again …", unreachable: "The server does not answer.", other: "中文",
    queue: (place, seconds) => `Place ${place} in the queue${seconds === null ? "" : `, at most ${seconds} s`}`,
    progress: (done, total, seconds) => `Reading: ${done} of ${total} tokens${seconds === null ? "" : `, about ${seconds} s left`}`, thinking: "MOSS is thinking …",
    timing: (e) => `${e.new_tokens} tokens` + (slow(e) ? ` in ${e.seconds.toFixed(1)} s, ${(1 / e.tokens_per_s).toPrecision(2)} s a token` : ""),
    noResult: "No result.", picture: "Picture that MOSS had drawn",
    damaged: (lines) => `${lines} lines of this conversation's file cannot be read and are left out.`,
    notices: {
      dropped: (e) => `The oldest ${e.turns} turns were forgotten: the context is full.`, stopped: () => "Stopped.",
      cut: (e) => `Cut after ${e.tokens} tokens.`, full: () => "The context is full.", empty: () => "MOSS said nothing.",
      results_cut: () => "The results were shortened.", not_kept: () => "This turn could not be kept on the disk.",
      commands_cut: (e) => `MOSS gave ${e.commands} commands; ${e.limit} were run.`,
    },
    fields: {
      temperature: "Temperature (0: always the likeliest token)", top_k: "Of the k likeliest tokens (0: all)",
      top_p: "Of the likeliest tokens that reach p together", repetition_penalty: "Repetition penalty (empty: MOSS's own)",
      max_new_tokens: "Most tokens of an answer", seed: "Seed (empty: another one each time)",
    },
    labels: {},
  },
  zh: {
    skip: "跳到输入框", newChat: "新对话", conversations: "对话列表", closeList: "关闭列表", openList: "打开对话列表",
    settings: "设置", turns: "对话", plugins: "插件", message: "给 MOSS 发消息", send: "发送", stop: "停止",
    system: "MOSS 的身份说明（留空则用默认）", model: "模型", cancel: "取消", save: "保存", ok: "确定", key: "密钥…",
    keyTitle: "服务器的访问密钥", theme: "浅色或深色", rename: "重命名", remove: "删除", removeTitle: "删除这个对话？",
    copy: "复制", copied: "已复制", retry: "重新回答", edit: "修改后重问", thoughts: "内心想法", sources: "来源",
    untitled: "新对话", empty: "向 MOSS 提个问题吧。", loading: "正在加载模型…", lost: "连接中断，正在重试…",
    unreachable: "服务器没有响应。", other: "English",
    queue: (place, seconds) => `排队第 ${place} 位${seconds === null ? "" : `，最多等 ${seconds} 秒`}`,
    progress: (done, total, seconds) =>
      `正在读入：${done} / ${total} 个词元${seconds === null ? "" : `，还需约 ${seconds} 秒`}`, thinking: "MOSS 正在思考…",
    timing: (e) => `${e.new_tokens} 个词元` + (slow(e) ? `，${e.seconds.toFixed(1)} 秒，${(1 / e.tokens_per_s).toPrecision(2)} 秒/词元` : ""),
    noResult: "没有结果。", picture: "MOSS 生成的图片",
    damaged: (lines) => `这个对话的文件有 ${lines} 行无法读取，已跳过。`,
    notices: {
      dropped: (e) => `上下文已满，最早的 ${e.turns} 轮已被忘记。`, stopped: () => "已停止。",
      cut: (e) => `已达到 ${e.tokens} 个词元，回答被截断。`, full: () => "上下文已满。", empty: () => "MOSS 没有回答。",
      results_cut: () => "结果过长，已缩短。", not_kept: () => "这一轮未能保存到磁盘。",
      commands_cut: (e) => `MOSS 给出了 ${e.commands} 条命令，只执行了 ${e.limit} 条。`,
    },
    fields: {
      temperature: "温度（0 表示总选最可能的词元）", top_k: "只从最可能的 k 个词元中选（0 表示不限）",
      top_p: "只从累计概率达到 p 的词元中选", repetition_penalty: "重复惩罚（留空则自动）", max_new_tokens: "回答最多的词元数",
      seed: "随机种子（留空则每次不同）",
    },
    labels: { "Web search": "搜索", Calculator: "计算器", "Equation solver": "解方程", "Text-to-image": "画图" },
  },
};

let language = localStorage.getItem("moss.language") ?? (navigator.language.startsWith("zh") ? "zh" : "en");

export const words = () => WORDS[language];

export const label = (name) => words().labels[name] ?? name;

export function switchLanguage() {
  language = language === "zh" ? "en" : "zh";
  localStorage.setItem("moss.language", language);
}

// Puts the words into all elements that ask for some.
export function translate(root = document) {
  document.documentElement.lang = language === "zh" ? "zh-CN" : "en";
  for (const element of root.querySelectorAll("[data-text]")) element.textContent = words()[element.dataset.text];
  for (const element of root.querySelectorAll("[data-label]")) {
    element.setAttribute("aria-label", words()[element.dataset.label]);
    element.title = element.tagName === "BUTTON" ? words()[element.dataset.label] : "";
  }
  for (const element of root.querySelectorAll("[data-placeholder]"))
    element.placeholder = words()[element.dataset.placeholder];
}
