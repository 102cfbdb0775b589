// The result or progress of the chosen scan; it also says what the viewer is to show.
const show = () => {
  window.ennBrain.view({ ...(element.querySelector(".enn-view")?.dataset ?? {}) });
  const age = element.querySelector("[data-part='age']");
  const refused = element.querySelector(".enn-refused");
  if (age) window.enn.say(`Predicted age ${age.textContent} years`);
  else if (refused) window.enn.say(refused.innerText);
};
watch("value", show);
show();
