// What all pages share: the API key, kept for this tab only, and requests that carry it.
const KEY = "hybrid-cache-key";

export class Refused extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

export async function ask(path, options = {}) {
  const key = sessionStorage.getItem(KEY);
  const headers = key ? { Authorization: `Bearer ${key}` } : {};
  const reply = await fetch(path, { ...options, headers, cache: "no-store" });
  if (!reply.ok) {
    const body = await reply.json().catch(() => ({}));
    throw new Refused(reply.status, body.error?.message ?? `the server answered ${reply.status}`);
  }
  return reply;
}

// Shows the form for a key until one is taken, then calls `begin` again.
export function askForKey(begin) {
  const form = document.querySelector("#key");
  form.hidden = false;
  form.onsubmit = (event) => {
    event.preventDefault();
    sessionStorage.setItem(KEY, form.querySelector("input").value.trim());
    form.hidden = true;
    begin();
  };
  form.querySelector("input").focus();
}

export function element(name, attributes = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (key === "class") made.className = value;
    else made.setAttribute(key, value);
  }
  made.append(...children);
  return made;
}
