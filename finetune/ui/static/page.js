// The web page of `finetune ui`: the list of runs, and the way between the views. No library.
import { main, left, h, fill, part, ask, chip, ago, dropZone, repeat, failed } from "./parts.js";
import { begin, newRun } from "./new_run.js";
import { runView } from "./run.js";
import { loraView } from "./loras.js";

async function home() {
  document.title = "Runs · finetune";
  const list = part("ul.runs", {}, (runs) => runs.map((run) => h("li", {}, runCard(run))));
  const none = h("p.soft", { hidden: true }, "No runs yet. Runs that you start on the command line, in the same folder, appear here too.");
  fill(main, h("h1", {}, "Teach a model your subject"),
    h("p.lead", {}, "From a few photos to an adapter file, with measurements of what it learned and what else it changed."),
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

// ---- the way through the page ----
async function route() {
  left();
  const [, view = "", name = ""] = location.hash.split("/").map(decodeURIComponent);
  document.querySelectorAll("nav a").forEach((link) => { const own = link.getAttribute("href").split("/")[1] ?? ""; const here = own === view || (own === "" && view === "run"); here ? link.setAttribute("aria-current", "page") : link.removeAttribute("aria-current"); });
  scrollTo(0, 0);
  try {
    if (view === "new") await newRun(name);
    else if (view === "run" && name) runView(name);
    else if (view === "lora") await loraView();
    else await home();
  } catch (error) { failed(error); }
}
addEventListener("hashchange", () => { route(); main.focus({ preventScroll: true }); });
route();
