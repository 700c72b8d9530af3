// A model's text as elements. The text is hostile: what Markdown makes of it is sanitised, and nothing of it becomes script,
// style, form, or a request to anywhere.

import { Marked } from "./lib/marked.js";
import highlighter from "./lib/highlight.js";
import { words } from "./words.js";

const LONGEST = 60000; // characters; more is shown as it is
const TAGS = [
  "a", "b", "blockquote", "br", "code", "del", "em", "h1", "h2", "h3", "h4", "h5", "h6", "hr", "i", "li", "ol", "p", "pre", "s",
  "strong", "sub", "sup", "table", "tbody", "td", "th", "thead", "tr", "ul", "span",
];
const FORMULAS = [/^\$\$([^$]{1,2000}?)\$\$/, /^\\\[([^]{1,2000}?)\\\]/, /^\\\(([^]{1,2000}?)\\\)/, /^\$([^\s$](?:[^$\n]{0,500}?[^\s$\\])?)\$(?!\d)/];

const escaped = (text) => text.replace(/[&<>"']/g, (c) => `&#${c.charCodeAt(0)};`);

const formula = {
  name: "formula",
  level: "inline",
  start: (source) => source.search(/\$|\\[[(]/),
  tokenizer(source) {
    for (const [kind, form] of FORMULAS.entries()) {
      const match = form.exec(source);
      if (match) return { type: "formula", raw: match[0], tex: match[1], block: kind < 2 };
    }
  },
  renderer: (token) => `<span class="${token.block ? "formula block" : "formula"}">${escaped(token.tex)}</span>`,
};
const marked = new Marked({ gfm: true, breaks: true, async: false, extensions: [formula] });

// HTML in the text is text.
marked.use({ renderer: { html: (token) => escaped(token.text ?? token.raw), image: (token) => escaped(token.raw) } });

const web = (address) => /^https?:\/\//i.test(address);

// Fills an element with a text; `sources` are number -> {title, location}, which the text cites as [1].
export function show(element, text, sources = new Map()) {
  if (text.length > LONGEST) {
    element.textContent = text;
    return;
  }
  const clean = window.DOMPurify.sanitize(marked.parse(text), {
    ALLOWED_TAGS: TAGS, ALLOWED_ATTR: ["href", "class", "start", "align"], ALLOW_DATA_ATTR: false, ALLOW_ARIA_ATTR: false,
    ALLOWED_URI_REGEXP: /^https?:\/\//i, RETURN_DOM_FRAGMENT: true,
  });
  for (const link of clean.querySelectorAll("a")) outside(link);
  for (const named of clean.querySelectorAll("[class]")) {
    const kept = [...named.classList].filter((name) => /^language-[\w+#-]{1,30}$|^formula$|^block$/.test(name));
    named.className = kept.join(" ");
  }
  for (const code of clean.querySelectorAll("pre > code")) colour(code);
  for (const span of clean.querySelectorAll("span.formula")) typeset(span);
  cite(clean, sources);
  element.replaceChildren(clean);
}

function outside(link) {
  if (!web(link.getAttribute("href") ?? "")) link.removeAttribute("href");
  link.target = "_blank";
  link.rel = "noopener noreferrer nofollow";
}

function colour(code) {
  const language = [...code.classList].find((name) => name.startsWith("language-"))?.slice(9);
  if (language && highlighter.getLanguage(language) && code.textContent.length < 20000) {
    const coloured = highlighter.highlight(code.textContent, { language, ignoreIllegals: true }).value;
    const clean = window.DOMPurify.sanitize(coloured, { ALLOWED_TAGS: ["span"], ALLOWED_ATTR: ["class"], RETURN_DOM_FRAGMENT: true });
    code.replaceChildren(clean);
  }
  const copy = document.createElement("button");
  copy.type = "button";
  copy.className = "copy";
  copy.textContent = words().copy;
  copy.addEventListener("click", () => navigator.clipboard.writeText(code.textContent).then(() => (copy.textContent = words().copied)));
  code.parentElement.append(copy);
}

// MathML, which needs no style of its own. What is no formula stays as it was written.
function typeset(span) {
  const tex = span.textContent;
  try {
    window.katex.render(tex, span, { output: "mathml", displayMode: span.classList.contains("block"), throwOnError: true,
      trust: false, strict: "ignore", maxExpand: 100, maxSize: 20 });
    for (const element of span.querySelectorAll("[style], a")) element.removeAttribute("style");
  } catch {
    span.textContent = tex;
  }
}

function cite(root, sources) {
  const texts = document.createTreeWalker(root, NodeFilter.SHOW_TEXT);
  const nodes = [];
  while (texts.nextNode()) if (!texts.currentNode.parentElement?.closest("code, a, .formula")) nodes.push(texts.currentNode);
  for (const node of nodes) {
    const parts = node.data.split(/(\[\d{1,3}\])/);
    if (parts.length === 1) continue;
    node.replaceWith(...parts.map((part, i) => (i % 2 && sources.has(Number(part.slice(1, -1))) ? citation(part, sources) : part)));
  }
}

function citation(part, sources) {
  const number = Number(part.slice(1, -1));
  return sourceLink(sources.get(number), `[${number}]`, "cite");
}

// A link to a source of the web, or its name where it lies elsewhere.
export function sourceLink(source, text, kind = "") {
  const link = document.createElement(web(source.location ?? "") ? "a" : "span");
  link.className = kind;
  link.textContent = text;
  link.title = source.title ?? "";
  if (link.tagName === "A") {
    link.href = source.location;
    outside(link);
  }
  return link;
}
