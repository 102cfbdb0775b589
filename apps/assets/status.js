element.addEventListener("click", (event) => {
  if (event.target.closest("[data-do='clear']")) trigger("clear");
});
