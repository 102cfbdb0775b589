// What teaching would do or has done: accepting, dismissing, undoing.
element.addEventListener("click", (event) => {
  const button = event.target.closest("[data-do]");
  const what = button?.dataset.do;
  if (what === "accept") {
    const { scan, age, profile, force } = element.querySelector("[data-scan]").dataset;
    button.disabled = true;
    const id = window.enn.marks.newId();
    trigger("accept", { scan: Number(scan), age, profile, force: force === "true", id });
  }
  if (what === "dismiss") trigger("dismiss");
  if (what === "undo") {
    button.disabled = true;
    trigger("undo", { entry: Number(button.dataset.entry), profile: button.dataset.profile });
  }
});
watch("value", () => {
  const box = element.querySelector(".enn-preview-lesson, .enn-lesson, .enn-notice");
  if (!box) return;
  window.enn.say(box.querySelector(".enn-told, .enn-protects")?.innerText ?? box.innerText);
  const calm = window.matchMedia("(prefers-reduced-motion: reduce)").matches;
  box.scrollIntoView({ block: "nearest", behavior: calm ? "auto" : "smooth" });
});
