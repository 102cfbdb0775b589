// Above the results: starting again, and with or without what was taught.
const actions = ["clear", "include", "exclude", "profile"];
element.addEventListener("click", (event) => {
  const what = event.target.closest("[data-do]")?.dataset.do;
  if (actions.includes(what)) trigger(what);
});
