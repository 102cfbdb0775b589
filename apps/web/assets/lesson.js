// The answer to a mark: taking it back, or insisting on it.
element.addEventListener("click", (event) => {
  const button = event.target.closest("[data-do]");
  if (button?.dataset.do === "undo") {
    trigger("undo", { entry: Number(button.dataset.entry), profile: button.dataset.profile });
  }
  if (button?.dataset.do === "force") trigger("force");
});
watch("value", () => window.enn.say(element.querySelector(".enn-told")?.innerText ?? ""));
