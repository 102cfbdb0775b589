// Results: opening a card, walking over the grid, and marking pictures good or bad.
const grid = () => element.querySelector(".enn-grid");
const all = () => [...element.querySelectorAll(".enn-card")];
const cardOf = (token) => all().find((card) => card.dataset.token === token);
const markable = () => grid()?.dataset.query !== undefined;

// Marks go to the server one batch at a time: what is clicked while one is on its way waits for
// the answer. A button counts as pressed only when the server has answered that it is kept.
let serial = 0, sent = null, timer = 0;
let queue = [];        // [{id, place, query, picture, profile, marks: {token: "good" | "bad" | "none"}}]
let place = "";        // of which collections and visitor the page is: marks are for no others
let known = {};        // marks of pictures that are no longer shown
let query;             // what `known` belongs to, see `asking`
let focused = null;    // {token, what, keyboard}: where the focus is, and how it came there

// Words and picture of a search as one text; pages of before sent no picture.
const asking = (of) => (of?.query === undefined ? undefined : `${of.picture ?? ""}\n${of.query}`);
const pending = (token) => {
  for (const batch of [...queue].reverse()) if (token in batch.marks) return batch.marks[token];
  return sent?.marks[token];
};
const kept = (token) => cardOf(token)?.dataset.mark ?? known[token] ?? "none";
const paint = (token) => {
  const state = pending(token), card = cardOf(token);
  for (const button of card?.querySelectorAll(".enn-thumb") ?? []) {
    button.setAttribute("aria-pressed", String(kept(token) === button.dataset.do));
    button.classList.toggle("enn-pending", state !== undefined && state !== kept(token)
      && [state, kept(token)].includes(button.dataset.do));
  }
  window.enn.refresh();
};
const mark = (token, what) => {
  if (!markable()) return;
  note(document.activeElement);
  const { query: words, picture, profile } = grid().dataset;
  const last = queue.at(-1);
  const now = pending(token) ?? kept(token);
  // What was sent already may have been learned as it was.
  const same = asking(last) === asking(grid().dataset) && last.profile === profile && last.place === place;
  if (!same || last.tried) {
    queue.push({ id: window.enn.marks.newId(), place, query: words, picture, profile, marks: {} });
  }
  const batch = queue.at(-1);
  const earlier = [...queue.slice(0, -1)].reverse().find((each) => token in each.marks) ?? sent;
  const next = now === what ? "none" : what;
  // What is as it was before is no mark: the server has nothing to take back.
  if (next === (earlier?.marks[token] ?? kept(token))) delete batch.marks[token];
  else batch.marks[token] = next;
  if (Object.keys(batch.marks).length) window.enn.marks.hold(batch);
  else window.enn.marks.release(queue.pop().id);
  paint(token);
  flush();
};
const flush = () => {
  if (sent || !queue.length) return;
  sent = { ...queue.shift(), answer: ++serial, tried: true };
  trigger("mark", sent);
  clearTimeout(timer);
  timer = setTimeout(late, 2500);
};
const count = (batches) => batches.reduce((sum, each) => sum + Object.keys(each.marks).length, 0);
const tell = () => {
  const all = window.enn.marks.waiting();
  const here = all.filter((each) => each.place === place);
  window.enn.tellWaiting(count(here), count(all) - count(here), place);
};
// No answer yet. Where the server is gone, Gradio loads the page again as soon as it is back; where
// only the answer got lost, the marks are sent once more: they are learned once.
const late = () => {
  tell();
  timer = setTimeout(() => { if (sent) { queue.unshift(sent); sent = null; flush(); } }, 60000);
};
// Marks of this page before it was loaded again, and of tabs that are closed.
const resume = () => {
  const known = new Set([sent, ...queue].map((each) => each?.id));
  queue.push(...window.enn.marks.waiting()
    .filter((each) => each.place === place && !known.has(each.id))
    .map((each) => ({ ...each, tried: true })));
  tell();
  flush();
};
// What a profile is to forget is not taught anew.
window.enn.forgotten = (profile) => {
  queue = queue.filter((each) => each.profile !== profile);
  for (const each of window.enn.marks.waiting()) {
    if (each.place === place && each.profile === profile) window.enn.marks.release(each.id);
  }
  tell();
};
const answered = () => {
  clearTimeout(timer);
  const last = sent;
  sent = null;
  if (last) window.enn.marks.release(last.id);
  const refused = element.querySelector("[data-refused]")?.dataset.refused;
  // The next answer takes the place of this one at once.
  if (refused && queue.length) window.enn.missed.add(refused);
  tell();
  if (last && refused === undefined && asking(last) === query) {
    for (const token of Object.keys(last.marks)) if (!cardOf(token)) known[token] = last.marks[token];
  }
  // The focus goes with the picture: what had it now shows another one, or is gone.
  const active = document.activeElement;
  if (last && focused && (active === document.body || element.contains(active))) {
    cardOf(focused.token)?.querySelector(`[data-do="${focused.what}"]`)
      ?.focus({ preventScroll: !focused.keyboard }); // a mouse stays where it is
  }
  for (const token of Object.keys({ ...last?.marks, ...queue[0]?.marks })) paint(token);
  flush();
};
const marking = { on: markable, mark, kept, pending };
const keys = { g: "good", "+": "good", b: "bad", "-": "bad" };
window.enn.markKey = (event) => (event.ctrlKey || event.metaKey || event.altKey
  ? undefined : keys[event.key.toLowerCase()]);

