// The server's interface, see docs/serving.md: JSON, and answers as events that go on after a lost connection.

const KEY = "moss.key";

export class ServerError extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

export const setKey = (key) => (key ? localStorage.setItem(KEY, key) : localStorage.removeItem(KEY));

export async function request(method, path, body, signal) {
  const headers = {};
  const key = localStorage.getItem(KEY);
  if (key) headers.Authorization = `Bearer ${key}`;
  if (body !== undefined) headers["Content-Type"] = "application/json";
  const response = await fetch(path, { method, headers, signal, body: body === undefined ? undefined : JSON.stringify(body) });
  if (response.ok) return response;
  const fields = await response.json().catch(() => ({}));
  throw new ServerError(response.status, fields.error?.message ?? response.statusText);
}

export async function json(method, path, body) {
  const response = await request(method, path, body);
  return response.status === 204 ? null : response.json();
}

// A picture by way of the key; an address of its own that the browser can show.
export async function picture(name) {
  const response = await request("GET", `api/pictures/${encodeURIComponent(name)}`);
  const blob = await response.blob();
  if (!/^image\/(png|jpeg|webp|gif)$/.test(blob.type)) throw new ServerError(415, blob.type);
  return URL.createObjectURL(blob);
}

async function* eventsOf(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const parts = (rest + value).split("\n\n");
    rest = parts.pop();
    for (const part of parts) {
      const data = part.split("\n").filter((line) => line.startsWith("data:")).map((line) => line.slice(5)).join("\n");
      if (data) yield JSON.parse(data);
    }
  }
}

const wait = (ms) => new Promise((resolve) => setTimeout(resolve, ms));

// All events of an answer; a connection that is lost is taken up again where it was. `lost` is told, and asked whether to go on.
export async function* answer(id, method, path, body, lost) {
  let next = 0;
  let over = false; // the server closes the stream once the conversation may be asked again, which is a little after the last event
  let open = () => request(method, path, body);
  for (let tries = 0; ; ) {
    try {
      for await (const event of eventsOf(await open())) {
        if (event.n !== undefined) {
          if (event.n < next) continue;
          next = event.n + 1;
        }
        tries = 0;
        over ||= event.type === "end" || event.type === "error";
        yield event;
      }
    } catch (error) {
      if (over) return;
      if (error instanceof ServerError && error.status < 500) throw error;
      if (next === 0 && tries === 0 && !(error instanceof TypeError)) throw error;
    }
    if (over || !lost(++tries)) return;
    await wait(Math.min(500 * 2 ** tries, 8000));
    open = () => request("GET", `api/conversations/${id}/answer?from=${next}`);
  }
}
