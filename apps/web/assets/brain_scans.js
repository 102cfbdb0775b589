// The row of the session's scans: choosing and deleting.
element.addEventListener("click", (event) => {
  const button = event.target.closest("[data-do]");
  const scan = Number(button?.closest("[data-scan]")?.dataset.scan);
  if (button?.dataset.do === "choose") trigger("choose", { scan });
  if (button?.dataset.do === "remove") trigger("remove", { scan });
});
