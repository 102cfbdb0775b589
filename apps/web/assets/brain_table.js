// All scans of the session: deleting them at once.
element.addEventListener("click", (event) => {
  if (!event.target.closest("[data-do='clear']")) return;
  if (window.confirm("Delete all scans of this session from this server?")) trigger("clear");
});
