// Opening a card, its actions, and walking over the grid with the arrow keys.
const act = (what, token) => {
  if (what === "like") trigger("like", { token });
  if (what === "describe") trigger("describe", { token });
};
element.addEventListener("click", (event) => {
  const button = event.target.closest("[data-do]");
  const card = button?.closest(".enn-card");
  if (!card) return;
  if (button.dataset.do === "open") window.enn.open(card, act);
  else act(button.dataset.do, card.dataset.token);
});
element.addEventListener("keydown", (event) => {
  if (!event.target.matches(".enn-open")) return;
  const all = [...element.querySelectorAll(".enn-open")];
  const at = all.indexOf(event.target);
  const top = all[0].offsetTop;
  const columns = all.findIndex((b) => b.getBoundingClientRect().top
    > all[0].getBoundingClientRect().top + 4);
  const perRow = columns < 0 ? all.length : columns;
  const by = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -perRow, ArrowDown: perRow }[event.key];
  const next = by && all[at + by];
  if (next) { event.preventDefault(); next.focus(); }
});
// A picture that was moved or deleted since it was indexed.
element.addEventListener("error", (event) => {
  if (event.target.tagName === "IMG") event.target.closest(".enn-open")?.classList.add("enn-gone");
}, true);
element.addEventListener("load", (event) => {
  if (event.target.tagName === "IMG") event.target.closest(".enn-open")?.classList.remove("enn-gone");
}, true);
watch("value", () => {
  const box = element.getBoundingClientRect();
  if (box.top < 0) element.scrollIntoView({ block: "start" });
});
