// The web page of `finetune ui`: no library. Everything that comes from the server is set as text, never as HTML.
let token = document.querySelector("meta[name=token]").content;
export const main = document.getElementById("main");
let leave = () => {};  // ends the timers of the view that is shown
export function left() { leave(); leave = () => {}; }

// ---- parts ----
export function h(kind, attributes = {}, ...children) {
  const [tag, ...classes] = kind.split(".");
  const node = document.createElement(tag || "div");
  if (classes.length) node.className = classes.join(" ");
  for (const [name, value] of Object.entries(attributes ?? {})) {
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (name in node && typeof value !== "string") node[name] = value;
    else if (value !== null && value !== undefined && value !== false) node.setAttribute(name, value);
  }
  node.append(...children.flat(9).filter((child) => child !== null && child !== undefined && child !== false && child !== ""));
  return node;
}
export function svg(tag, attributes, ...children) {
  const node = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.append(...children);
  return node;
}
export const say = (text) => { document.getElementById("said").textContent = text; };
export function fill(node, ...children) { node.replaceChildren(...children.flat(9).filter((child) => child !== null && child !== undefined && child !== false)); }

/** Draws a part again only where what it shows has changed, so that focus and scrolling stay. */
export function part(kind, attributes, draw) {
  const node = h(kind, attributes);
  let before = "";
  return { node, show(...values) {
    const now = JSON.stringify(values);
    if (now === before) return;
    before = now;
    fill(node, draw(...values));
  } };
}

// ---- the server ----
export async function ask(path, { method = "GET", body, raw } = {}, again = true) {
  let answer;
  try {
    answer = await fetch(path, { method, headers: { "x-finetune-token": token, ...(raw ? {} : { "content-type": "application/json" }) },
      body: raw ?? (body === undefined ? undefined : JSON.stringify(body)) });
  } catch (error) {
    document.getElementById("lost").hidden = false;
    throw new Error("The server does not answer. Start it again with: finetune ui", { cause: "lost" });
  }
  document.getElementById("lost").hidden = true;
  if (answer.status === 403 && again) {  // the server began anew: its page has another token
    const page = new DOMParser().parseFromString(await (await fetch("/")).text(), "text/html");
    token = page.querySelector("meta[name=token]")?.content ?? token;
    return ask(path, { method, body, raw }, false);
  }
  let told = {};
  try { told = await answer.json(); } catch { /* no JSON: the code says enough */ }
  if (!answer.ok) throw new Error(told.error ?? `The server could not do this (${answer.status}).`);
  return told;
}
export const post = (path, body = {}) => ask(path, { method: "POST", body });
export const wait = (seconds) => new Promise((done) => setTimeout(done, seconds * 1000));
export async function chore(number, progress = () => {}) {
  for (;;) {
    const told = await ask(`/api/chores/${number}`);
    if (told.state === "done") return told.result;
    if (told.state === "failed") throw new Error(told.error);
    progress(told.progress);
    await wait(0.4);
  }
}

// ---- numbers in words ----
export const STATES = { starting: "starting", running: "running", finished: "finished", stopped: "stopped, can go on", failed: "failed", ended: "ended without a word" };
export const chip = (state) => h(`span.chip.${state}`, {}, STATES[state] ?? state);
export const upper = (text) => text.charAt(0).toUpperCase() + text.slice(1);
export const megabytes = (bytes) => bytes < 1e5 ? `${Math.max(1, Math.round(bytes / 1e3))} kB` : bytes < 1e9 ? `${(bytes / 1e6).toFixed(1)} MB` : `${(bytes / 1e9).toFixed(1)} GB`;
export function duration(seconds) {
  if (seconds === null || seconds === undefined) return "";
  if (seconds < 90) return `${Math.max(1, Math.round(seconds))} s`;
  if (seconds < 5400) return `${Math.round(seconds / 60)} min`;
  return `${Math.floor(seconds / 3600)} h ${Math.round((seconds % 3600) / 60)} min`;
}
export function ago(time) {
  const seconds = Date.now() / 1000 - time;
  if (seconds < 60) return "just now";
  if (seconds < 3600) return `${Math.round(seconds / 60)} min ago`;
  return seconds < 86400 ? `${Math.round(seconds / 3600)} h ago` : new Date(time * 1000).toLocaleDateString();
}

