// Every setting of a recipe as a form: the list, the limits and the words come from the server.
import { h, fill, part, ask, post, upper, dropZone } from "./parts.js";

const SECTIONS = { data: "Photos and captions", prior: "What the base keeps", method: "What is trained", objective: "Noise and loss", optim: "Learning", run: "The run", sample: "Images it draws", export: "Files" };
const NAMES = { "prior.others": "everything else", "prior.count": "number of class images", "prior.steps": "steps of drawing class images", "prior.guidance": "guidance of class images", "prior.caption_dropout": "class images with an empty prompt", "sample.guidance": "guidance", "run.batch_size": "photos a step", lr: "learning rate", text_lr: "learning rate of text encoders", eps: "epsilon", ema: "moving average of the weights", every: "draw previews every … steps" };
const words = (text) => text.split("`").map((piece, index) => index % 2 ? h("code", {}, piece) : piece);
const PART = { "{}": "on", null: "off" };  // a part of a section that can be left out as a whole
const ON = { true: "on", false: "off" };
const ended = (text) => /[.:;!?]$/.test(text) || !text ? text : `${text}.`;
const shown = (value) => value === null || value === undefined ? "" : typeof value === "object" ? JSON.stringify(value) : String(value);

/** `form.more` is the one place where settings are: a text of key=value lines. The fields read and write it. */
export function settingsForm(form, changed) {
  const lines = () => form.more.split("\n").map((line) => line.trim()).filter(Boolean);
  const values = () => new Map(lines().map((line) => line.split(/=(.*)/s).slice(0, 2).map((text) => text.trim())));
  const text = h("textarea", { id: "more", spellcheck: false, placeholder: "optim.lr=1e-4\nmethod.rank=32", oninput: () => { form.more = text.value; changed(); mark(); } });
  const search = h("input", { type: "search", id: "settings-search", placeholder: "rate, crop, prompts …", autocomplete: "off", oninput: () => filter() });
  const fault = h("p.fault", { role: "alert" });
  const few = part("div.settings", {}, (rows) => rows.map(([setting, chosen]) => row(setting, chosen, "few")));
  const all = part("div", {}, (sections) => sections.map(([name, rows]) => h("details.group", { "data-section": name }, h("summary", {}, SECTIONS[name] ?? upper(name), h("span.count")), h("div.settings", {}, rows.map(([setting, chosen]) => row(setting, chosen, "all"))))));
  const recipe = h("div", { role: "status" });
  const node = h("div.allsettings", {}, fault, h("p.hint", {}, "What the recipe chooses for this base. Leave a field empty to keep it."), few.node,
    h("details", {}, h("summary", {}, "Every other setting"), h("label.unseen", { for: "settings-search" }, "Find a setting"), search, all.node),
    h("details", { open: Boolean(form.more) }, h("summary", {}, "As text"), h("label.unseen", { for: "more" }, "Settings as text, one in a line"), text, h("p.hint", {}, "section.key=value, as on the command line. What is wrong is said before the start.")),
    h("details", { open: Boolean(form.file) }, h("summary", {}, "A recipe file of your own"), dropZone({ title: "Drop a recipe (.yaml)", accept: ".yaml,.yml", multiple: false, small: true, take: ([file]) => take(file) }), recipe));
  text.value = form.more;

  function row(setting, chosen, where) {
    const id = `${where}-${setting.key}`, now = values().get(setting.key) ?? "";
    const isPart = setting.kind === "part", usual = isPart ? (chosen?.[0] ?? setting.default) ? "on" : "off" : setting.kind === "switch" ? ON[chosen?.[0] ?? setting.default] ?? "" : shown(chosen?.[0] ?? setting.default);
    const options = setting.kind === "switch" ? ["true", "false"] : setting.choices;
    const attributes = { id, "data-key": setting.key, "aria-describedby": `${id}-about`, onchange: (event) => put(setting.key, event.target.value.trim()) };
    const field = options.length ? h("select", attributes, h("option", { value: "" }, usual ? `as it is: ${usual}` : "as it is"), options.map((value) => h("option", { value, selected: value === now }, isPart ? PART[value] : setting.kind === "switch" ? ON[value] : value)))
      : h("input", { ...attributes, type: setting.kind === "text" ? "text" : "number", step: setting.kind === "whole" ? 1 : "any", min: setting.least, max: setting.most, placeholder: usual, autocomplete: "off" });
    if (!options.length) field.value = now;
    return h("div.setting", { "data-words": `${setting.key} ${setting.about}`.toLowerCase() }, h("label", { for: id }, upper(called(setting.key)), h("code", {}, setting.key)), field,
      h("p.hint", { id: `${id}-about` }, words(ended(upper(setting.about))), setting.of.length && setting.of.length < kinds(setting.key) ? ` Only for ${setting.of.join(", ")}.` : "", chosen ? ` (${chosen[1]})` : ""));
  }
  const kinds = (key) => known.get(`${key.split(".")[0]}.kind`)?.choices.length ?? Infinity;
  /** A section's kind is called as the section; anything else by its own name. */
  function called(key) {
    const [section, ...names] = key.split(".");
    return key === `${section}.kind` ? SECTIONS[section] ?? section : NAMES[key] ?? NAMES[names.at(-1)] ?? names.join(" ").replaceAll("_", " ");
  }
  function put(key, value) {
    const against = ([other, text]) => other === key || (value === "null" && other.startsWith(`${key}.`)) || (text === "null" && key.startsWith(`${other}.`));
    const kept = lines().filter((line) => !against(line.split(/=(.*)/s).map((text) => text.trim())));
    form.more = [...kept, ...(value ? [`${key}=${value}`] : [])].join("\n");
    text.value = form.more;
    mark(); changed();
  }
  /** Shows in every field what the text says, and counts in each section. */
  function mark() {
    const now = values();
    for (const field of node.querySelectorAll("[data-key]")) { if (field !== document.activeElement) field.value = now.get(field.dataset.key) ?? ""; field.closest(".setting").classList.toggle("changed", now.has(field.dataset.key)); }
    for (const group of node.querySelectorAll(".group")) { const count = [...now.keys()].filter((key) => key.startsWith(`${group.dataset.section}.`)).length; group.querySelector(".count").textContent = count ? ` · ${count} set` : ""; }
  }
  function filter() {
    const wanted = search.value.trim().toLowerCase();
    for (const setting of all.node.querySelectorAll(".setting")) setting.hidden = Boolean(wanted) && !setting.dataset.words.includes(wanted);
    for (const group of all.node.querySelectorAll(".group")) { const some = group.querySelector(".setting:not([hidden])"); group.hidden = !some; group.open = Boolean(wanted) && Boolean(some); }
  }
  let of = "", known = new Map();
  async function look() {
    const now = JSON.stringify([form.kind, form.base, form.like]);
    if (now === of || !form.base) return;
    of = now; fault.textContent = "";
    try {
      const told = await post("/api/settings", { kind: form.kind, base: form.base, like: form.like });
      known = new Map(told.settings.map((setting) => [setting.key, setting]));
      const rows = told.settings.map((setting) => [setting, told.chosen[setting.key]]);
      few.show(rows.filter(([, chosen]) => chosen));
      const others = rows.filter(([, chosen]) => !chosen);
      all.show([...new Set(others.map(([setting]) => setting.key.split(".")[0]))].map((name) => [name, others.filter(([setting]) => setting.key.startsWith(`${name}.`))]));
      mark(); filter();
    } catch (error) { of = ""; fault.textContent = error.message; }
  }
  async function take(file) {
    fill(recipe, h("p.hint", {}, `Reading ${file.name}…`));
    try {
      const told = await ask("/api/recipes", { method: "PUT", raw: file });
      form.file = told.file; form.fileName = file.name;
      drawRecipe(told.left);
      changed(told);
    } catch (error) { fill(recipe, h("p.fault", {}, error.message)); }
  }
  function drawRecipe(left = []) {
    if (!form.file) { fill(recipe); return; }
    fill(recipe, h("p", {}, h("b", {}, form.fileName), " is the recipe of this run. Photos, name and base stay those of this page. ", h("button.quiet", { type: "button", onclick: () => { form.file = form.fileName = ""; drawRecipe(); changed(); } }, "Take it out")),
      left.length ? h("p.hint", {}, `Not taken, because they name files or places: ${left.join(", ")}`) : null);
  }
  drawRecipe();
  return { node, look };
}
