// The page: the list of conversations, the one that is open, and what is asked.

import * as server from "./server.js";
import { TurnView, button, element } from "./turn.js";
import { label, switchLanguage, translate, words } from "./words.js";

const $ = (id) => document.getElementById(id);
const SAMPLING = ["temperature", "top_k", "top_p", "repetition_penalty", "max_new_tokens", "seed"];

const state = { about: null, open: null, view: null, answering: null, editing: null, changing: null };

// The server, and what it knows.

async function connect() {
  for (;;) {
    try {
      state.about = await server.json("GET", "api/server");
      $("key").hidden = true;
      $("status").textContent = state.about.ready ? state.about.model : words().loading;
      if (state.about.ready) return;
    } catch (error) {
      $("key").hidden = error.status !== 401;
      $("status").textContent = error instanceof server.ServerError ? error.message : words().unreachable;
      if (error.status === 401) await askKey();
    }
    await new Promise((resolve) => setTimeout(resolve, 1000));
  }
}

async function askKey() {
  const key = await ask(words().keyTitle, "");
  if (key !== null) server.setKey(key);
}

// A small dialog with one text; null when it is cancelled. Without a text it only asks.
function ask(title, text) {
  const dialog = $("ask");
  $("ask-title").textContent = title;
  $("ask-text").hidden = text === undefined;
  $("ask-text").value = text ?? "";
  dialog.returnValue = "cancel";
  dialog.showModal();
  return new Promise((resolve) =>
    dialog.addEventListener("close", () => resolve(dialog.returnValue === "ok" ? $("ask-text").value : null), { once: true }),
  );
}

function tell(error) {
  const told = element("p", "notice", error.message || words().unreachable);
  told.setAttribute("role", "alert");
  $("turns").append(told);
}

const guarded = (run) => async (...given) => {
  try {
    await run(...given);
  } catch (error) {
    tell(error);
  }
};

// A change of the conversation: it waits for those before it, and questions wait for it. Whoever makes it is told where it fails.
const inTurn = (change) => (...given) => {
  const changing = Promise.resolve(state.changing).then(() => change(...given));
  state.changing = changing.catch(() => {});
  return changing;
};

// The list.

async function refresh() {
  const { conversations } = await server.json("GET", "api/conversations");
  $("list").replaceChildren(...conversations.map(entry));
}

function entry(one) {
  const item = element("li");
  const title = one.title || words().untitled;
  const name = button(title, guarded(() => openConversation(one.id)));
  name.className = "name";
  if (one.id === state.open?.id) item.setAttribute("aria-current", "true");
  const rename = button("✎", guarded(() => renameConversation(one)));
  const remove = button("✕", guarded(() => removeConversation(one)));
  for (const [made, what] of [[rename, "rename"], [remove, "remove"]]) {
    made.className = "small";
    made.title = words()[what];
    made.setAttribute("aria-label", `${words()[what]}: ${title}`);
  }
  item.append(name, rename, remove);
  return item;
}

async function renameConversation(one) {
  const title = await ask(words().rename, one.title);
  if (!title) return;
  await server.json("PATCH", `api/conversations/${one.id}`, { title });
  if (state.open?.id === one.id) showTitle((state.open.title = title));
  await refresh();
}

async function removeConversation(one) {
  if ((await ask(`${words().removeTitle} ${one.title || words().untitled}`)) === null) return;
  await server.json("DELETE", `api/conversations/${one.id}`);
  if (state.open?.id === one.id) showEmpty();
  await refresh();
}

// The conversation that is open.

const showTitle = (title) => {
  $("title").textContent = title || words().untitled;
  document.title = title ? `${title} · MOSS` : "MOSS";
};

// What answers: the model, or the adapter that the conversation has.
const showModel = () => {
  $("status").textContent = state.open?.model ?? state.about?.model ?? "";
};

function showEmpty() {
  state.open = state.view = null;
  if (state.about?.ready) showModel();
  history.replaceState(null, "", location.pathname);
  showTitle("");
  $("turns").replaceChildren(element("p", "empty", words().empty));
  state.plugins = [...(state.about?.default_plugins ?? [])];
  showPlugins();
  busy(false);
}

