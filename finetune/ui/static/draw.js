// The prompt box of a run: any checkpoint at any strength, one side or two, and all that was drawn before.
import { h, say, fill, part, ask, post, chore, picture, duration } from "./parts.js";

/** A choice of checkpoint and strength. `options`: [value, text]; a value is "" for nothing, "base", or a run's name. */
function sidePicker(title, options, first, abouts) {
  const id = title.replaceAll(" ", "-").toLowerCase();
  const shown = h("output", { for: `${id}-strength` }, "1");
  const strength = h("input", { type: "range", id: `${id}-strength`, min: 0, max: 1.5, step: 0.05, value: 1, oninput: () => { shown.textContent = strength.value; } });
  strength.value = "1";
  const step = h("select", { id: `${id}-step` });
  const stepAsked = h("div", {}, h("label", { for: `${id}-step` }, "As it was after"), step);
  const strengthAsked = h("div", {}, h("label", { for: `${id}-strength` }, "Strength ", shown), strength, h("p.hint.ends", {}, h("span", {}, "0: the base alone"), h("span", {}, "1: as trained")));
  const source = h("select", { id, onchange: () => look() }, options.map(([value, text]) => h("option", { value, selected: value === first }, text)));
  const node = h("div.side", {}, options.length > 1 ? h("div", {}, h("label", { for: id }, title), source) : null, stepAsked, strengthAsked);
  async function look() {
    const chosen = source.value, run = chosen && chosen !== "base";
    stepAsked.hidden = strengthAsked.hidden = !run;
    if (!run) return;
    const about = abouts[chosen] ??= await ask(`/api/runs/${encodeURIComponent(chosen)}`);
    const best = about.verdict?.step, before = step.value;
    fill(step, h("option", { value: "" }, about.finished ? "all steps: the result" : "the newest step"), [...about.checkpoints].reverse().map((number) => h("option", { value: number }, number === best ? `step ${number}, the recommended one` : `step ${number}`)));
    step.value = before;
    if (step.selectedIndex < 0) step.value = "";
    strengthAsked.hidden = !about.has_strength;
  }
  return { node, look, set(side) {
    source.value = side ? side.base ? "base" : side.run : "";
    return look().then(() => { if (side) { step.value = side.step ?? ""; strength.value = side.weight; shown.textContent = strength.value; } });
  }, value(run) {
    const chosen = source.value;
    if (!chosen) return null;
    if (chosen === "base") return { run, base: true };
    return { run: chosen, step: step.value ? Number(step.value) : null, weight: strengthAsked.hidden ? 1 : Number(strength.value) };
  } };
}

