// What teaching would do or has done: accepting, dismissing, undoing.
element.addEventListener("click", (event) => {
  const button = event.target.closest("[data-do]");
  const what = button?.dataset.do;
  if (what === "accept") {
    const { scan, age, name, profile, force } = element.querySelector("[data-scan]").dataset;
    button.disabled = true;
    const id = window.enn.marks.newId();
    const lesson = { scan: Number(scan), age, name, profile, force: force === "true", id };
    window.ennBrain.hold(lesson);
    trigger("accept", lesson);
  }
  if (what === "dismiss") trigger("dismiss");
  if (what === "undo") {
    button.disabled = true;
    trigger("undo", { entry: Number(button.dataset.entry), profile: button.dataset.profile });
  }
});
window.ennBrain.whenOpen((session) => {
  const lesson = window.ennBrain.held();
  if (!lesson) return;
  if (lesson.session === session) trigger("accept", lesson);
  else {
    window.ennBrain.release();
    window.enn.tell("The server has ended and with it the scans that it held: the age that was told "
      + "last was not answered. See Site profiles for what was learned.");
  }
});
watch("value", () => {
  const box = element.querySelector(".enn-preview-lesson, .enn-lesson, .enn-notice");
  if (!box) return;
  window.ennBrain.release(); // answered
  window.enn.say(box.querySelector(".enn-told, .enn-protects")?.innerText ?? box.innerText);
  const calm = window.matchMedia("(prefers-reduced-motion: reduce)").matches;
  box.scrollIntoView({ block: "nearest", behavior: calm ? "auto" : "smooth" });
});
