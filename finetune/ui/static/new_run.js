// A new run: photos, what is on them, the base, the plan.
import { main, h, fill, part, ask, post, wait, chore, ago, megabytes, duration, dropZone, code } from "./parts.js";
import { photoStep } from "./photos.js";
import { settingsForm } from "./settings.js";

let waiting = [];  // files that were dropped before the set was made
export async function begin(files) {
  const { set } = await post("/api/sets");
  waiting = files;
  location.hash = `#/new/${set}`;
}
export async function newRun(set) {
  document.title = "New run · finetune";
  if (!set) {
    const told = await ask("/api/home");
    fill(main, h("h1", {}, "New run"), h("p.lead", {}, "Begin with the photos."),
      dropZone({ title: "Drop photos here, or click to choose", hint: "3 to 30 photos of one thing, or drawings of one style.", accept: "image/*,.heic,.heif,.avif,.zip,.txt", take: begin }),
      told.sets.length ? h("section.before", {}, h("h2", {}, "Or go on with a draft"), h("ul.drafts", {}, told.sets.map((draft) => h("li", {}, h("a.button", { href: `#/new/${draft.name}` }, h("b", {}, draft.noun || (draft.kind === "style" ? "a style" : "no name yet")), h("span.soft", {}, `${draft.photos} photo${draft.photos === 1 ? "" : "s"}, ${ago(draft.changed)}`)))))) : null);
    return;
  }
  const told = await ask("/api/home");
  const { draft } = await ask(`/api/sets/${set}`);
  const form = { kind: "thing", noun: "", base: "tiny", like: "", more: "sample.every=100\nrun.keep_best=true", file: "", fileName: "", ...draft, set };
  const sideOf = (base) => base === "tiny" ? told.tiny_side : 512;  // of another base, "What is this base?" tells
  const state = { found: null, out: [], resolution: sideOf(form.base) };
  const view = newRunView(form, state, told.bases, sideOf);
  fill(main, view.node);
  if (waiting.length) { const files = waiting; waiting = []; await view.send(files); } else await view.check();
}
function newRunView(form, state, bases, sideOf) {
  const photos = photoStep(form, state, () => changed());
  const what = whatStep(form, () => changed());
  const base = baseStep(form, bases, sideOf("tiny"), () => { state.resolution = sideOf(form.base); changed(); photos.check(); }, (resolution) => { if (resolution && resolution !== state.resolution) { state.resolution = resolution; photos.check(); } });
  const plan = planStep(form, state, (told) => changed(told));
  const aside = part("aside", { "aria-label": "The same on the command line" }, (told, fault) => [
    h("h2", {}, "The same as a command"), h("p.soft", {}, "What the page does is an ordinary run. Copy it, change it, keep it."),
    told ? [code("Command", told.command), h("details", {}, h("summary", {}, "As a recipe file"), code("Recipe", told.recipe))] : h("p.soft", {}, fault || "It appears once you have said what is on the photos."),
  ]);
  let number = 0;
  async function changed(told) {
    if (told?.noun || told?.kind) { what.set(told.kind, told.noun); if (told.base) { base.set(told.base); state.resolution = sideOf(form.base); } }
    plan.stale();
    what.mark();
    const own = ++number;
    await wait(0.25);
    if (own !== number) return;
    if (number > 1) post(`/api/sets/${form.set}/draft`, form).catch(() => {});  // what is wrong with it, the next line says
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
  return { set: form.set, kind: form.kind, noun: form.noun, base: form.base, like: form.like, file: form.file, more };
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
  noun.value = form.noun; asked.hidden = form.kind === "style";
  function set(kind, word) {
    form.kind = kind || form.kind; form.noun = noun.value = word || form.noun; asked.hidden = form.kind === "style";
    for (const option of node.querySelectorAll("[name=kind]")) option.checked = option.value === form.kind;
  }
  return { node, set, mark: () => node.classList.toggle("done", form.kind === "style" || Boolean(form.noun)) };
}
function baseStep(form, bases, tinySide, changed, sized) {
  const hub = h("input", { type: "text", id: "hub", placeholder: "stable-diffusion-v1-5/stable-diffusion-v1-5", autocomplete: "off", spellcheck: false, onchange: () => { form.base = hub.value.trim(); changed(); } });
  const asked = h("div", { hidden: true }, h("label", { for: "hub" }, "Hub id"), hub, h("p.hint", {}, "OWNER/NAME on huggingface.co. It is fetched when the plan is made."));
  const like = h("input", { type: "text", id: "like", placeholder: "stable-diffusion-v1-5/stable-diffusion-v1-5", autocomplete: "off", onchange: () => { form.like = like.value.trim(); changed(); } });
  const likeAsked = h("div", { hidden: true }, h("label", { for: "like" }, "A hub id of the same kind of model"), like, h("p.hint", {}, "A single file has no settings of its own; they are taken from there."));
  const about = h("div", { role: "status" });
  const options = [["tiny", "The built-in toy", `For trying out, without a GPU: ${tinySide} pixels, minutes`], ...bases.map((name) => [`local:${name}`, name, name.endsWith(".safetensors") ? "a single file" : "a folder"]), ["hub", "From the hub", "Stable Diffusion 1.5, 2, XL, 3, Flux, and models trained from them"]];
  const node = h("section.step.done", {}, h("h2", {}, "The base to train on"), radios("base", "Base", options, options.some(([value]) => value === form.base) ? form.base : "hub", (value) => {
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
      sized(told.resolution);
      fill(about, h("dl.facts", {}, told.rows.map(([name, value]) => [h("dt", {}, name), h("dd", {}, value)])));
    } catch (error) { fill(about, h("p.fault", {}, error.message)); }
  }
  function set(wanted) {
    const known = options.some(([value]) => value === wanted);
    form.base = wanted; asked.hidden = known; likeAsked.hidden = !wanted.endsWith(".safetensors");
    if (!known) hub.value = wanted;
    for (const option of node.querySelectorAll("[name=base]")) option.checked = option.value === (known ? wanted : "hub");
  }
  like.value = form.like;
  set(form.base);
  return { node, set };
}
function planStep(form, state, changed) {
  const out = h("div", { role: "status" }), fault = h("p.fault", { role: "alert" });
  const start = h("button.first", { type: "button", disabled: true, onclick: begun }, "Start training");
  const make = h("button", { type: "button", onclick: plan }, "Make the plan");
  const settings = settingsForm(form, changed);
  const details = h("details", { ontoggle: () => { if (details.open) settings.look(); } }, h("summary", {}, "Settings"), settings.node);
  const node = h("section.step", {}, h("h2", {}, "The plan"), h("p.soft", {}, "What will be done, before anything is done. The settings suit this base: for the built-in toy they were measured, for others they are published values or rules."),
    details,
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
  return { node, stale: () => { if (details.open) settings.look(); own++; number = null; start.disabled = true; node.classList.remove("done"); fill(out); } };
}
function planWords(found, pace) {
  const time = pace ? `About ${duration(pace * found.batch_size * found.steps)} of training on this machine, as your earlier runs with this base took, and some more for drawing.` : "How long it takes shows after the first steps: no earlier run with this base is here to tell.";
  const { needed, there, fits, lever } = found.fits;
  const memory = there === null ? `A step needs about ${megabytes(needed)} of memory. There is no NVIDIA GPU here: it trains on the processor.` : fits ? `A step needs about ${megabytes(needed)} of the GPU's ${megabytes(there)}: it fits.` : `A step needs about ${megabytes(needed)}, and the GPU has ${megabytes(there)}: it will not fit. In Settings, write ${lever}.`;
  return h("ul.words", {}, found.warnings.map((text) => h("li.warn", {}, text)), found.words.map((text) => h("li", {}, text)), h("li", {}, time), h(fits === false ? "li.warn" : "li", {}, memory));
}
