// One turn: what was asked, and the answer as its events come.

import { picture } from "./server.js";
import { show, sourceLink } from "./markdown.js";
import { words } from "./words.js";

const REDRAW_MS = 120;

export function element(tag, className = "", text = "") {
  const made = document.createElement(tag);
  made.className = className;
  if (text) made.textContent = text;
  return made;
}

export function button(text, run) {
  const made = element("button", "", text);
  made.type = "button";
  made.addEventListener("click", run);
  return made;
}

export class TurnView {
  // actions: retry(), edit(message), or null where there are none
  constructor(message, actions) {
    this.message = message;
    this.actions = actions;
    this.text = "";
    this.sources = new Map();
    this.calls = [];
    this.drawn = 0;
    this.root = element("article");
    this.mine = element("div", "mine", message);
    this.theirs = element("div", "theirs");
    this.thoughts = element("details");
    const lamp = element("img", "lamp");
    lamp.src = "page/lamp.svg";
    lamp.alt = "";
    const summary = element("summary");
    summary.append(lamp, words().thoughts);
    this.thoughts.append(summary, element("p"));
    this.thoughts.hidden = true;
    this.thoughts.open = localStorage.getItem("moss.lamp") === "on";
    this.thoughts.addEventListener("toggle", () => localStorage.setItem("moss.lamp", this.thoughts.open ? "on" : "off"));
    this.happened = element("div");
    this.waiting = element("div", "waiting");
    this.waiting.setAttribute("role", "status");
    this.answer = element("div", "answer");
    this.notices = element("div");
    this.cited = element("ul", "sources");
    this.foot = element("div", "foot");
    this.theirs.append(this.thoughts, this.happened, this.waiting, this.answer, this.notices, this.cited, this.foot);
    this.root.append(this.mine, this.theirs);
  }

  // A turn that the server has kept.
  static kept(turn, actions) {
    const view = new TurnView(turn.message, actions);
    for (const source of turn.sources ?? []) view.sources.set(source.number, source);
    for (const event of turn.events ?? []) view.take(event);
    if (turn.stats) view.take({ type: "timing", ...turn.stats });
    view.finish();
    return view;
  }

  wait(text) {
    this.waiting.textContent = text;
  }

  take(event) {
    const taken = this[`on_${event.type}`];
    if (taken) taken.call(this, event);
  }

  on_thought(event) {
    this.thoughts.hidden = false;
    this.thoughts.lastChild.textContent += event.text;
  }

  on_command(event) {
    const call = element("div", "call");
    call.append(element("code", "", event.text));
    this.calls.push({ text: event.text, call });
    this.happened.append(call);
  }

  on_result(event) {
    const number = this.calls.findIndex((one) => one.text === event.command);
    const call = number < 0 ? element("div", "call") : this.calls.splice(number, 1)[0].call;
    if (number < 0) this.happened.append(call);
    call.append(element("pre", "", event.text.replace(/^<\|(\d+)\|>: /gm, "[$1] ") || words().noResult));
    event.numbers?.forEach((cited, i) => event.sources?.[i] && this.sources.set(cited, event.sources[i]));
    if (event.picture) this.draw(call, event.picture);
  }

  async draw(call, name) {
    const image = element("img");
    image.alt = words().picture;
    try {
      image.src = await picture(name);
      call.append(image);
    } catch (error) {
      call.append(element("p", "notice", error.message));
    }
  }

  on_text(event) {
    this.wait("");
    this.text += event.text;
    this.answer.classList.add("writing");
    if (this.timer === undefined) this.timer = setTimeout(() => this.redraw(), REDRAW_MS);
  }

  redraw() {
    clearTimeout(this.timer);
    this.timer = undefined;
    show(this.answer, this.text, this.sources);
  }

  on_notice(event) {
    const told = words().notices[event.code];
    this.notices.append(element("p", "notice", told ? told(event) : event.code));
  }

  on_sources(event) {
    for (const source of event.sources) this.sources.set(source.number, source);
  }

  on_timing(event) {
    this.foot.append(element("span", "", words().timing(event)));
  }

  on_error(event) {
    this.notices.append(element("p", "notice", event.error.message));
  }

  on_queue(event) {
    this.wait(words().queue(event.place, event.expected_s === null ? null : Math.ceil(event.expected_s)));
  }

  on_progress(event) {
    this.wait(words().progress(event.processed, event.total, event.expected_s === null ? null : Math.ceil(event.expected_s)));
  }

  finish() {
    this.wait("");
    this.answer.classList.remove("writing");
    this.redraw();
    this.cited.replaceChildren(
      ...[...this.sources].sort(([a], [b]) => a - b).map(([number, source]) => {
        const item = element("li");
        item.append(`[${number}] `, sourceLink(source, source.title || source.location || "?"));
        return item;
      }),
    );
    if (this.text) {
      const copy = button(words().copy, () => navigator.clipboard.writeText(this.text).then(() => (copy.textContent = words().copied)));
      this.foot.prepend(copy);
    }
    if (this.actions) {
      if (this.actions.retry) this.foot.append(button(words().retry, this.actions.retry));
      this.foot.append(button(words().edit, () => this.actions.edit(this.message)));
    }
  }
}
