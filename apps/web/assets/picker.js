// A picture to search with: chosen, dropped or pasted. It goes to the server as plain bytes.
const problem = (text) => {
  const line = element.querySelector(".enn-problem");
  if (line) line.textContent = text;
};
const busy = (on) => element.querySelector(".enn-picker")?.classList.toggle("enn-busy", on);
const send = async (file) => {
  problem("");
  const limit = Number(element.querySelector(".enn-picker")?.dataset.limit);
  if (file.size > limit) {
    problem(`This file has ${Math.round(file.size / 1e6)} MB; pictures may have `
      + `${Math.round(limit / 2 ** 20)} MB at most.`);
    return;
  }
  busy(true);
  try {
    const reply = await fetch(new URL("uploads", document.baseURI), {
      method: "POST",
      body: file,
      headers: { "Content-Type": "application/octet-stream", Accept: "application/json" },
    });
    const json = reply.headers.get("Content-Type")?.includes("json");
    const answer = json ? await reply.json() : { error: (await reply.text()).trim() };
    if (answer.token) trigger("chosen", { token: answer.token });
    else problem(answer.error || "The server did not take this file.");
  } catch {
    problem("The server cannot be reached. Is it still running?");
  } finally {
    busy(false);
  }
};
element.addEventListener("change", (event) => {
  const input = event.target;
  if (input.type !== "file" || !input.files.length) return;
  send(input.files[0]);
  input.value = ""; // so that the same file can be chosen again
});
element.addEventListener("click", (event) => {
  if (event.target.closest("[data-do='remove']")) trigger("removed");
});
for (const name of ["dragenter", "dragover"]) {
  element.addEventListener(name, (event) => {
    event.preventDefault();
    element.classList.add("enn-dragging");
  });
}
for (const name of ["dragleave", "drop"]) {
  element.addEventListener(name, (event) => {
    event.preventDefault();
    element.classList.remove("enn-dragging");
  });
}
element.addEventListener("drop", (event) => {
  const file = event.dataTransfer?.files?.[0];
  if (file) send(file);
});
document.addEventListener("paste", (event) => {
  const file = [...(event.clipboardData?.files ?? [])].find((f) => f.type.startsWith("image/"));
  if (file && element.isConnected && element.offsetParent) {
    event.preventDefault();
    send(file);
  }
});
