// The tab of site profiles: choosing, history, forgetting.
const choose = (name) => { if (name) trigger("choose", { profile: name }); };
const problem = (text) => { element.querySelector(".enn-problem").textContent = text; };
element.addEventListener("change", async (event) => {
  const field = event.target;
  if (field.matches("select[data-do='choose']")) choose(field.value);
  if (field.type !== "file" || !field.files.length) return;
  const file = field.files[0], address = field.dataset.address;
  field.value = "";
  problem("");
  try {
    const reply = await fetch(new URL(address, document.baseURI), {
      method: "POST",
      body: file,
      headers: { "Content-Type": "application/octet-stream", Accept: "application/json" },
    });
    const json = reply.headers.get("Content-Type")?.includes("json");
    const answer = json ? await reply.json() : { error: (await reply.text()).trim() };
    if (answer.error) problem(answer.error);
    else trigger("imported", { count: answer.imported });
  } catch {
    problem("The server cannot be reached. Is it still running?");
  }
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
