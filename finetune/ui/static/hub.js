// Sending a run's files to the Hugging Face hub: what would be sent is shown before.
import { h, say, fill, ask, post, chore, megabytes } from "./parts.js";

export function hubSection(run) {
  const path = encodeURIComponent(run);
  const fault = h("p.fault", { role: "alert" }), out = h("div", { role: "status" }), list = h("ul.words");
  const repo = h("input", { type: "text", id: "hub-repo", placeholder: `your-name/${run}`, autocomplete: "off", spellcheck: false });
  const token = h("input", { type: "password", id: "hub-token", autocomplete: "off", spellcheck: false, placeholder: "empty: this machine's own login" });
  const open = h("input", { type: "checkbox", id: "hub-private", checked: true });
  const go = h("button.first", { type: "submit" }, "Send");
  const form = h("form", { onsubmit: (event) => { event.preventDefault(); send(); } }, h("p.soft", {}, "These files leave this machine, and nothing else. The token is used once and not kept."), list,
    h("div.two", {}, h("div", {}, h("label", { for: "hub-repo" }, "Where to"), repo), h("div", {}, h("label", { for: "hub-token" }, "A token that may write"), token)),
    h("label.tick", { for: "hub-private" }, open, "Only for me"), h("div.actions", {}, go), fault, out);
  const details = h("details", { ontoggle: () => { if (details.open) look(); } }, h("summary", {}, "Put it on the Hugging Face hub"), form);
  const node = h("section.share", { hidden: true }, h("h2", {}, "Share it"), details);
  async function look() {
    try {
      const { files } = await ask(`/api/runs/${path}/push`);
      fill(list, files.map(([name, size]) => h("li", {}, name, " ", h("span.soft", {}, megabytes(size)))));
      go.disabled = !files.length;
    } catch (error) { fault.textContent = error.message; }
  }
  async function send() {
    fault.textContent = ""; go.disabled = true;
    fill(out, h("p.hint", {}, "Sending…"), h("progress", { "aria-label": "Sending" }));
    try {
      const asked = post(`/api/runs/${path}/push`, { repo: repo.value, token: token.value, private: open.checked });
      token.value = "";
      const told = await chore((await asked).chore);
      fill(out, h("p", {}, `${told.files} files are there: `, h("a", { href: told.url, target: "_blank", rel: "noopener noreferrer" }, told.url)));
      say("The files are on the hub");
    } catch (error) { fill(out); fault.textContent = error.message; }
    go.disabled = false;
  }
  return { node, show: (ready) => { node.hidden = !ready; } };
}
