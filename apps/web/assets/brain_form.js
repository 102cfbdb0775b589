// "I know the true age": the gap, or a preview of teaching it.
// What is typed stays, whatever the server shows meanwhile; it is kept for each scan.
const typed = new Map();
const key = () => element.querySelector("form")?.dataset.scan;
element.addEventListener("input", (event) => {
  const { part } = event.target.dataset;
  if (part) typed.set(key(), { ...typed.get(key()), [part]: event.target.value });
});
let focused = "";
element.addEventListener("focusin", (event) => { focused = event.target.dataset.part ?? ""; });
element.addEventListener("focusout", ({ target }) => {
  setTimeout(() => { if (target.isConnected) focused = ""; }); // else it was shown anew
});
watch("value", () => {
  for (const [part, text] of Object.entries(typed.get(key()) ?? {})) {
    const input = element.querySelector(`[data-part='${part}']`);
    if (input) input.value = text;
  }
  if (focused && document.activeElement === document.body) {
    element.querySelector(`[data-part='${focused}']`)?.focus();
  }
});
const field = (name) => element.querySelector(`[data-part='${name}']`).value.trim();
const tell = (what) => {
  const form = element.querySelector("form");
  const data = { scan: Number(form.dataset.scan), age: field("age"), name: field("name") };
  const line = element.querySelector(".enn-problem");
  const age = Number(data.age.replace(",", "."));
  if ((what === "preview" && !data.age) || !(age >= 0 && age <= 120)) {
    line.textContent = "Give the age in years, from 0 to 120.";
    element.querySelector("[data-part='age']").focus();
    return;
  }
  line.textContent = "";
  trigger(what, data);
};
element.addEventListener("submit", (event) => { event.preventDefault(); tell("preview"); });
element.addEventListener("click", (event) => {
  if (event.target.closest("[data-do='gap']")) tell("gap");
});