async function openConversation(id) {
  const conversation = await server.json("GET", `api/conversations/${id}`);
  document.body.classList.remove("listed");
  state.open = conversation;
  state.plugins = [...conversation.plugins];
  history.replaceState(null, "", `#${id}`);
  showTitle(conversation.title);
  showModel();
  showPlugins();
  const last = conversation.turns.length - 1;
  $("turns").replaceChildren(...conversation.turns.map((turn, i) => TurnView.kept(turn, actionsOf(i, i === last)).root));
  if (conversation.damaged) $("turns").append(element("p", "notice", words().damaged(conversation.damaged)));
  toEnd();
  await refresh();
  busy(false);
  if (conversation.answering) await follow(id, "GET", `api/conversations/${id}/answer?from=0`);
}

function actionsOf(turn, last) {
  return {
    retry: last ? guarded(() => answerAgain(turn)) : null,
    edit: (message) => {
      state.editing = turn;
      $("message").value = message;
      fit();
      $("message").focus();
    },
  };
}

async function answerAgain(turn) {
  await state.changing;
  const id = state.open.id;
  $("turns").children[turn]?.remove();
  await follow(id, "POST", `api/conversations/${id}/retry`);
}

async function send(message) {
  await state.changing;
  if (!state.open) state.open = await server.json("POST", "api/conversations", { plugins: state.plugins });
  const id = state.open.id;
  history.replaceState(null, "", `#${id}`);
  const turn = state.editing;
  state.editing = null;
  if (turn === null) return follow(id, "POST", `api/conversations/${id}/turns`, { message });
  while ($("turns").children.length > turn) $("turns").lastChild.remove();
  return follow(id, "PUT", `api/conversations/${id}/turns/${turn}`, { message });
}

// Shows an answer while it is written.
async function follow(id, method, path, body) {
  $("turns").querySelector(".empty")?.remove();
  busy(true);
  let view = null;
  const begun = (message, turn) => {
    if (view) return;
    view = new TurnView(message, null);
    view.turn = turn;
    view.wait(words().thinking);
    $("turns").append(view.root);
    toEnd();
  };
  if (body) begun(body.message, null);
  try {
    for await (const event of server.answer(id, method, path, body, lost)) {
      if (state.open?.id !== id) return;
      showModel();
      if (event.type === "start") begun(event.message, event.turn);
      view?.take(event);
      if (atEnd) toEnd();
      if (event.type === "end") showTitle((state.open.title = event.title));
    }
  } finally {
    if (state.open?.id === id) {
      busy(false);
      if (view) {
        view.finish();
        await settle(id);
      }
    }
  }

  function lost(tries) {
    $("status").textContent = words().lost;
    return state.open?.id === id && tries < 20;
  }
}

// After an answer: the conversation as the server has kept it, so that what can be done is right for every turn.
async function settle(id) {
  const conversation = await server.json("GET", `api/conversations/${id}`);
  await refresh();
  if (state.open?.id !== id || conversation.answering) return;
  const last = conversation.turns.length - 1;
  const unkept = [...$("turns").children].slice(last + 1).filter((one) => one.tagName !== "ARTICLE" || one.querySelector(".notice"));
  const stay = atEnd;
  $("turns").replaceChildren(...conversation.turns.map((turn, i) => TurnView.kept(turn, actionsOf(i, i === last)).root), ...unkept);
  if (stay) toEnd();
}

const nearEnd = () => $("turns").scrollHeight - $("turns").scrollTop - $("turns").clientHeight < 120;
function toEnd() {
  atEnd = true;
  $("turns").scrollTo({ top: $("turns").scrollHeight, behavior: "instant" });
}

// Pictures come later than what is around them: whoever was at the end stays there, and only a reader's own scrolling leaves it.
let atEnd = true;
let touched = -Infinity;
for (const kind of ["wheel", "touchmove", "pointerdown", "keydown"]) {
  $("turns").addEventListener(kind, () => (touched = performance.now()), { passive: true });
}
$("turns").addEventListener("scroll", () => {
  if (performance.now() - touched < 1000) atEnd = nearEnd();
});
$("turns").addEventListener("load", () => atEnd && toEnd(), true);

function busy(is) {
  state.answering = is;
  $("send").hidden = is;
  $("stop").hidden = !is;
  $("turns").setAttribute("aria-busy", String(is));
}

