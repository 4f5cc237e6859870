// The web page of `finetune ui`: no library. Everything that comes from the server is set as text, never as HTML.
let token = document.querySelector("meta[name=token]").content;
const main = document.getElementById("main");
let leave = () => {};  // ends the timers of the view that is shown

// ---- parts ----
function h(kind, attributes = {}, ...children) {
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
function svg(tag, attributes, ...children) {
  const node = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.append(...children);
  return node;
}
const say = (text) => { document.getElementById("said").textContent = text; };
function fill(node, ...children) { node.replaceChildren(...children.flat(9).filter((child) => child !== null && child !== undefined && child !== false)); }

/** Draws a part again only where what it shows has changed, so that focus and scrolling stay. */
function part(kind, attributes, draw) {
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
async function ask(path, { method = "GET", body, raw } = {}, again = true) {
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
const post = (path, body = {}) => ask(path, { method: "POST", body });
const wait = (seconds) => new Promise((done) => setTimeout(done, seconds * 1000));
async function chore(number, progress = () => {}) {
  for (;;) {
    const told = await ask(`/api/chores/${number}`);
    if (told.state === "done") return told.result;
    if (told.state === "failed") throw new Error(told.error);
    progress(told.progress);
    await wait(0.4);
  }
}

// ---- numbers in words ----
const STATES = { starting: "starting", running: "running", finished: "finished", stopped: "stopped, can go on", failed: "failed", ended: "ended without a word" };
const chip = (state) => h(`span.chip.${state}`, {}, STATES[state] ?? state);
const upper = (text) => text.charAt(0).toUpperCase() + text.slice(1);
const megabytes = (bytes) => bytes < 1e9 ? `${(bytes / 1e6).toFixed(1)} MB` : `${(bytes / 1e9).toFixed(1)} GB`;
function duration(seconds) {
  if (seconds === null || seconds === undefined) return "";
  if (seconds < 90) return `${Math.max(1, Math.round(seconds))} s`;
  if (seconds < 5400) return `${Math.round(seconds / 60)} min`;
  return `${Math.floor(seconds / 3600)} h ${Math.round((seconds % 3600) / 60)} min`;
}
function ago(time) {
  const seconds = Date.now() / 1000 - time;
  if (seconds < 60) return "just now";
  if (seconds < 3600) return `${Math.round(seconds / 60)} min ago`;
  return seconds < 86400 ? `${Math.round(seconds / 3600)} h ago` : new Date(time * 1000).toLocaleDateString();
}

// ---- common parts ----
function dropZone({ title, hint, accept, multiple = true, small = false, take }) {
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
function code(title, text) {
  const button = h("button", { type: "button", "aria-label": `Copy: ${title}`, onclick: async () => {
    try { await navigator.clipboard.writeText(text); button.textContent = "Copied"; } catch { button.textContent = "Select it"; }
    setTimeout(() => { button.textContent = "Copy"; }, 1500);
  } }, "Copy");
  return h("div.code", {}, h("pre", { tabIndex: 0, role: "region", "aria-label": title }, text), button);
}
const large = document.getElementById("large");
let gallery = [], shown = 0;
function enlarge(images, index) {
  gallery = images; shown = index;
  showLarge("close");
  if (!large.open) large.showModal();
}
const turn = (by, focus) => { shown = (shown + by + gallery.length) % gallery.length; showLarge(focus); };
function showLarge(focus) {
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
function picture(images, index) {
  const { src, alt } = images[index];
  return h("button", { type: "button", "aria-label": `Enlarge: ${alt}`, onclick: () => enlarge(images, index) }, h("img", { src, alt, loading: "lazy" }));
}

// ---- the list of runs ----
async function home() {
  document.title = "Runs · finetune";
  const list = part("ul.runs", {}, (runs) => runs.map((run) => h("li", {}, runCard(run))));
  const none = h("p.soft", { hidden: true }, "No runs yet. Runs that you start on the command line, in the same folder, appear here too.");
  fill(main, h("h1", {}, "Teach a model your subject"),
    h("p.lead", {}, "A few photos in, an adapter file out: with the proof of what it learned, and of what it left alone."),
    h("section", {}, dropZone({ title: "Drop photos here, or click to choose", hint: "3 to 30 photos of one thing, or drawings of one style. JPEG, PNG, HEIC, WebP, AVIF, TIFF or a zip.", accept: "image/*,.heic,.heif,.avif,.zip,.txt", take: begin })),
    h("section", { "aria-labelledby": "runs" }, h("h2", { id: "runs" }, "Runs"), none, list.node));
  const look = async () => {
    const told = await ask("/api/home");
    none.hidden = told.runs.length > 0;
    list.show(told.runs.map((run) => ({ ...run, heard: ago(run.changed), eta: Math.round(run.eta ?? 0), loss: null, changed: null })));
  };
  repeat(look, () => 3);
}
function runCard(run) {
  const cover = run.cover ? h("img.cover", { src: `/runs/${encodeURIComponent(run.name)}/samples/${run.cover}`, alt: "", loading: "lazy" }) : h("div.cover.none", { "aria-hidden": "true" }, "no images yet");
  const busy = run.state === "running";
  return h("a.run", { href: `#/run/${encodeURIComponent(run.name)}` }, cover, h("div.text", {}, h("b", {}, run.name), chip(run.state),
    busy ? h("progress", { max: run.total || 1, value: run.done || 0, "aria-label": run.phase }) : null,
    h("p.hint", {}, [busy ? run.phase : run.verdict, run.steps ? `step ${run.step} of ${run.steps}` : "", busy ? "" : run.heard].filter(Boolean).join(" · "))));
}
/** Looks again and again, also after an error, until another view is shown. */
function repeat(look, pause) {
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
function failed(error) { fill(main, h("h1", {}, "That did not work"), h("p.fault", { role: "alert" }, error.message), h("div.actions", {}, h("a.button", { href: "#/" }, "Back to the runs"))); }

// ---- a new run ----
let waiting = [];  // files that were dropped before the set was made
async function begin(files) {
  const { set } = await post("/api/sets");
  waiting = files;
  location.hash = `#/new/${set}`;
}
async function newRun(set) {
  document.title = "New run · finetune";
  if (!set) {
    const told = await ask("/api/home");
    fill(main, h("h1", {}, "New run"), h("p.lead", {}, "Begin with the photos."),
      dropZone({ title: "Drop photos here, or click to choose", hint: "3 to 30 photos of one thing, or drawings of one style.", accept: "image/*,.heic,.heif,.avif,.zip,.txt", take: begin }),
      told.sets.length ? h("section", {}, h("h2", {}, "Or photos that you sent before"), h("div.actions", {}, told.sets.map((name) => h("a.button", { href: `#/new/${name}` }, name)))) : null);
    return;
  }
  const told = await ask("/api/home");
  const form = { set, kind: "thing", noun: "", base: "tiny", like: "", steps: "", previews: "100", more: "" };
  const state = { found: null, plan: null, out: (await ask(`/api/sets/${set}`)).left_out };
  const view = newRunView(form, state, told.bases);
  fill(main, view.node);
  if (waiting.length) { const files = waiting; waiting = []; await view.send(files); } else await view.check();
}
function newRunView(form, state, bases) {
  const photos = photoStep(form, state, () => changed());
  const what = whatStep(form, () => changed());
  const base = baseStep(form, bases, () => { changed(); photos.check(); });
  const plan = planStep(form, state, () => changed());
  const aside = part("aside", { "aria-label": "The same on the command line" }, (told, fault) => [
    h("h2", {}, "The same as a command"), h("p.soft", {}, "What the page does is an ordinary run. Copy it, change it, keep it."),
    told ? [code("Command", told.command), h("details", {}, h("summary", {}, "As a recipe file"), code("Recipe", told.recipe))] : h("p.soft", {}, fault || "It appears once you have said what is on the photos."),
  ]);
  let number = 0;
  async function changed() {
    plan.stale();
    what.mark(); 
    const own = ++number;
    await wait(0.25);
    if (own !== number) return;
    if (form.kind === "thing" && !form.noun) { aside.show(null, ""); return; }
    try { const told = await post("/api/recipe", wish(form)); aside.show(told, ""); } catch (error) { aside.show(null, error.message); }
  }
  aside.show(null, "");
  changed();
  const steps = [photos, what, base, plan].map((each, index) => { each.node.prepend(h("span.number", { "aria-hidden": "true" }, String(index + 1))); return each.node; });
  return { node: h("", {}, h("h1", {}, "New run"), h("p.lead", {}, "Four short steps. Nothing leaves this machine."), h("div.way", {}, h("div", {}, steps), aside.node)), send: photos.send, check: photos.check };
}
function wish(form) {
  const more = form.more.split("\n").map((line) => line.trim()).filter(Boolean);
  if (form.previews !== "0") more.unshift(`sample.every=${form.previews}`);
  if (form.steps) more.unshift(`run.steps=${form.steps}`);
  return { set: form.set, kind: form.kind, noun: form.noun, base: form.base, like: form.like, more };
}
function photoStep(form, state, changed) {
  const doing = h("div", { role: "status" }), fault = h("p.fault", { role: "alert" });
  const list = part("div", {}, (found, out) => found ? drawPhotos(found, out) : []);
  const node = h("section.step", {}, h("h2", {}, "Photos"), h("p.soft", {}, "Every photo is looked at. Leave out what does not show the thing well."),
    dropZone({ title: "Add photos", accept: "image/*,.heic,.heif,.avif,.zip,.txt", small: true, take: (files) => send(files) }), doing, fault, list.node);
  const source = (name, size) => `/api/sets/${form.set}/small/${encodeURIComponent(name)}.${size}.jpg`;
  function drawPhotos(found, out) {
    const good = found.files.filter((file) => file.verdict === "good").length;
    const images = found.files.filter((file) => file.shown).map((file) => ({ src: source(file.name, "large"), alt: file.name }));
    return [h("p", {}, h("b", {}, `${found.files.length} photos: `), good === found.files.length ? "nothing to do." : `${good} good, ${found.files.length - good} to look at.`),
      found.problems.length || found.notes.length ? h("ul.words", {}, found.problems.map((text) => h("li.warn", {}, upper(text))), found.notes.map((text) => h("li", {}, upper(text)))) : null,
      h("ul.photos", {}, found.files.map((file) => photoCard(file, images)), out.map((name) => outCard(name)))];
  }
  function photoCard(file, images) {
    const index = images.findIndex((image) => image.alt === file.name);
    const caption = h("input", { type: "text", value: file.caption ?? "", placeholder: "caption (not needed)", "aria-label": `Caption of ${file.name}`, onchange: () => act("caption", { name: file.name, text: caption.value }) });
    return h(`li.photo${file.verdict === "leave out" ? ".worst" : ""}`, {},
      index < 0 ? h("div.zoom") : h("button.zoom", { type: "button", "aria-label": `Enlarge ${file.name}`, onclick: () => enlarge(images, index) }, h("img", { src: source(file.name, "small"), alt: "", loading: "lazy" })),
      h("div.text", {}, h("b", { title: file.name }, file.name), h("ul", {},
        file.problems.map((text) => h("li.bad-text", {}, upper(text))), file.notes.map((text) => h("li.soft", {}, upper(text))),
        file.problems.length + file.notes.length ? null : h("li.good-text", {}, "Good")), caption),
      h("div.foot", {}, h("button.quiet", { type: "button", "aria-label": `Leave out ${file.name}`, onclick: () => act("out", { name: file.name, out: true }) }, "Leave out")));
  }
  function outCard(name) {
    return h("li.photo.out", {}, h("div.zoom", {}, h("img", { src: source(name, "small"), alt: "" })), h("div.text", {}, h("b", { title: name }, name), "Left out"),
      h("div.foot", {}, h("button.quiet", { type: "button", "aria-label": `Take back ${name}`, onclick: () => act("out", { name, out: false }) }, "Take back")));
  }
  async function act(what, values) {
    fault.textContent = "";
    try { await post(`/api/sets/${form.set}/${what}`, values); } catch (error) { fault.textContent = error.message; return; }
    if (what === "out") say(values.out ? `${values.name} is left out` : `${values.name} is back`);
    await check();
  }
  async function send(files) {
    const refused = [];
    for (const [index, file] of files.entries()) {
      fill(doing, h("p.hint", {}, `Sending ${index + 1} of ${files.length}`), h("progress", { max: files.length, value: index, "aria-label": "Sending photos" }));
      try { await ask(`/api/sets/${form.set}/files?name=${encodeURIComponent(file.name)}`, { method: "PUT", raw: file }); } catch (error) { refused.push(error.message); }
    }
    await check();
    if (refused.length) fault.textContent = refused.slice(0, 5).join("; ") + (refused.length > 5 ? `; and ${refused.length - 5} more` : "");
  }
  let current = 0;
  async function check() {
    const own = ++current;
    fill(doing, h("p.hint", {}, "Looking at the photos…"), h("progress", { "aria-label": "Looking at the photos" }));
    fault.textContent = "";
    try {
      const { chore: number } = await post(`/api/sets/${form.set}/check`, { resolution: form.base === "tiny" ? 64 : 512 });
      const found = await chore(number, (progress) => { if (progress && own === current) fill(doing, h("p.hint", {}, `Looking at photo ${progress[0]} of ${progress[1]}`), h("progress", { max: progress[1], value: progress[0], "aria-label": "Looking at the photos" })); });
      if (own !== current) return;
      found.files.sort((one, other) => one.name.localeCompare(other.name));
      state.found = found;
      state.out = (await ask(`/api/sets/${form.set}`)).left_out;
      list.show(found, state.out);
      node.classList.toggle("done", found.files.length > 0);
    } catch (error) { if (own === current) { fault.textContent = error.message; list.show({ files: [], problems: [], notes: [] }, (await ask(`/api/sets/${form.set}`)).left_out); } }
    if (own === current) { fill(doing); changed(); }
  }
  return { node, send, check };
}
function radios(name, legend, options, current, changed) {
  return h("fieldset.choice", {}, h("legend.unseen", {}, legend), options.map(([value, title, hint]) =>
    h("label", {}, h("input", { type: "radio", name, value, checked: value === current, onchange: () => changed(value) }), h("span", {}, h("b", {}, title), h("span.soft", {}, hint)))));
}
function whatStep(form, changed) {
  const noun = h("input", { type: "text", id: "noun", maxLength: 40, placeholder: "dog, mug, person, house …", autocomplete: "off", oninput: () => { form.noun = noun.value.trim(); changed(); } });
  const asked = h("div", {}, h("label", { for: "noun" }, "What is it? One or two common words."), noun, h("p.hint", {}, "The kind of thing, not its name: the tool chooses a rare word as its name."));
  const node = h("section.step", {}, h("h2", {}, "What is on them"),
    radios("kind", "Thing or style", [["thing", "A thing, animal or person", "3 to 30 photos of the same one"], ["style", "A style", "15 to 60 drawings or paintings by one hand"]], form.kind,
      (value) => { form.kind = value; asked.hidden = value === "style"; changed(); }), asked);
  return { node, mark: () => node.classList.toggle("done", form.kind === "style" || Boolean(form.noun)) };
}
function baseStep(form, bases, changed) {
  const hub = h("input", { type: "text", id: "hub", placeholder: "stable-diffusion-v1-5/stable-diffusion-v1-5", autocomplete: "off", spellcheck: false, onchange: () => { form.base = hub.value.trim(); changed(); } });
  const asked = h("div", { hidden: true }, h("label", { for: "hub" }, "Hub id"), hub, h("p.hint", {}, "OWNER/NAME on huggingface.co. It is fetched when the plan is made."));
  const like = h("input", { type: "text", id: "like", placeholder: "stable-diffusion-v1-5/stable-diffusion-v1-5", autocomplete: "off", onchange: () => { form.like = like.value.trim(); changed(); } });
  const likeAsked = h("div", { hidden: true }, h("label", { for: "like" }, "A hub id of the same kind of model"), like, h("p.hint", {}, "A single file has no settings of its own; they are taken from there."));
  const about = h("div", { role: "status" });
  const options = [["tiny", "The built-in toy", "For trying out, without a GPU: 64 pixels, minutes"], ...bases.map((name) => [`local:${name}`, name, name.endsWith(".safetensors") ? "a single file" : "a folder"]), ["hub", "From the hub", "Stable Diffusion 1.5, 2, XL, 3, Flux and their kin"]];
  const node = h("section.step.done", {}, h("h2", {}, "The base to train on"), radios("base", "Base", options, "tiny", (value) => {
    asked.hidden = value !== "hub"; likeAsked.hidden = !value.endsWith(".safetensors"); form.like = likeAsked.hidden ? "" : like.value.trim();
    form.base = value === "hub" ? hub.value.trim() : value;
    fill(about);
    if (form.base) changed();
  }), asked, likeAsked, h("div.actions", {}, h("button.quiet", { type: "button", onclick: inspect }, "What is this base?")), about);
  async function inspect() {
    fill(about, h("p.hint", {}, "Reading its settings…"));
    try {
      const { chore: number } = await post("/api/base", { base: form.base, like: form.like });
      const told = await chore(number);
      fill(about, h("dl.facts", {}, told.rows.map(([name, value]) => [h("dt", {}, name), h("dd", {}, value)])));
    } catch (error) { fill(about, h("p.fault", {}, error.message)); }
  }
  return { node };
}
function planStep(form, state, changed) {
  const out = h("div", { role: "status" }), fault = h("p.fault", { role: "alert" });
  const start = h("button.first", { type: "button", disabled: true, onclick: begun }, "Start training");
  const make = h("button", { type: "button", onclick: plan }, "Make the plan");
  const field = (name, attributes) => h("input", { ...attributes, id: name, oninput: (event) => { form[name] = event.target.value.trim(); changed(); } });
  const previews = h("select", { id: "previews", onchange: (event) => { form.previews = event.target.value; changed(); } },
    [["0", "never"], ["50", "every 50 steps"], ["100", "every 100 steps"], ["250", "every 250 steps"]].map(([value, text]) => h("option", { value, selected: value === form.previews }, text)));
  const more = h("textarea", { id: "more", spellcheck: false, placeholder: "optim.lr=1e-4\nmethod.rank=32", oninput: () => { form.more = more.value; changed(); } });
  const node = h("section.step", {}, h("h2", {}, "The plan"), h("p.soft", {}, "What will be done, before anything is done. The settings are measured ones for this base; change them only if you like."),
    h("details", {}, h("summary", {}, "Settings"), h("div.two", {}, h("div", {}, h("label", { for: "steps" }, "Steps"), field("steps", { type: "number", min: 1, placeholder: "as recommended" })), h("div", {}, h("label", { for: "previews" }, "Draw previews"), previews)),
      h("label", { for: "more" }, "Any other setting of a recipe, one in a line"), more, h("p.hint", {}, "section.key=value, as on the command line (docs/recipes.md). What is wrong is said before the start.")),
    h("div.actions", {}, make, start), fault, out);
  let number = null, own = 0;
  async function plan() {
    const mine = ++own;
    fault.textContent = ""; make.disabled = true;
    fill(out, h("p.hint", {}, "Reading photos and base…"), h("progress", { "aria-label": "Making the plan" }));
    try {
      const told = await post("/api/plan", wish(form));
      const found = await chore(told.chore);
      if (mine !== own) return;
      number = told.chore; start.disabled = false; node.classList.add("done");
      fill(out, planWords(found, told.pace), h("details", {}, h("summary", {}, "The plan in full"), h("dl.facts", {}, found.rows.map(([name, value]) => [h("dt", {}, name), h("dd", {}, value)]))));
      start.focus();
    } catch (error) { if (mine === own) { fill(out); fault.textContent = error.message; } } finally { make.disabled = false; }
  }
  async function begun() {
    start.disabled = true; fault.textContent = "";
    try { const { run } = await post("/api/start", { plan: number }); location.hash = `#/run/${encodeURIComponent(run)}`; } catch (error) { fault.textContent = error.message; start.disabled = false; }
  }
  return { node, stale: () => { own++; number = null; start.disabled = true; node.classList.remove("done"); fill(out); } };
}
function planWords(found, pace) {
  const time = pace ? `About ${duration(pace * found.batch_size * found.steps)} of training on this machine, as your earlier runs with this base took, and some more for drawing.` : "How long it takes shows after the first steps: no earlier run with this base is here to tell.";
  const { needed, there, fits, lever } = found.fits;
  const memory = there === null ? `A step needs about ${megabytes(needed)} of memory. There is no NVIDIA GPU here: it trains on the processor.` : fits ? `A step needs about ${megabytes(needed)} of the GPU's ${megabytes(there)}: it fits.` : `A step needs about ${megabytes(needed)}, and the GPU has ${megabytes(there)}: it will not fit. In Settings, write ${lever}.`;
  return h("ul.words", {}, found.words.map((text) => h("li", {}, text)), h("li", {}, time), h(fits === false ? "li.warn" : "li", {}, memory));
}

// ---- a run ----
function runView(name) {
  document.title = `${name} · finetune`;
  const path = encodeURIComponent(name);
  let about = null, aboutOf = "";
  const title = part("div", {}, (told) => [h("h1", {}, told?.trigger ? `“${told.trigger}”` : name), h("p.soft", {}, told?.base ? `${name} · ${told.base} (${told.family}), ${told.resolution} pixels, ${told.photos} photos` : name)]);
  const buttons = part("div.actions", {}, (state, report) => [
    state === "running" || state === "starting" ? h("button", { type: "button", onclick: () => act("stop") }, "Stop") : null,
    ["stopped", "ended", "failed"].includes(state) ? h("button.first", { type: "button", onclick: () => act("resume") }, "Go on") : null,
    report ? h("a.button", { href: `/runs/${path}/report.html`, target: "_blank", rel: "noopener" }, "The whole report") : null]);
  const fault = h("p.fault", { role: "alert" });
  const now = part("div.now", {}, drawNow);
  const verdict = part("div", {}, (found, words, state, kept) => drawVerdict(found, words, state, kept, path));
  const film = part("div", {}, (images, prompts) => drawFilm(images, prompts, path));
  const sides = part("div", {}, (images, prompts) => drawSides(images, prompts, path));
  const loss = part("div", {}, drawLoss);
  const measured = part("div", {}, drawMeasured);
  const files = part("div", {}, (list) => drawFiles(list, path));
  const log = part("div", {}, (lines) => lines.length ? h("details", {}, h("summary", {}, "What it says"), h("pre.log", { tabIndex: 0, role: "region", "aria-label": "Log" }, lines.join("\n"))) : []);
  const origin = part("div", {}, (told) => !told ? [] : h("section", {}, h("h2", {}, "How it was made"), h("details", {}, h("summary", {}, "The plan"), h("dl.facts", {}, Object.entries(told.plan).map(([key, value]) => [h("dt", {}, key), h("dd", {}, value)]))),
    told.command ? h("details", {}, h("summary", {}, "As a command"), code("Command", told.command)) : null, told.recipe ? h("details", {}, h("summary", {}, "The recipe in full"), code("Recipe", told.recipe)) : null));
  fill(main, h("div.head", {}, title.node, buttons.node), fault, now.node, verdict.node, sides.node, files.node, film.node, loss.node, measured.node, origin.node, log.node);
  title.show(null);
  async function act(what) {
    fault.textContent = "";
    try { await post(`/api/runs/${path}/${what}`); say(what === "stop" ? "It ends after this step" : "It goes on"); } catch (error) { fault.textContent = error.message; }
  }
  let busy = true, more = false;
  repeat(async () => {
    const told = await ask(`/api/runs/${path}/live`);
    busy = ["running", "starting"].includes(told.state); more = told.more;
    const mark = `${told.state} ${told.images.length} ${told.phase} ${told.exports}`;
    if (mark !== aboutOf) { about = await ask(`/api/runs/${path}`); aboutOf = mark; }
    buttons.show(told.state, told.report && told.state === "finished");
    title.show({ trigger: about.trigger, base: about.base, family: about.family, resolution: about.resolution, photos: about.photos });
    now.show(told.state, told.phase, told.done, told.total, told.step, told.steps, told.eta, told.loss, told.seconds_per_step, told.error);
    verdict.show(about.verdict, told.verdict_words, told.state, about.checkpoints.includes(about.verdict.step) && about.verdict.step !== told.steps);
    const after = told.images.some((column) => column.folder === "after") && told.images.some((column) => column.folder === "before");
    sides.show(after && told.state === "finished" ? told.images : [], about.prompts);
    film.show(told.images.some((column) => column.step !== null) || !after ? told.images : [], about.prompts);
    loss.show(told.curve); measured.show(told.verdicts); files.show(about.files); log.show(told.log);
    origin.show({ plan: about.plan, command: about.command, recipe: about.recipe });
  }, () => more ? 0.05 : busy ? 1.2 : 6);
}
function drawNow(state, phase, done, total, step, steps, eta, loss, pace, error) {
  const busy = state === "running";
  const training = phase === "Training";
  const left = busy && eta ? `about ${duration(eta)} left${training ? "" : " in this part"}` : "";
  const figures = [["Steps", `${step} of ${steps}`], busy && loss ? ["Loss now", loss.toPrecision(3)] : null, pace ? ["Seconds a step", pace.toPrecision(2)] : null, pace ? [busy ? "Training so far" : "Training", duration(pace * step)] : null].filter(Boolean);
  return [h("div.line", {}, h("b", {}, chip(state)), h("span.soft", {}, busy ? [phase, total > 1 ? `${done} of ${total}` : "", left].filter(Boolean).join(" · ") : "")),
    busy || state === "starting" ? h("progress", state === "starting" || !total ? { "aria-label": "Starting" } : { max: total, value: done, "aria-label": phase }) : null,
    error ? h("p.fault", { role: "alert" }, upper(error)) : null,
    state === "ended" ? h("p.soft", {}, "Its process ended without a word, as when the machine is switched off. Nothing is lost: Go on continues from the last checkpoint.") : null,
    steps ? h("dl.figures", {}, figures.map(([name, value]) => h("div", {}, h("dt", {}, name), h("dd", {}, value)))) : null];
}
/** `kept`: the recommended checkpoint is another than the last, and there to be exported. */
function drawVerdict(found, words, state, kept, path) {
  const final = found?.word && state === "finished";
  if (!final && !words) return [];
  const good = final ? found.word === "good" : false;
  const out = h("p.hint", { role: "status" });
  const step = final && kept ? h("div.actions", {}, h("button", { type: "button", onclick: async (event) => {
    event.target.disabled = true; out.textContent = "Writing and checking the files…";
    try { const { chore: number } = await post(`/api/runs/${path}/export`, { step: found.step }); const told = await chore(number); out.textContent = `${told.map((file) => file.format).join(", ")} of step ${found.step} are written and checked: see Your files.`; } catch (error) { out.textContent = error.message; event.target.disabled = false; }
  } }, `Export step ${found.step}, the recommended one`)) : null;
  return h(`section.card.verdict${good ? ".good" : ""}`, { "aria-label": "Verdict" }, h("p.soft", {}, final ? "The verdict" : "The verdict so far"),
    h("p.big", {}, final ? upper(found.word) : words), final ? [h("p", {}, found.sentence), found.advice ? h("p", {}, found.advice) : null, found.copies ? h("p.soft", {}, found.copies) : null, step, out] : null);
}
const sampleSource = (path, column, file) => `/runs/${path}/samples/${column.folder}/${file}`;
const columnName = (column) => column.step === null ? column.folder : `step ${column.step}`;
function byPrompt(column, number) { const start = `${String(number).padStart(2, "0")}-`; return column.files.filter((file) => file.startsWith(start)); }
function drawFilm(images, prompts, path) {
  if (!images.length) return [];
  return h("section", {}, h("h2", {}, "Over the steps"), h("p.soft", {}, "The same prompt at the same seed, as training goes on."), h("div.card.film", { tabIndex: 0, role: "region", "aria-label": "Images over the steps" },
    prompts.map((prompt, number) => {
      const shown = images.map((column) => [column, byPrompt(column, number)[0]]).filter(([, file]) => file);
      if (!shown.length) return null;
      const all = shown.map(([column, file]) => ({ src: sampleSource(path, column, file), alt: `${prompt}, ${columnName(column)}` }));
      return [h("p.prompt", {}, prompt), h("table", {}, h("tr", {}, shown.map(([column]) => h("th", { scope: "col" }, columnName(column)))), h("tr", {}, shown.map((_, index) => h("td", {}, picture(all, index)))))];
    })));
}
function drawSides(images, prompts, path) {
  if (!images.length) return [];
  const [before, after] = ["before", "after"].map((name) => images.find((column) => column.folder === name));
  return h("section", {}, h("h2", {}, "Before and after"), h("p.soft", {}, "The same prompts at the same seeds. Click an image for its full size."), h("div.card", {}, prompts.map((prompt, number) => {
    const all = [before, after].map((column) => byPrompt(column, number).map((file) => ({ src: sampleSource(path, column, file), alt: `${prompt}, ${column.folder}` })));
    if (!all[1].length) return null;
    return [h("p.prompt", {}, prompt), h("div.pair", {}, ["before", "after"].map((name, side) => h("div", {}, h("h3", {}, name), h("div.sides", {}, all[side].map((_, index) => picture(all[side], index))))))];
  })));
}
const STROKES = ["", "7 4", "2 4", "11 3 2 3"], TINTS = ["var(--mark)", "var(--good)", "var(--bad)", "var(--soft)"];
const W = 1000, H = 190;
function chart(title, lines, band, note) {
  const all = lines.flatMap((line) => line.points.map((point) => point[1])).concat(band ? band.flatMap((row) => [row[2], row[3]]) : []);
  const steps = lines.flatMap((line) => line.points.map((point) => point[0]));
  const last = Math.max(1, ...steps), low = Math.min(0, ...all), high = Math.max(low + 1e-6, ...all) * 1.05;
  const x = (step) => (W * step / last).toFixed(1), y = (value) => (H * (1 - (value - low) / (high - low))).toFixed(1);
  const drawing = svg("svg", { viewBox: `0 0 ${W} ${H}`, preserveAspectRatio: "none", class: "plot", role: "img", "aria-label": title },
    svg("line", { x1: 0, x2: W, y1: y(0), y2: y(0), stroke: "var(--line)", "vector-effect": "non-scaling-stroke" }));
  if (band) drawing.append(svg("path", { d: "M" + band.map((row) => `${x(row[0])},${y(row[3])}`).join("L") + "L" + [...band].reverse().map((row) => `${x(row[0])},${y(row[2])}`).join("L") + "Z", fill: "var(--mark)", opacity: ".14" }));
  lines.forEach((line, index) => drawing.append(svg("polyline", { points: line.points.map(([step, value]) => `${x(step)},${y(value)}`).join(" "), fill: "none", stroke: TINTS[index % 4], "stroke-width": 2, "stroke-dasharray": STROKES[index % 4], "vector-effect": "non-scaling-stroke" })));
  const key = lines.length > 1 ? lines.map((line, index) => h("span.key", {}, svg("svg", { width: 26, height: 8, "aria-hidden": "true" }, svg("line", { x1: 0, x2: 26, y1: 4, y2: 4, stroke: TINTS[index % 4], "stroke-width": 2, "stroke-dasharray": STROKES[index % 4] })), `${line.title} ${line.points.at(-1)[1].toFixed(2)}`)) : [];
  return h("figure.chart", {}, h("figcaption", {}, h("b", {}, title), key, note ? h("span", {}, note) : null), h("div.ends", {}, h("span", {}, high.toPrecision(2))), drawing, h("div.ends", {}, h("span", {}, "0"), h("span", {}, `step ${last}`)));
}
function smoothed(points) {
  const decay = 1 - 1 / Math.max(2, 0.08 * points.length);
  let mean = 0, weight = 0;
  return points.map(([step, value]) => { mean = decay * mean + (1 - decay) * value; weight = decay * weight + (1 - decay); return [step, mean / weight]; });
}
function drawLoss(curve) {
  if (curve.length < 2) return [];
  return h("section", {}, h("h2", {}, "Training"), h("p.soft", {}, "The loss is noisy, and says little about likeness: look at the images."), h("div.card", {}, chart("Loss", [{ title: "loss", points: smoothed(curve.map((row) => [row[0], row[1]])) }], joined(curve), "running mean, and the range of single steps")));
}
/** Neighbouring points as one, so that the range of single steps shows as a band. */
function joined(curve, most = 160) {
  const size = Math.max(1, Math.ceil(curve.length / most)), found = [];
  for (let at = 0; at < curve.length; at += size) {
    const part = curve.slice(at, at + size);
    const mean = part.reduce((sum, row) => sum + row[1], 0) / part.length;
    found.push([part.at(-1)[0], mean, Math.min(...part.map((row) => row[2])), Math.max(...part.map((row) => row[3]))]);
  }
  return found;
}
const LEARNED = ["learned", "held_out", "overfit"];
function drawMeasured(verdicts) {
  const drawn = verdicts.filter((line) => line.points.length > 1);
  if (!drawn.length) return [];
  const groups = [["What it learned", drawn.filter((line) => LEARNED.includes(line.name)), "higher is better, but for overfit"], ["What else it changed", drawn.filter((line) => !LEARNED.includes(line.name)), "lower is better"]];
  return h("section", {}, h("h2", {}, "Measured against the base"), h("p.soft", {}, "In the model's own space, in units of the base's own effect of prompts."), groups.filter(([, lines]) => lines.length).map(([title, lines, note]) => h("div.card", {}, chart(title, lines, null, note))));
}
function drawFiles(list, path) {
  if (!list?.length) return [];
  return h("section", {}, h("h2", {}, "Your files"), h("p.soft", {}, "Each was opened again and compared with what was trained."), h("div.card", {}, list.map((file) => h("div.file", {},
    h("div.top", {}, h("div", {}, h("b", {}, file.step ? `${file.format}, step ${file.step}` : file.format), " ", h("span.soft", {}, `${file.path.split("/").pop()}, ${megabytes(file.size)}`)), h("a.button", { href: `/runs/${path}/files/${file.path.split("/").map(encodeURIComponent).join("/")}`, download: "" }, "Download")),
    h("dl.places", {}, Object.entries(file.places).map(([program, place]) => [h("dt", {}, program), h("dd", {}, "put it here: ", h("code", {}, place))])),
    h("details", {}, h("summary", {}, file.checks.every((check) => check.passed) ? file.checks.length === 1 ? "its check passed" : `${file.checks.length} checks passed` : "a check failed"), h("ul", {}, file.checks.map((check) => h(check.passed ? "li" : "li.bad-text", {}, check.line)), file.limits.map((text) => h("li.soft", {}, text))))))));
}

// ---- a LoRA file ----
function loraView() {
  document.title = "Check a LoRA · finetune";
  const out = h("div", { role: "status" });
  const take = async ([file]) => {
    fill(out, h("p.hint", {}, `Reading ${file.name}…`), h("progress", { "aria-label": "Reading the file" }));
    try {
      const told = await ask(`/api/lora?name=${encodeURIComponent(file.name)}`, { method: "PUT", raw: file });
      const fine = !told.problems.length;
      fill(out, h(`section.card.verdict${fine ? ".good" : ""}`, {}, h("p.big", {}, fine ? "Nothing is wrong with it" : `${told.problems.length} problem${told.problems.length > 1 ? "s" : ""}`), h("p", {}, `${file.name}: ${told.called} for ${told.family}, ${megabytes(told.size)}, rank ${told.ranks.join(", ") || "unknown"}`), h("p.soft", {}, told.compared),
        h("ul.words", {}, told.problems.map((text) => h("li.warn", {}, upper(text))), told.notes.map((text) => h("li", {}, upper(text))))),
        h("section", {}, h("h2", {}, "Who reads it"), h("div.card", {}, h("dl.places", {}, told.readers.map(([reader, state, why]) => [h("dt", {}, reader), h("dd", {}, h(["fully", "rightly"].includes(state) ? "b.good-text" : "b.bad-text", {}, state), why ? `: ${why}` : "")])))));
    } catch (error) { fill(out, h("p.fault", { role: "alert" }, error.message)); }
  };
  fill(main, h("h1", {}, "Check a LoRA"), h("p.lead", {}, "Does it load in your program, whole and right? Any trainer's file. It is looked at here and then removed."),
    h("section", {}, dropZone({ title: "Drop a .safetensors file", hint: "or click to choose", accept: ".safetensors", multiple: false, take })), out);
}

// ---- the way through the page ----
async function route() {
  leave(); leave = () => {};
  const [, view = "", name = ""] = location.hash.split("/").map(decodeURIComponent);
  document.querySelectorAll("nav a").forEach((link) => { const own = link.getAttribute("href").split("/")[1] ?? ""; const here = own === view || (own === "" && view === "run"); here ? link.setAttribute("aria-current", "page") : link.removeAttribute("aria-current"); });
  scrollTo(0, 0);
  try {
    if (view === "new") await newRun(name);
    else if (view === "run" && name) runView(name);
    else if (view === "lora") loraView();
    else await home();
  } catch (error) { failed(error); }
}
addEventListener("hashchange", () => { route(); main.focus({ preventScroll: true }); });
route();
