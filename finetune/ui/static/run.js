// One run: live, and after its end.
import { main, h, svg, say, fill, part, ask, post, chore, chip, upper, megabytes, duration, code, picture, repeat, failed } from "./parts.js";
import { drawSection } from "./draw.js";
import { hubSection } from "./hub.js";

export function runView(name) {
  document.title = `${name} · finetune`;
  const path = encodeURIComponent(name);
  let about = null, aboutOf = "";
  const title = part("div", {}, (told) => [h("h1", {}, told?.trigger ? `“${told.trigger}”` : name), h("p.soft", {}, told?.base ? `${name} · ${told.base} (${told.family}), ${told.resolution} pixels, ${told.photos} photos` : name)]);
  const buttons = part("div.actions", {}, (state, report, card) => [
    state === "running" || state === "starting" ? h("button", { type: "button", onclick: () => act("stop") }, "Stop") : null,
    ["stopped", "ended", "failed"].includes(state) ? h("button.first", { type: "button", onclick: () => act("resume") }, "Go on") : null,
    report ? h("a.button", { href: `/runs/${path}/report.html`, target: "_blank", rel: "noopener" }, "The whole report") : null,
    card ? h("a.button", { href: `/runs/${path}/card.html`, target: "_blank", rel: "noopener" }, "Model card") : null]);
  const drawing = drawSection(name), hub = hubSection(name);
  const fault = h("p.fault", { role: "alert" });
  const now = part("div.now", {}, drawNow);
  const verdict = part("div", {}, (found, words, state, kept, now) => drawVerdict(found, words, state, kept, now, path));
  const film = part("div", {}, (images, prompts) => drawFilm(images, prompts, path));
  const sides = part("div", {}, (images, prompts) => drawSides(images, prompts, path));
  const loss = part("div", {}, drawLoss);
  const measured = part("div", {}, drawMeasured);
  const files = part("div", {}, (list) => drawFiles(list, path));
  const log = part("div", {}, (lines) => lines.length ? h("details", {}, h("summary", {}, "What it says"), h("pre.log", { tabIndex: 0, role: "region", "aria-label": "Log" }, lines.join("\n"))) : []);
  const origin = part("div", {}, (told) => !told ? [] : h("section", {}, h("h2", {}, "How it was made"), h("details", {}, h("summary", {}, "The plan"), h("dl.facts", {}, Object.entries(told.plan).map(([key, value]) => [h("dt", {}, key), h("dd", {}, value)]))),
    told.command ? h("details", {}, h("summary", {}, "As a command"), code("Command", told.command)) : null, told.recipe ? h("details", {}, h("summary", {}, "The recipe in full"), code("Recipe", told.recipe)) : null));
  fill(main, h("div.head", {}, title.node, buttons.node), fault, now.node, verdict.node, sides.node, drawing.node, files.node, hub.node, film.node, loss.node, measured.node, origin.node, log.node);
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
    buttons.show(told.state, told.report && told.state === "finished", about.has_card);
    hub.show(about.has_card && told.state === "finished");
    drawing.show({ ...about, finished: told.state === "finished" }, told.state === "finished" || about.checkpoints.length > 0);
    title.show({ trigger: about.trigger, base: about.base, family: about.family, resolution: about.resolution, photos: about.photos });
    now.show(told.state, told.phase, told.done, told.total, told.step, told.steps, told.eta, told.loss, told.seconds_per_step, told.error);
    verdict.show(about.verdict, told.verdict_words, told.state, about.checkpoints.includes(about.verdict.step) && about.verdict.step !== told.steps, told.verdict);
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
    state === "ended" ? h("p.soft", {}, "The process ended without a message, for example because the machine was switched off. Go on continues from the last checkpoint.") : null,
    steps ? h("dl.figures", {}, figures.map(([name, value]) => h("div", {}, h("dt", {}, name), h("dd", {}, value)))) : null];
}
/** `kept`: the recommended checkpoint is another than the last, and there to be exported. `now`: the word so far. */
function drawVerdict(found, words, state, kept, now, path) {
  const final = found?.word && state === "finished";
  if (!final && !words) return [];
  const good = (final ? found.word : now) === "good";
  const out = h("p.hint", { role: "status" });
  const step = final && kept ? h("div.actions", {}, h("button", { type: "button", onclick: async (event) => {
    event.target.disabled = true; out.textContent = "Writing and checking the files…";
    try { const { chore: number } = await post(`/api/runs/${path}/export`, { step: found.step }); const told = await chore(number); out.textContent = `${told.map((file) => file.format).join(", ")} of step ${found.step} are written and checked: see Your files.`; } catch (error) { out.textContent = error.message; event.target.disabled = false; }
  } }, `Export step ${found.step}, the recommended one`)) : null;
  return h(`section.card.verdict${good ? ".good" : final ? "" : ".open"}`, { "aria-label": "Verdict" }, h("p.soft", {}, final ? "The verdict" : "The verdict so far"),
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
const STROKES = ["", "7 4", "2 4", "11 3 2 3", "1 2"], TINTS = ["var(--mark)", "var(--good)", "var(--bad)", "var(--soft)", "var(--ink)"];  // as in the report
const W = 1000, H = 190;
function chart(title, lines, band, note) {
  const all = lines.flatMap((line) => line.points.map((point) => point[1])).concat(band ? band.flatMap((row) => [row[2], row[3]]) : []);
  const steps = lines.flatMap((line) => line.points.map((point) => point[0]));
  const last = Math.max(1, ...steps), low = Math.min(0, ...all), high = Math.max(low + 1e-6, ...all) * 1.05;
  const x = (step) => (W * step / last).toFixed(1), y = (value) => (H * (1 - (value - low) / (high - low))).toFixed(1);
  const drawing = svg("svg", { viewBox: `0 0 ${W} ${H}`, preserveAspectRatio: "none", class: "plot", role: "img", "aria-label": title },
    svg("line", { x1: 0, x2: W, y1: y(0), y2: y(0), stroke: "var(--line)", "vector-effect": "non-scaling-stroke" }));
  if (band) drawing.append(svg("path", { d: "M" + band.map((row) => `${x(row[0])},${y(row[3])}`).join("L") + "L" + [...band].reverse().map((row) => `${x(row[0])},${y(row[2])}`).join("L") + "Z", fill: "var(--mark)", opacity: ".14" }));
  lines.forEach((line, index) => drawing.append(svg("polyline", { points: line.points.map(([step, value]) => `${x(step)},${y(value)}`).join(" "), fill: "none", stroke: TINTS[index % 5], "stroke-width": 2, "stroke-dasharray": STROKES[index % 5], "vector-effect": "non-scaling-stroke" })));
  const key = lines.length > 1 ? lines.map((line, index) => h("span.key", {}, svg("svg", { width: 26, height: 8, "aria-hidden": "true" }, svg("line", { x1: 0, x2: 26, y1: 4, y2: 4, stroke: TINTS[index % 5], "stroke-width": 2, "stroke-dasharray": STROKES[index % 5] })), `${line.title} ${line.points.at(-1)[1].toFixed(2)}`)) : [];
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
  return h("section", {}, h("h2", {}, "Measured against the base"), h("p.soft", {}, "The model's predictions compared with the base's: 1 is as much as a prompt changes the base's prediction."), groups.filter(([, lines]) => lines.length).map(([title, lines, note]) => h("div.card", {}, chart(title, lines, null, note))));
}
const checkedWords = (checks) => !checks.length ? "Not checked" : !checks.every((check) => check.passed) ? "A check failed" : checks.length === 1 ? "Its check passed" : `${checks.length} checks passed`;
function drawFiles(list, path) {
  if (!list?.length) return [];
  return h("section", {}, h("h2", {}, "Your files"), h("p.soft", {}, list.every((file) => file.checks.length) ? "Each was opened again and compared with what was trained." : "Under each file you see which checks it passed."), h("div.card", {}, list.map((file) => h("div.file", {},
    h("div.top", {}, h("div", {}, h("b", {}, file.step ? `${file.format}, step ${file.step}` : file.format), " ", h("span.soft", {}, `${file.path.split("/").pop()}, ${megabytes(file.size)}`)), h("a.button", { href: `/runs/${path}/files/${file.path.split("/").map(encodeURIComponent).join("/")}`, download: "" }, "Download")),
    h("dl.places", {}, Object.entries(file.places).map(([program, place]) => [h("dt", {}, program), h("dd", {}, "put it here: ", h("code", {}, place))])),
    h("details", {}, h("summary", {}, checkedWords(file.checks)), h("ul", {}, file.checks.map((check) => h(check.passed ? "li" : "li.bad-text", {}, check.line)), file.limits.map((text) => h("li.soft", {}, text))))))));
}