// Plugins and settings.

function showPlugins() {
  $("plugins").replaceChildren(
    ...(state.about?.plugins ?? []).map(({ name, label: text }) => {
      const on = state.plugins.includes(name);
      const made = button(label(text), guarded(inTurn(() => switchPlugin(name))));
      made.setAttribute("aria-pressed", String(on));
      return made;
    }),
  );
}

async function switchPlugin(name) {
  const plugins = state.plugins.includes(name) ? state.plugins.filter((one) => one !== name) : [...state.plugins, name];
  if (state.open) await server.json("PATCH", `api/conversations/${state.open.id}`, { plugins });
  state.plugins = plugins;
  showPlugins();
}

async function openSettings() {
  await state.changing;
  if (!state.open) {
    state.open = await server.json("POST", "api/conversations", { plugins: state.plugins });
    history.replaceState(null, "", `#${state.open.id}`);
    await refresh();
  }
  const { models } = state.about;
  $("models").hidden = models.length < 2;
  $("model").replaceChildren(...models.map((name) => new Option(name, name, false, name === state.open.model)));
  const own = state.open.sampling ?? {};
  $("fields").replaceChildren(
    ...SAMPLING.map((name) => {
      const row = element("label");
      const input = element("input");
      input.name = name;
      input.type = "number";
      input.step = "any";
      input.value = own[name] ?? "";
      input.placeholder = state.about.sampling[name] ?? "";
      row.append(element("span", "", words().fields[name]), input);
      return row;
    }),
  );
  $("system").value = state.open.system ?? "";
  $("settings").returnValue = "cancel";
  $("settings").showModal();
}

async function saveSettings() {
  if ($("settings").returnValue !== "save") return;
  const sampling = Object.fromEntries(
    [...$("fields").querySelectorAll("input")].map((input) => [input.name, input.value === "" ? null : Number(input.value)]),
  );
  const id = state.open.id;
  const model = $("model").value;
  await server.json("PATCH", `api/conversations/${id}`, { sampling, system: $("system").value, model });
  state.open = { ...state.open, ...(await server.json("GET", `api/conversations/${id}`)) };
  showModel();
}

// What people press.

function fit() {
  const box = $("message");
  box.rows = Math.min(12, Math.max(1, box.value.split("\n").length));
}

function theme(chosen) {
  const dark = chosen ?? localStorage.getItem("moss.theme") ?? (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light");
  document.documentElement.dataset.theme = dark;
  return dark;
}

function listen() {
  $("form").addEventListener("submit", (event) => {
    event.preventDefault();
    const message = $("message").value.trim();
    if (!message || state.answering || !state.about?.ready) return;
    $("message").value = "";
    fit();
    guarded(send)(message);
  });
  $("message").addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
    event.preventDefault();
    $("form").requestSubmit();
  });
  $("message").addEventListener("input", fit);
  $("stop").addEventListener("click", guarded(() => server.json("POST", `api/conversations/${state.open.id}/stop`)));
  $("new").addEventListener("click", () => {
    document.body.classList.remove("listed");
    showEmpty();
    guarded(refresh)();
    $("message").focus();
  });
  $("open-side").addEventListener("click", () => {
    document.body.classList.add("listed");
    $("new").focus();
  });
  $("close-side").addEventListener("click", () => document.body.classList.remove("listed"));
  $("open-settings").addEventListener("click", guarded(openSettings));
  $("settings").addEventListener("close", guarded(inTurn(saveSettings)));
  $("key").addEventListener("click", askKey);
  $("theme").addEventListener("click", () => {
    const chosen = theme() === "dark" ? "light" : "dark";
    localStorage.setItem("moss.theme", chosen);
    theme(chosen);
  });
  $("language").addEventListener("click", () => {
    switchLanguage();
    say();
    guarded(state.open ? () => openConversation(state.open.id) : async () => (showEmpty(), refresh()))();
  });
  addEventListener("keydown", (event) => {
    if (event.key === "Escape") document.body.classList.remove("listed");
  });
}

function say() {
  translate();
  $("language").textContent = words().other;
}

const asked = location.hash.slice(1);
theme();
say();
listen();
showEmpty();
await connect();
await guarded(refresh)();
if (asked) await guarded(() => openConversation(asked))();
else showEmpty();
