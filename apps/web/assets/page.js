// Shared by the page's components; loaded once, from the document's head.
"use strict";
window.enn = (() => {
  // What a browser's store holds under a key, "" for nothing; with a value, what it is to hold,
  // null for nothing. It is given as a function: already looking at it may be forbidden.
  const store = (of, key, value) => {
    try {
      if (value === undefined) return of().getItem(key) || "";
      if (value === null) of().removeItem(key);
      else of().setItem(key, value);
    } catch { /* private mode, or full */ }
    return "";
  };
  const tab = () => sessionStorage, browser = () => localStorage;

  // Light or dark: the visitor's choice, else what the system prefers (Gradio's default).
  const applyTheme = () => {
    const choice = store(browser, "enn-theme");
    if (choice && document.body) document.body.classList.toggle("dark", choice === "dark");
  };
  const switchTheme = () => {
    const dark = !document.body.classList.contains("dark");
    store(browser, "enn-theme", dark ? "dark" : "light");
    document.body.classList.toggle("dark", dark);
  };

  // The profile is remembered by the browser, for the demo apart from other pages of this address.
  const usual = document.querySelector('meta[name="enn-profile"]')?.content || "default";
  const place = usual === "default" ? "enn-profile" : `enn-profile-${usual}`;
  const profile = () => store(browser, place);
  const remember = (name) => store(browser, place, name);

  // What a tab showed is shown again when it is loaded again: by its visitor, or by Gradio after an
  // outage; words that were asked for without an answer are asked for again.
  const keep = (shown) => {
    store(tab, "enn-shown", JSON.stringify({ at: location.href, shown }));
    store(tab, "enn-words", "");
  };
  document.addEventListener("input", (event) => {
    if (event.target.closest?.("#enn-text")) store(tab, "enn-words", event.target.value);
  });
  const opening = () => {
    let shown = "";
    try {
      const kept = JSON.parse(store(tab, "enn-shown") || "{}");
      const again = performance.getEntriesByType("navigation")[0]?.type === "reload";
      if (again && kept.at === location.href && kept.shown) {
        const text = store(tab, "enn-words") || kept.shown.text;
        shown = JSON.stringify({ ...kept.shown, text });
      }
    } catch { /* not ours */ }
    return JSON.stringify({ profile: profile(), shown });
  };

  // Marks wait in the browser until the server has answered them: {id, place, query, profile,
  // marks}. Each is known by its id, so that it may be sent again; each has a key of its own, so
  // that tabs do not write over each other's.
  const MARK = "enn-mark-";
  const unsaved = new Map(); // where nothing can be stored they wait as long as the tab is open
  const whole = (each) => /^[0-9a-f]{32}$/.test(each?.id) && typeof each.place === "string"
    && each.marks && typeof each.marks === "object";
  const waiting = () => {
    const found = [...unsaved.values()];
    try {
      for (const key of Object.keys(localStorage).filter((name) => name.startsWith(MARK))) {
        try { found.push(JSON.parse(localStorage.getItem(key))); } catch { /* not ours */ }
      }
    } catch { /* private mode */ }
    return found.filter(whole).sort((one, other) => one.at - other.at);
  };
  const release = (id) => {
    unsaved.delete(id);
    store(browser, MARK + id, null);
  };
  const hold = (batch) => {
    const held = { ...batch, at: Date.now() };
    release(batch.id);
    try { localStorage.setItem(MARK + batch.id, JSON.stringify(held)); } catch {
      unsaved.set(batch.id, held);
    }
  };
  // `crypto.randomUUID` is not there on plain http.
  const newId = () => [...crypto.getRandomValues(new Uint8Array(16))]
    .map((byte) => byte.toString(16).padStart(2, "0")).join("");
  const discard = (place) => {
    for (const each of waiting()) if (each.place !== place) release(each.id);
  };
  const marks = { waiting, hold, release, newId };

  // A line at the bottom of the window about marks that wait.
  let line;
  const counted = (count) => (count === 1 ? "1 mark is" : `${count} marks are`);
  const tell = (text) => {
    if (!line) {
      line = document.createElement("div");
      line.className = "enn-waiting";
      line.setAttribute("role", "status");
      document.body.append(line);
    }
    line.textContent = text;
    line.hidden = !text;
  };
  const missed = new Set(); // answers that the next one replaced before anybody could read them
  const tellWaiting = (count, elsewhere, place) => {
    const texts = [...missed];
    const where = unsaved.size ? "tab, for the browser stores nothing: keep it open" : "browser";
    if (count) texts.push(`Waiting for the server: ${counted(count)} kept in this ${where}.`);
    if (elsewhere) {
      texts.push(`${counted(elsewhere)} kept for another collection or visitor of this address.`);
    }
    tell(texts.join(" "));
    const offer = (label, act) => {
      const button = document.createElement("button");
      button.type = "button";
      button.className = "enn-small";
      button.textContent = label;
      button.addEventListener("click", act);
      line.append(" ", button);
    };
    if (elsewhere) offer("Discard them", () => { discard(place); tellWaiting(count, 0, place); });
    if (missed.size) offer("OK", () => { missed.clear(); tellWaiting(count, elsewhere, place); });
  };

  // Tells screen readers; the region has to be there before its text.
  let voice;
  const say = (text) => {
    if (!voice) {
      voice = document.createElement("div");
      voice.className = "enn-voice";
      voice.setAttribute("role", "status");
      voice.setAttribute("aria-live", "polite");
      document.body.append(voice);
    }
    voice.textContent = text;
  };

  // The larger view of one card, with a way to its neighbours: those it had when the view was
  // opened, whatever marks make of the ranking meanwhile. A native modal dialog keeps the keyboard
  // inside, closes on Escape and gives the focus back.
  let dialog, list = [], at = 0, act, marking;
  const part = (name) => dialog.querySelector(`[data-part="${name}"]`);

  const build = () => {
    dialog = document.createElement("dialog");
    dialog.className = "enn-dialog";
    dialog.setAttribute("aria-labelledby", "enn-dialog-name");
    dialog.innerHTML = `
      <div class="enn-stage">
        <button type="button" class="enn-step" data-act="previous" aria-label="Previous picture">‹</button>
        <img data-part="image" alt="">
        <button type="button" class="enn-step" data-act="next" aria-label="Next picture">›</button>
      </div>
      <div class="enn-facts">
        <button type="button" class="enn-close" data-act="close" aria-label="Close">✕</button>
        <h2 id="enn-dialog-name" data-part="name"></h2>
        <div class="enn-match" data-part="match">
          <span class="enn-bar" aria-hidden="true"><i data-part="bar"></i></span>
          <span class="enn-score" data-part="score"></span>
        </div>
        <dl>
          <div><dt>Folder</dt><dd data-part="folder"></dd></div>
          <div><dt>Size</dt><dd data-part="size"></dd></div>
          <div data-part="credit-row"><dt>Photo</dt><dd data-part="credit"></dd></div>
        </dl>
        <div class="enn-dialog-actions">
          <div class="enn-dialog-marks" data-part="marks" role="group" aria-label="Is this what you meant?">
            <button type="button" class="enn-thumb" data-act="good"></button>
            <button type="button" class="enn-thumb" data-act="bad"></button>
          </div>
          <button type="button" class="enn-button enn-main" data-act="like">More like this</button>
          <button type="button" class="enn-button" data-act="describe">Match captions</button>
        </div>
      </div>`;
    document.body.append(dialog);
    dialog.addEventListener("click", (event) => {
      const what = event.target.closest("[data-act]")?.dataset.act;
      const token = list[at]?.token;
      if (event.target === dialog || what === "close") dialog.close();
      else if (what === "previous") step(-1);
      else if (what === "next") step(1);
      else if (what === "good" || what === "bad") marking.mark(token, what);
      else if (what) {
        dialog.close();
        act(what, token);
      }
    });
    dialog.addEventListener("keydown", (event) => {
      if (event.key === "ArrowLeft") step(-1);
      if (event.key === "ArrowRight") step(1);
      const what = window.enn.markKey(event);
      if (what && marking.on()) {
        event.preventDefault();
        marking.mark(list[at].token, what);
      }
    });
    dialog.addEventListener("close", () => {
      document.querySelector(`.enn-card[data-token="${list[at].token}"] .enn-open`)
        ?.focus({ preventScroll: false });
    });
  };

  const step = (by) => { if (list[at + by]) fill(at + by); };

  const fill = (position) => {
    at = position;
    const facts = list[at];
    const image = part("image");
    // The small view is there at once; the large one replaces it when it has arrived.
    image.src = `pictures/card/${facts.token}`;
    image.alt = facts.name;
    const large = new Image();
    large.onload = () => { if (list[at] === facts) image.src = large.src; };
    large.src = `pictures/large/${facts.token}`;
    part("name").textContent = facts.name;
    part("folder").textContent = facts.folder || "(top folder)";
    part("size").textContent = `${facts.pixels}, ${facts.bytes}`;
    part("match").hidden = !facts.score;
    if (facts.score) {
      part("bar").style.width = `${facts.percent}%`;
      part("score").textContent = `similarity ${facts.score}`;
    }
    part("credit-row").hidden = !facts.credit;
    part("credit").textContent = facts.credit || "";
    dialog.querySelector('[data-act="previous"]').disabled = !list[at - 1];
    dialog.querySelector('[data-act="next"]').disabled = !list[at + 1];
    refresh();
  };

  // Shows which marks of the open picture are kept, and which are on their way.
  const refresh = () => {
    if (!list[at]) return;
    part("marks").hidden = !marking.on();
    const { token } = list[at], kept = marking.kept(token), asked = marking.pending(token);
    for (const button of part("marks").children) {
      const what = button.dataset.act;
      button.setAttribute("aria-pressed", String(kept === what));
      button.classList.toggle("enn-pending",
        asked !== undefined && asked !== kept && [asked, kept].includes(what));
    }
  };

  const open = (cards, card, onAct, marks) => {
    if (!dialog) build();
    list = cards.map((each) => ({ ...each.dataset }));
    act = onAct;
    marking = marks;
    for (const button of part("marks").children) { // the same drawings as on the cards
      const what = button.dataset.act;
      const icon = card.querySelector(`.enn-thumb[data-do="${what}"] svg`)?.cloneNode(true);
      button.replaceChildren(...(icon ? [icon] : []), what === "good" ? "Good" : "Bad");
      button.title = `${what === "good" ? "G" : "B"} on the keyboard`;
    }
    fill(cards.indexOf(card));
    dialog.showModal();
    part("name").scrollIntoView?.({ block: "nearest" });
    dialog.querySelector(".enn-main").focus();
  };

  // "/" goes to the search box, as on many sites.
  document.addEventListener("keydown", (event) => {
    const typing = event.target.closest?.("input, textarea, select, [contenteditable]");
    if (event.key === "/" && !typing && !dialog?.open) {
      const box = document.querySelector("#enn-text textarea, #enn-text input");
      if (box?.offsetParent) { event.preventDefault(); box.focus(); box.select(); }
    }
  });

  applyTheme();
  return {
    store, tab, browser, applyTheme, switchTheme, open, refresh, profile, remember, say, keep, opening,
    marks, missed, tell, tellWaiting,
  };
})();
