// The photos of a new run: what was found, and what a person does with each.
import { h, say, fill, part, ask, post, chore, upper, dropZone, enlarge } from "./parts.js";

const DONE = { crop: "Cropped", mask: "Masked" };
const TRIES = { crop: "Crop", mask: "Mask" };

export function photoStep(form, state, changed) {
  const doing = h("div", { role: "status" }), fault = h("p.fault", { role: "alert" });
  const list = part("div", {}, (found, out, changes, trials) => found ? drawPhotos(found, out, changes, trials) : []);
  const node = h("section.step", {}, h("h2", {}, "Photos"), h("p.soft", {}, "Every photo is looked at. Leave out what does not show the thing well."),
    dropZone({ title: "Add photos", accept: "image/*,.heic,.heif,.avif,.zip,.txt", small: true, take: (files) => send(files) }), doing, fault, list.node);
  const versions = {};  // photo -> a number that changes with its copies, so that the browser shows the new ones
  let changes = {}, trials = {};
  const source = (name, size) => `/api/sets/${form.set}/small/${encodeURIComponent(name)}.${size}.jpg?v=${versions[name] ?? 0}`;
  const triedSource = (trial, size) => { const [change, name] = [trial.shown.split("/")[0], trial.shown.split("/").slice(1).join("/")]; return `/api/sets/${form.set}/small/${encodeURIComponent(name)}.${size}.jpg?tried=${change}&v=${trial.number}`; };
  const draw = () => list.show(state.found ?? { files: [], problems: [], notes: [] }, state.out, changes, trials);
  const counted = (number, word) => `${number} ${word}${number === 1 ? "" : "s"}`;
  function drawPhotos(found, out, changes, trials) {
    const good = found.files.filter((file) => file.verdict === "good").length;
    const images = found.files.filter((file) => file.shown).map((file) => ({ src: source(file.name, "large"), alt: file.name }));
    const ready = Object.entries(trials).filter(([, trial]) => trial.changes);
    return [h("p", {}, h("b", {}, `${counted(found.files.length, "photo")}: `), good === found.files.length ? "nothing to do." : `${good} good, ${found.files.length - good} to look at.`),
      found.problems.length || found.notes.length ? h("ul.words", {}, found.problems.map((text) => h("li.warn", {}, upper(text))), found.notes.map((text) => h("li", {}, upper(text)))) : null,
      found.files.length > 1 ? h("div.actions", { role: "group", "aria-label": "All photos" },
        ready.length > 1 ? [h("button.first", { type: "button", onclick: () => keep(ready) }, `Use all ${ready.length}`), h("button", { type: "button", onclick: () => { drop(ready.map(([name]) => name)); } }, "Use none")]
          : Object.entries(TRIES).map(([change, word]) => h("button.quiet", { type: "button", onclick: () => attempt(change, found.files.filter((file) => file.shown).map((file) => file.name)) }, `${word} all around what they show`.replace("Mask all around what they show", "Mask the background of all")))) : null,
      h("ul.photos", {}, found.files.map((file) => photoCard(file, images, changes[file.name] ?? [], trials[file.name])), out.map((name) => outCard(name)))];
  }
  function photoCard(file, images, done, trial) {
    const tried = trial?.changes ? [{ src: source(file.name, "large"), alt: `${file.name}, as it is` }, { src: triedSource(trial, "large"), alt: `${file.name}, ${DONE[trial.change].toLowerCase()}` }] : null;
    const index = tried ? 1 : images.findIndex((image) => image.alt === file.name);
    const caption = h("input", { type: "text", value: file.caption ?? "", placeholder: "caption (not needed)", "aria-label": `Caption of ${file.name}`, onchange: () => write(file, caption.value) });
    return h(`li.photo${file.verdict === "leave out" ? ".worst" : ""}${tried ? ".tried" : ""}`, {},
      index < 0 ? h("div.zoom.none", {}, "can't be shown") : h("button.zoom", { type: "button", "aria-label": `Enlarge ${(tried ?? images)[index].alt}`, onclick: () => enlarge(tried ?? images, index) }, h("img", { src: tried ? triedSource(trial, "small") : source(file.name, "small"), alt: "", loading: "lazy" })),
      h("div.text", {}, h("b", { title: file.name }, file.name), tried ? h("p", {}, trialWords(trial)) : h("ul", {},
        trial ? h("li.bad-text", {}, `Not ${DONE[trial.change].toLowerCase()}: ${trial.why}`) : null,
        file.shown ? file.problems.map((text) => h("li.bad-text", {}, upper(text))) : h("li.bad-text", {}, `This photo can't be read (${file.problems[0] ?? "unknown"}): leave it out, or send the file again.`), file.notes.map((text) => h("li.soft", {}, upper(text))),
        done.length ? h("li.good-text", {}, upper(done.map((change) => DONE[change].toLowerCase()).join(", then "))) : null,
        file.problems.length + file.notes.length + done.length ? null : h("li.good-text", {}, "Good")), tried ? null : caption),
      h("div.foot", {}, tried ? [button("Use it", file.name, () => keep([[file.name, trial]])), button("Don't", file.name, () => drop([file.name]))]
        : [file.shown ? Object.entries(TRIES).filter(([change]) => !(change === "mask" && done.includes("mask"))).map(([change, word]) => button(word, file.name, () => attempt(change, [file.name]))) : null,
          done.length ? button("Undo", file.name, () => act("undo", { name: file.name })) : null,
          button("Leave out", file.name, () => act("out", { name: file.name, out: true }))]));
  }
  const button = (word, name, onclick) => h("button.quiet", { type: "button", "aria-label": `${word} ${name}`, onclick }, word);
  function trialWords(trial) { return trial.change === "crop" ? upper(trial.why) : `Training learns only from the part that is not covered, ${trial.why.replace("white is ", "")}`; }
  function outCard(name) {
    return h("li.photo.out", {}, h("div.zoom", {}, h("img", { src: source(name, "small"), alt: "" })), h("div.text", {}, h("b", { title: name }, name), "Left out"),
      h("div.foot", {}, button("Take back", name, () => act("out", { name, out: false }))));
  }
  async function write(file, text) {
    fault.textContent = "";
    try { await post(`/api/sets/${form.set}/caption`, { name: file.name, text }); file.caption = text.trim() || null; say(`Caption of ${file.name} is kept`); changed(); } catch (error) { fault.textContent = error.message; }
  }
  function drop(names) { for (const name of names) delete trials[name]; trials = { ...trials }; draw(); }
  async function attempt(change, names) {
    fault.textContent = "";
    const bar = (done, total) => fill(doing, h("p.hint", {}, `${change === "crop" ? "Looking for what each photo shows" : "Looking for the background"}: ${done} of ${total}`), h("progress", { max: total, value: done, "aria-label": "Trying" }));
    bar(0, names.length);
    try {
      const { chore: number } = await post(`/api/sets/${form.set}/try`, { names, change, resolution: state.resolution });
      const found = await chore(number, (progress) => { if (progress) bar(progress[0], progress[1]); });
      for (const [name, trial] of Object.entries(found)) trials[name] = { ...trial, change, number };
      trials = { ...trials };
      draw();
      const ready = Object.values(found).filter((trial) => trial.changes).length;
      say(names.length === 1 ? ready ? `${names[0]}: see what it would be, then use it or not` : `${names[0]}: nothing was changed` : `${ready} of ${names.length} can be used`);
    } catch (error) { fault.textContent = error.message; }
    fill(doing);
  }
  async function keep(ready) {
    fault.textContent = "";
    for (const [name, trial] of ready) {
      try { await post(`/api/sets/${form.set}/keep`, { name, change: trial.change }); delete trials[name]; } catch (error) { fault.textContent = error.message; }
    }
    await check(fault.textContent);
  }
  async function act(what, values) {
    fault.textContent = "";
    try { await post(`/api/sets/${form.set}/${what}`, values); } catch (error) { fault.textContent = error.message; return; }
    delete trials[values.name];
    if (what === "out") say(values.out ? `${values.name} is left out` : `${values.name} is back`);
    if (what === "undo") say(`${values.name} is as it was before`);
    await check();
  }
  async function send(files) {
    const refused = [];
    for (const [index, file] of files.entries()) {
      fill(doing, h("p.hint", {}, `Sending ${index + 1} of ${files.length}`), h("progress", { max: files.length, value: index, "aria-label": "Sending photos" }));
      try {
        const { unused } = await ask(`/api/sets/${form.set}/files?name=${encodeURIComponent(file.name)}`, { method: "PUT", raw: file });
        if (unused.length) refused.push(`${file.name} also holds what is no photo and no caption, which was left out: ${unused.join(", ")}`);
      } catch (error) { refused.push(error.message); }
    }
    await check();
    if (refused.length) fault.textContent = refused.slice(0, 5).join("; ") + (refused.length > 5 ? `; and ${refused.length - 5} more` : "");
  }
  let current = 0;
  async function check(keptFault = "") {
    const own = ++current;
    fill(doing, h("p.hint", {}, "Looking at the photos…"), h("progress", { "aria-label": "Looking at the photos" }));
    fault.textContent = keptFault;
    try {
      const { chore: number } = await post(`/api/sets/${form.set}/check`, { resolution: state.resolution });
      const found = await chore(number, (progress) => { if (progress && own === current) fill(doing, h("p.hint", {}, `Looking at photo ${progress[0]} of ${progress[1]}`), h("progress", { max: progress[1], value: progress[0], "aria-label": "Looking at the photos" })); });
      if (own !== current) return;
      found.files.sort((one, other) => one.name.localeCompare(other.name));
      state.found = found;
      for (const file of found.files) versions[file.name] = file.shown;
      ({ left_out: state.out, changed: changes } = await ask(`/api/sets/${form.set}`));
      draw();
      node.classList.toggle("done", found.files.length > 0);
    } catch (error) { if (own === current) { fault.textContent = error.message; state.found = null; ({ left_out: state.out, changed: changes } = await ask(`/api/sets/${form.set}`)); draw(); } }
    if (own === current) { fill(doing); changed(); }
  }
  return { node, send, check };
}