const act = (what, token) => {
  if (what === "like") trigger("like", { token });
  if (what === "describe") trigger("describe", { token });
};
element.addEventListener("click", (event) => {
  const button = event.target.closest("[data-do]");
  const card = button?.closest(".enn-card");
  if (!card) return;
  const what = button.dataset.do;
  if (what === "open") window.enn.open(all(), card, act, marking);
  else if (what === "good" || what === "bad") mark(card.dataset.token, what);
  else act(what, card.dataset.token);
});
element.addEventListener("keydown", (event) => {
  const card = event.target.closest(".enn-card");
  const what = card && window.enn.markKey(event);
  if (what && markable()) {
    event.preventDefault();
    mark(card.dataset.token, what);
    return;
  }
  if (!event.target.matches(".enn-open")) return;
  const buttons = [...element.querySelectorAll(".enn-open")];
  const at = buttons.indexOf(event.target);
  const top = (button) => button.getBoundingClientRect().top;
  const columns = buttons.findIndex((b) => top(b) > top(buttons[0]) + 4);
  const perRow = columns < 0 ? buttons.length : columns;
  const by = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -perRow, ArrowDown: perRow }[event.key];
  const next = by && buttons[at + by];
  if (next) { event.preventDefault(); next.focus(); }
});
const note = (target) => {
  const card = element.contains(target) && target.closest(".enn-card");
  focused = card ? { token: card.dataset.token, what: target.dataset.do,
    keyboard: target.matches(":focus-visible") } : null;
};
element.addEventListener("focusin", (event) => note(event.target));
element.addEventListener("focusout", (event) => { if (event.relatedTarget) focused = null; });

// A picture that was moved or deleted since it was indexed.
element.addEventListener("error", (event) => {
  if (event.target.tagName === "IMG") event.target.closest(".enn-open")?.classList.add("enn-gone");
}, true);
element.addEventListener("load", (event) => {
  if (event.target.tagName === "IMG") event.target.closest(".enn-open")?.classList.remove("enn-gone");
}, true);

// Cards glide from where they stood to where they stand in a new ranking of the same search.
let places = new Map();
const measure = () => {
  const box = element.getBoundingClientRect();
  places = new Map(all().map((card) => {
    const at = card.getBoundingClientRect();
    return [card.dataset.token, [at.left - box.left, at.top - box.top]];
  }));
};
const glide = () => {
  const before = places;
  measure();
  if (window.matchMedia("(prefers-reduced-motion: reduce)").matches) return;
  for (const card of all()) {
    const from = before.get(card.dataset.token), to = places.get(card.dataset.token);
    if (!from) card.animate([{ opacity: 0 }, { opacity: 1 }], 250);
    else if (from[0] !== to[0] || from[1] !== to[1]) {
      const way = `translate(${from[0] - to[0]}px, ${from[1] - to[1]}px)`;
      card.animate([{ transform: way }, { transform: "none" }], { duration: 300, easing: "ease" });
    }
  }
};
window.addEventListener("resize", measure);

watch("value", () => {
  const facts = JSON.parse(element.querySelector("[data-kept]")?.dataset.kept ?? "null");
  if (facts) window.enn.keep(facts);
  const moved = facts && facts.place !== place;
  if (moved) {
    // Another server answers: what was marked on the page of the one before waits for that one.
    place = facts.place;
    queue = queue.filter((each) => each.place === place);
  }
  const asked = asking(grid()?.dataset);
  if (asked !== undefined && asked === query) glide();
  else {
    measure();
    known = {};
    const box = element.getBoundingClientRect();
    if (box.top < 0) element.scrollIntoView({ block: "start" });
  }
  query = asked;
  const number = Number(element.querySelector("[data-answer]")?.dataset.answer);
  if (sent && number === sent.answer) answered();
  if (moved) resume();
  window.enn.refresh();
});
