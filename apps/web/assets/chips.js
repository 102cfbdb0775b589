element.addEventListener("click", (event) => {
  const chip = event.target.closest("[data-query]");
  if (!chip) return;
  chip.scrollIntoView({ block: "nearest", inline: "nearest" }); // phones show them in one long row
  trigger("pick", { query: chip.dataset.query });
});