export function drawSection(run) {
  const path = encodeURIComponent(run);
  const abouts = {};
  const fault = h("p.fault", { role: "alert" }), doing = h("div", { role: "status" });
  const prompt = h("input", { type: "text", id: "draw-prompt", maxLength: 2000, autocomplete: "off" });
  const field = (id, type, text, value, more = {}) => { const input = h("input", { type, id, ...more }); input.value = value; return [input, h("div", {}, h("label", { for: id }, text), input)]; };
  const [count, countAsked] = field("draw-count", "number", "Images", 4, { min: 1, max: 8 });
  const [seed, seedAsked] = field("draw-seed", "number", "First seed", 0, { min: 0 });
  const [steps, stepsAsked] = field("draw-steps", "number", "Steps of drawing", 25, { min: 1, max: 150 });
  const [guidance, guidanceAsked] = field("draw-guidance", "number", "Guidance: how closely the prompt is followed", "", { min: 0, max: 50, step: "any", placeholder: "as in the run" });
  const [negative, negativeAsked] = field("draw-negative", "text", "What it should not show", "");
  const mine = h("div"), other = h("div");
  let one = null, two = null, begun = null, seen = "";
  const go = h("button.first", { type: "submit", disabled: true }, "Draw");
  const list = part("div", {}, (drawn) => drawn.map((each) => drawing(each)));
  const form = h("form.card.try", { onsubmit: (event) => { event.preventDefault(); draw(); } },
    h("div", {}, h("label", { for: "draw-prompt" }, "What to draw"), prompt), h("div.sidesby", {}, mine, other),
    h("details", {}, h("summary", {}, "Seeds and more"), h("div.two", {}, countAsked, seedAsked, stepsAsked, guidanceAsked), negativeAsked),
    h("div.actions", {}, go), fault, doing);
  const node = h("section", { hidden: true }, h("h2", {}, "Draw with it"), h("p.soft", {}, "Draw any prompt with any kept checkpoint, at any strength. A comparison uses the same prompt and seeds."), form, list.node);

  async function begin(about) {
    prompt.value ||= about.prompts[0] ?? about.trigger;
    const others = (await ask("/api/home")).runs.map((each) => each.name).filter((name) => name !== run);
    one = sidePicker("With", [[run, "this run"]], run, abouts);
    two = sidePicker("Compare with", [["", "nothing"], ["base", "the base alone"], [run, "this run"], ...others.map((name) => [name, name])], "", abouts);
    fill(mine, one.node); fill(other, two.node);
    await Promise.all([one.look(), two.look(), look()]);
    go.disabled = false; node.hidden = false;
  }
  async function look() { list.show((await ask(`/api/runs/${path}/drawn`)).drawn); }
  async function draw() {
    fault.textContent = ""; go.disabled = true;
    const began = Date.now();
    fill(doing, h("p.hint", {}, "Opening the base…"), h("progress", { "aria-label": "Drawing" }));
    const wish = { prompt: prompt.value, negative: negative.value, seed: Number(seed.value), count: Number(count.value), steps: Number(steps.value),
      guidance: guidance.value === "" ? null : Number(guidance.value), sides: [one.value(run), two.value(run)].filter(Boolean) };
    try {
      const { chore: number } = await post(`/api/runs/${path}/draw`, wish);
      await chore(number, (progress) => { if (progress) fill(doing, h("p.hint", {}, `${progress[0]} of ${progress[1]} images`), h("progress", { max: progress[1], value: progress[0], "aria-label": "Drawing" })); });
      await look();
      say(`Drawn in ${duration((Date.now() - began) / 1000)}`);
    } catch (error) { fault.textContent = error.message; }
    fill(doing); go.disabled = false;
  }
  function drawing(each) {
    const named = each.sides.map((side) => side.base ? "the base alone" : [side.run === run ? "" : side.run, side.step === null ? "the result" : `step ${side.step}`, side.weight === 1 ? "" : `strength ${side.weight}`].filter(Boolean).join(", "));
    const seeds = Array.from({ length: each.count }, (_, number) => each.seed + number);
    const images = each.sides.map((_, number) => seeds.map((value) => ({ src: `/drawn/${each.name}/${number}/00-${value}.png`, alt: `${each.prompt}, ${named[number]}, seed ${value}` })));
    const all = seeds.flatMap((_, index) => images.map((row) => row[index]));  // seed by seed, so that the arrow keys compare
    return h("div.card.drawing", {}, h("div.top", {}, h("p.prompt", {}, each.prompt), h("div.foot", {},
      h("button.quiet", { type: "button", "aria-label": `Again, with these settings: ${each.prompt}`, onclick: () => again(each) }, "Again"),
      h("button.quiet", { type: "button", "aria-label": `Remove: ${each.prompt}`, onclick: async () => { try { await post(`/api/drawn/${each.name}/remove`); await look(); } catch (error) { fault.textContent = error.message; } } }, "Remove"))),
      named.map((name, side) => [h("p.hint", {}, name), h("div.seeds", {}, seeds.map((_, index) => picture(all, index * each.sides.length + side)))]),
      h("p.hint", {}, `Seed${seeds.length > 1 ? "s" : ""} ${seeds[0]}${seeds.length > 1 ? ` to ${seeds.at(-1)}` : ""}${each.negative ? `; not: ${each.negative}` : ""}`), (each.notes ?? []).map((text) => h("p.hint", {}, text)));
  }
  async function again(each) {
    prompt.value = each.prompt; negative.value = each.negative; seed.value = each.seed; count.value = each.count; steps.value = each.steps; guidance.value = each.guidance ?? "";
    await one.set(each.sides[0].base || each.sides[0].run !== run ? { run, step: null, weight: 1 } : each.sides[0]);
    await two.set(each.sides[1]);
    prompt.focus();
  }
  /** Of a run that works, there are other checkpoints each time. */
  function show(about, drawable) {
    const now = JSON.stringify([about.finished, about.checkpoints, about.verdict?.step]);
    if (!drawable || now === seen) return;
    seen = now; abouts[run] = about;
    begun = (begun ? begun.then(() => Promise.all([one.look(), two.look()])) : begin(about)).catch((error) => { fault.textContent = error.message; node.hidden = false; });
  }
  return { node, show };
}
