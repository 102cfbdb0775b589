// The tab of what was taught, on both pages: profiles, history, files.
const problem = (text) => {
  const line = element.querySelector(".enn-problem");
  if (line) line.textContent = text;
};
const choose = (name) => { if (name) trigger("choose", { profile: name }); };
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
  field.value = "";
});
element.addEventListener("click", (event) => {
  const button = event.target.closest("[data-do]");
  const what = button?.dataset.do;
  const profile = element.querySelector("[data-profile]")?.dataset.profile;
  if (what === "undo") trigger("undo", { entry: Number(button.dataset.entry), profile });
  if (what === "forget") {
    const sure = `Forget everything that the profile “${profile}” was taught? `
      + "It is erased from this server and cannot be brought back.";
    if (window.confirm(sure)) {
      window.enn.forgotten?.(profile);
      trigger("forget", { profile });
    }
  }
});
const show = () => {
  for (const time of element.querySelectorAll("time[datetime]")) {
    time.textContent = new Date(time.dateTime).toLocaleString(undefined,
      { dateStyle: "medium", timeStyle: "short" });
  }
  const form = element.querySelector("[data-profile]");
  if (form) window.enn.remember(form.dataset.profile);
  window.enn.say(element.querySelector(".enn-notice")?.innerText ?? "");
};
watch("value", show);
