element.addEventListener("click", (event) => {
  const chip = event.target.closest("[data-query]");
  if (chip) trigger("pick", { query: chip.dataset.query });
});
