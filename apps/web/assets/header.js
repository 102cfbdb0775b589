window.enn.applyTheme();
element.addEventListener("click", (event) => {
  if (event.target.closest("[data-do='theme']")) window.enn.switchTheme();
});