// ---- common parts ----
export function dropZone({ title, hint, accept, multiple = true, small = false, take }) {
  const input = h("input", { type: "file", multiple, accept, onchange: () => { const files = [...input.files]; input.value = ""; if (files.length) take(files); } });
  const icon = svg("svg", { viewBox: "0 0 24 24", width: small ? 22 : 36, height: small ? 22 : 36, "aria-hidden": "true", fill: "none", stroke: "currentColor", "stroke-width": 1.6, "stroke-linecap": "round", "stroke-linejoin": "round" },
    svg("path", { d: "M12 16V5m0 0L7.5 9.5M12 5l4.5 4.5M4 15v3a2 2 0 0 0 2 2h12a2 2 0 0 0 2-2v-3" }));
  const zone = h(`label.drop${small ? ".small" : ""}`, {
    ondragover: (event) => { event.preventDefault(); zone.classList.add("over"); },
    ondragleave: () => zone.classList.remove("over"),
    ondrop: (event) => { event.preventDefault(); zone.classList.remove("over"); const files = [...event.dataTransfer.files]; if (files.length) take(files); },
  }, icon, h("b", {}, title), small ? null : h("span.soft", {}, hint), input);
  return zone;
}
export function code(title, text) {
  const button = h("button", { type: "button", "aria-label": `Copy: ${title}`, onclick: async () => {
    try { await navigator.clipboard.writeText(text); button.textContent = "Copied"; } catch { button.textContent = "Select it"; }
    setTimeout(() => { button.textContent = "Copy"; }, 1500);
  } }, "Copy");
  return h("div.code", {}, h("pre", { tabIndex: 0, role: "region", "aria-label": title }, text), button);
}
const large = document.getElementById("large");
let gallery = [], shown = 0;
export function enlarge(images, index) {
  gallery = images; shown = index;
  showLarge("close");
  if (!large.open) large.showModal();
}
export const turn = (by, focus) => { shown = (shown + by + gallery.length) % gallery.length; showLarge(focus); };
export function showLarge(focus) {
  const { src, alt } = gallery[shown];
  const button = (name, text, act) => h("button", { type: "button", "data-name": name, onclick: act }, text);
  const several = gallery.length > 1;
  fill(large, h("img", { src, alt }), h("p", {}, several ? `${alt} (${shown + 1} of ${gallery.length})` : alt), h("div.turn", {},
    several ? button("previous", "← Previous", () => turn(-1, "previous")) : null,
    button("close", "Close", () => large.close()),
    several ? button("next", "Next →", () => turn(1, "next")) : null));
  large.querySelector(`[data-name=${focus}]`)?.focus();
}
large.addEventListener("keydown", (event) => {
  const by = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
  if (by && gallery.length > 1) turn(by, "close");
});
large.addEventListener("click", (event) => { if (event.target === large) large.close(); });
export function picture(images, index) {
  const { src, alt } = images[index];
  return h("button", { type: "button", "aria-label": `Enlarge: ${alt}`, onclick: () => enlarge(images, index) }, h("img", { src, alt, loading: "lazy" }));
}

// ---- views ----
/** Looks again and again, also after an error, until another view is shown. */
export function repeat(look, pause) {
  let ended = false;
  leave = () => { ended = true; };
  (async () => {
    while (!ended) {
      try { await look(); } catch (error) { if (error.cause !== "lost") { if (!ended) failed(error); return; } }
      if (!ended) await wait(document.hidden ? 6 : pause());
    }
  })();
  return () => ended;
}
export function failed(error) { fill(main, h("h1", {}, "That did not work"), h("p.fault", { role: "alert" }, error.message), h("div.actions", {}, h("a.button", { href: "#/" }, "Back to the runs"))); }
