// LoRA files of any trainer: what they are, who reads them, other formats, sums.
import { main, h, say, fill, part, ask, post, chore, upper, megabytes, dropZone } from "./parts.js";

const FORMATS = [["kohya", "ComfyUI, A1111, Forge (kohya)"], ["diffusers", "diffusers"], ["peft", "PEFT: a folder, sent as a zip"]];
const MODELS = [["checkpoint", "a whole model in one file: base and LoRA"], ["folder", "a whole model as a diffusers folder, sent as a zip"]];
const choice = (id, options, more = {}) => h("select", { id, ...more }, options.map(([value, text]) => h("option", { value }, text)));

export async function loraView() {
  document.title = "LoRA files · finetune";
  const told = await ask("/api/loras");
  const out = h("div", { role: "status" }), fault = h("p.fault", { role: "alert" });
  const hub = h("input", { type: "text", id: "lora-hub", placeholder: "stable-diffusion-v1-5/stable-diffusion-v1-5", autocomplete: "off", spellcheck: false });
  const hubAsked = h("div", { hidden: true }, h("label", { for: "lora-hub" }, "Hub id"), hub);
  const base = choice("lora-base", [["", "as the file tells"], ["tiny", "the built-in toy"], ...told.bases.map((name) => [`local:${name}`, name]), ["hub", "from the hub"]], { onchange: () => { hubAsked.hidden = base.value !== "hub"; } });
  const named = () => base.value === "hub" ? hub.value.trim() : base.value;
  const list = part("div", {}, (files) => files.length ? h("section", {}, h("h2", {}, "Files here"), h("p.soft", {}, "They stay in this page's own folder until you remove them."), h("div.card", {}, files.map(entry)), files.filter((file) => file.lora).length > 0 ? merging(files.filter((file) => file.lora)) : null) : []);
  const look = async () => list.show((await ask("/api/loras")).files);
  const working = (text) => fill(out, h("p.hint", {}, text), h("progress", { "aria-label": text }));
  const failed = (error) => { fill(out); fault.textContent = error.message; };

  function entry(file) {
    const to = choice(`to-${file.id}`, FORMATS, { "aria-label": `Convert ${file.name} to` });
    return h("div.file", {}, h("div.top", {}, h("div", {}, h("b", {}, file.name), " ", h("span.soft", {}, megabytes(file.size)), file.made ? h("p.hint", {}, file.made) : null),
      h("div.actions", {}, file.lora ? h("button", { type: "button", onclick: () => verify(file) }, "Check") : null,
        h("a.button", { href: `/loras/${file.id}`, download: "" }, "Download"), h("button.quiet", { type: "button", "aria-label": `Remove ${file.name}`, onclick: () => act(async () => { await post(`/api/loras/${file.id}/remove`); await look(); }) }, "Remove"))),
      file.lora ? h("div.line", {}, to, h("button", { type: "button", "aria-label": `Convert ${file.name}`, onclick: () => make(`/api/loras/${file.id}/convert`, { to: to.value }) }, "Convert")) : null);
  }
  function merging(files) {
    const rows = files.map((file) => {
      const chosen = h("input", { type: "checkbox", id: `merge-${file.id}` }), weight = h("input", { type: "number", step: 0.05, "aria-label": `Strength of ${file.name}` });
      weight.value = 1;
      return [file, chosen, weight];
    });
    const to = choice("merge-to", [...FORMATS, ...MODELS]), rank = h("input", { type: "number", id: "merge-rank", min: 1, max: 1024, placeholder: "exact: the ranks add up" });
    return h("section.merge", {}, h("h2", {}, "Merge"), h("p.soft", {}, "Several files into one, or one into a base. 1 is the full strength; 0.5 half of it."), h("div.card", {},
      h("div.head", { "aria-hidden": "true" }, h("b", {}, "File"), h("b", {}, "Strength")),
      rows.map(([file, chosen, weight]) => h("div.line", {}, h("label.tick", { for: chosen.id }, chosen, file.name), weight)),
      h("div.two", {}, h("div", {}, h("label", { for: "merge-to" }, "As"), to), h("div", {}, h("label", { for: "merge-rank" }, "Rank of the new file"), rank)),
      h("div.actions", {}, h("button.first", { type: "button", onclick: () => make("/api/merge", { files: rows.filter(([, chosen]) => chosen.checked).map(([file, , weight]) => [file.id, Number(weight.value)]), to: to.value, rank: rank.value ? Number(rank.value) : null }) }, "Merge"))));
  }
  async function act(doing) { fault.textContent = ""; try { await doing(); } catch (error) { failed(error); } }
  const make = (path, values) => act(async () => {
    working("Writing and checking the file…");
    const { chore: number } = await post(path, { ...values, base: named() });
    const made = await chore(number);
    fill(out, h("section.card.verdict.good", {}, h("p.big", {}, "Written and checked"), h("ul.words", {}, made.checks.map((text) => h("li", {}, upper(text)))), made.read_by.length ? h("p.soft", {}, `Read by ${[...new Set(made.read_by)].join(", ")}`) : null));
    say("Written and checked");
    await look();
  });
  const verify = (file) => act(async () => {
    working(`Reading ${file.name}…`);
    const { chore: number } = await post(`/api/loras/${file.id}/verify`, { base: named() });
    const told = await chore(number), fine = !told.problems.length;
    fill(out, h(`section.card.verdict${fine ? ".good" : ""}`, {}, h("p.big", {}, fine ? "Nothing is wrong with it" : `${told.problems.length} problem${told.problems.length > 1 ? "s" : ""}`), h("p", {}, `${file.name}: ${told.called} for ${told.family}, ${megabytes(told.size)}, rank ${told.ranks.join(", ") || "unknown"}`), h("p.soft", {}, upper(told.compared)),
      told.problems.length + told.notes.length ? h("ul.words", {}, told.problems.map((text) => h("li.warn", {}, upper(text))), told.notes.map((text) => h("li", {}, upper(text)))) : null),
      h("section", {}, h("h2", {}, "Who reads it"), h("div.card", {}, h("dl.places", {}, told.readers.map(([reader, state, why]) => [h("dt", {}, reader), h("dd", {}, h(["fully", "rightly"].includes(state) ? "b.good-text" : "b.bad-text", {}, state), why ? `: ${why}` : "")])))));
  });
  const take = (files) => act(async () => {
    let last = null;
    for (const file of files) {
      working(`Sending ${file.name}…`);
      last = { name: file.name, ...await ask(`/api/loras?name=${encodeURIComponent(file.name)}`, { method: "PUT", raw: file }) };
    }
    await look();
    await verify(last);
  });
  fill(main, h("h1", {}, "LoRA files"), h("p.lead", {}, "Check whether a LoRA file of any trainer loads completely and correctly in your program. Convert it for another program, or merge several."),
    h("section", {}, dropZone({ title: "Drop .safetensors files", hint: "or click to choose", accept: ".safetensors", take }),
      h("details", {}, h("summary", {}, "The base it was trained on"), h("p.hint", {}, "Most files say it themselves. Give it if a check says that the file was not compared, and for a whole model."), h("div.two", {}, h("div", {}, h("label", { for: "lora-base" }, "Base"), base), hubAsked))),
    fault, out, list.node);
  await look();
}
