// Scans that are uploaded (as plain bytes, one after the other) or chosen from those offered.
const part = (name) => element.querySelector(`.enn-${name}`);
const problem = (text) => { const line = part("problem"); if (line) line.textContent = text; };
const sending = (text) => { const line = part("sending"); if (line) line.textContent = text; };
const queue = [];
let busy = false;
let first = null; // scan of the files that are sent in one go

const send = (file) => new Promise((resolve) => {
  const box = part("add");
  const query = new URLSearchParams({
    name: file.name, kind: element.querySelector("[data-part='kind']").value,
  });
  const address = new URL(`brain/uploads/${box.dataset.session}?${query}`, document.baseURI);
  const request = new XMLHttpRequest(); // fetch tells no progress
  request.open("POST", address);
  request.setRequestHeader("Content-Type", "application/octet-stream");
  request.upload.onprogress = (event) => {
    const share = Math.round((100 * event.loaded) / Math.max(1, event.total));
    sending(`Uploading: ${share} %${queue.length ? `, ${queue.length} more to come` : ""}`);
  };
  request.onload = () => {
    let answer;
    try { answer = JSON.parse(request.responseText); }
    catch { answer = { error: request.responseText.trim() }; }
    if (answer.scan) {
      trigger("added", { scan: answer.scan, after: first });
      first ??= answer.scan;
    } else problem(answer.error || "The server did not take this file.");
    resolve();
  };
  request.onerror = () => {
    problem("The server cannot be reached. Is it still running?");
    resolve();
  };
  request.send(file);
});

const add = async (files) => {
  const limit = Number(part("add")?.dataset.limit);
  problem("");
  for (const file of files) {
    if (file.size > limit) {
      problem(`This file has ${Math.round(file.size / 2 ** 20)} MB; scans may have `
        + `${Math.round(limit / 2 ** 20)} MB at most.`);
    } else if (!file.size) problem("This file is empty.");
    else queue.push(file);
  }
  if (busy) return;
  busy = true;
  first = null;
  while (queue.length) await send(queue.shift());
  busy = false;
  sending("");
};

element.addEventListener("change", (event) => {
  if (event.target.matches("[data-part='sample']") && event.target.value) {
    problem("");
    trigger("sample", { key: event.target.value });
    event.target.value = "";
  }
  if (event.target.type !== "file" || !event.target.files.length) return;
  add([...event.target.files]);
  event.target.value = ""; // so that the same file can be chosen again
});
element.addEventListener("click", (event) => {
  const chip = event.target.closest("[data-sample]");
  if (chip) { problem(""); trigger("sample", { key: chip.dataset.sample }); }
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
  const files = [...(event.dataTransfer?.files ?? [])];
  if (files.length) add(files);
});
const remember = () => {
  const token = part("add")?.dataset.session;
  if (token) window.ennBrain.keepSession(token);
};
watch("value", remember);
remember();
