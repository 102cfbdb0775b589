// "I know the true age": the gap, or a preview of teaching it.
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
