// Shared by the components of the brain page; loaded once, from the document's head.
"use strict";
window.ennBrain = (() => {
  // The session is remembered by the tab, so that loading the page again keeps the scans; the site
  // profile is remembered by the browser.
  const { store, browser, tab: thisTab } = window.enn;
  const tab = window.enn.marks.newId();
  const remembered = () => JSON.stringify({
    session: store(thisTab, "enn-brain-session"), tab, site: store(browser, "enn-brain-site"),
  });
  let open = "", opened = null;
  const tellOpen = () => { if (open && opened) { opened(open); opened = null; } };
  const whenOpen = (handler) => { opened = handler; tellOpen(); };
  const keepSession = (token) => {
    open = token;
    store(thisTab, "enn-brain-session", token);
    tellOpen();
  };

  // A lesson waits in the tab until it is answered. After an outage it is sent again: its id tells
  // the server whether it was learned.
  const LESSON = "enn-brain-lesson";
  const hold = (lesson) => store(thisTab, LESSON, JSON.stringify({ ...lesson, session: open }));
  const held = () => {
    try { return JSON.parse(store(thisTab, LESSON) || "null"); } catch { return null; }
  };
  const release = () => store(thisTab, LESSON, null);
  window.enn.remember = (name) => store(browser, "enn-brain-site", name);

  // Scans of a tab that is closed go soon.
  window.addEventListener("pagehide", () => {
    if (!open) return;
    const body = new Blob([JSON.stringify({ tab, session: open })], { type: "application/json" });
    navigator.sendBeacon(new URL("brain/left", document.baseURI), body);
  });

  // What the stage wants shown, for the viewer whenever that is ready.
  let show = () => {}, wanted = null;
  const view = (facts) => { wanted = facts; show(facts); };
  const viewer = (handler) => { show = handler; if (wanted) show(wanted); };

  return { remembered, keepSession, whenOpen, hold, held, release, view, viewer };
})();
