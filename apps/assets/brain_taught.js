// The tab of site profiles: choosing, history, forgetting.
const choose = (name) => { if (name) trigger("choose", { profile: name }); };
element.addEventListener("change", (event) => {
  if (event.target.matches("select[data-do='choose']")) choose(event.target.value);
});
element.addEventListener("submit", (event) => {
  event.preventDefault();
  const field = element.querySelector("[data-part='name']");
  choose(field.value.trim());
});
element.addEventListener("click", (event) => {
  const button = event.target.closest("[data-do]");
  const profile = element.querySelector("[data-profile]")?.dataset.profile;
  if (button?.dataset.do === "undo") {
    trigger("undo", { entry: Number(button.dataset.entry), profile });
  }
  if (button?.dataset.do === "forget") {
    const sure = `Forget everything that the profile “${profile}” was taught? `
      + "It is erased from this server and cannot be brought back.";
    if (window.confirm(sure)) trigger("forget", { profile });
  }
});
watch("value", () => {
  for (const time of element.querySelectorAll("time[datetime]")) {
    time.textContent = new Date(time.dateTime).toLocaleString(undefined,
      { dateStyle: "medium", timeStyle: "short" });
  }
  const form = element.querySelector("[data-profile]");
  if (form) window.ennBrain.keepSite(form.dataset.profile);
});
